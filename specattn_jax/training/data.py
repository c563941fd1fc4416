"""What the draft learns from: windows of texts, and what the target itself writes after them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from specattn_jax.decoding.autoregressive import Autoregressive
from specattn_jax.decoding.protocol import DecodeSettings, Models
from specattn_jax.decoding.sampling import Sampling
from specattn_jax.errors import UserError
from specattn_jax.files import atomic_file, sensible
from specattn_jax.loading.draft import embedding_fingerprint
from specattn_jax.models.transformer import LanguageModel
from specattn_jax.runtime.session import Session
from specattn_jax.texts import Documents, by_kind
from specattn_jax.training.settings import TrainSettings

# The last part of every text is kept from training, to watch acceptance on.
HELD_OUT = 0.02
# The target writes at these temperatures in turn: half of it greedily, as drafts are mostly asked to decode, the rest
# with enough chance to leave loops.
TEMPERATURES = (0.0, 0.6, 0.0, 1.0)


def split_documents(
    documents: Sequence[Sequence[int]], length: int, prompt: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Training part and held-out end of every text of a kind; texts shorter than a sequence are joined into one.

    Args:
        documents: the texts.
        length: tokens of a training sequence.
        prompt: tokens that an end should have, to be a prompt; it has fewer where a sequence would not be left.

    Raises:
        UserError: all texts together are shorter than one sequence.
    """
    arrays = [np.asarray(document, np.int32) for document in documents]
    short = [array for array in arrays if _training_part(array, length, prompt) < length]
    texts = [array for array in arrays if _training_part(array, length, prompt) >= length]
    if short:
        texts.append(np.concatenate(short))
    parts = [_training_part(text, length, prompt) for text in texts]
    train = [text[:part] for text, part in zip(texts, parts, strict=True) if part >= length]
    if not train:
        longest = max((len(text) for text in texts), default=0)
        raise UserError(
            f"text: the longest has {longest} tokens, of which the last {HELD_OUT:.0%} are held out; expected at least "
            f"one training sequence of {length} tokens; give longer texts or a smaller --length."
        )
    return train, [text[part:] for text, part in zip(texts, parts, strict=True)]


def _training_part(text: np.ndarray, length: int, prompt: int) -> int:
    """Tokens of a text before its held-out end."""
    end = max(1, int(len(text) * HELD_OUT))
    return len(text) - (prompt if end < prompt <= len(text) - length else end)


def split_kinds(
    documents: Documents, length: int, prompt: int
) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]]]:
    """`split_documents` of every kind of text.

    Raises:
        UserError: a kind has too little text.
    """
    split = [split_documents(texts, length, prompt) for texts in by_kind(documents).values()]
    return [train for train, _ in split], [ends for _, ends in split]


def random_windows(
    kinds: Sequence[Sequence[np.ndarray]], count: int, length: int, rng: np.random.Generator
) -> np.ndarray:
    """Windows `[count, length]`: each kind of text has equal chance, and each place in the texts of a kind."""
    fitting: list[np.ndarray] = []
    chances: list[np.ndarray] = []
    for texts in kinds:
        long = [text for text in texts if len(text) >= length]
        if not long:
            raise UserError(f"text: no text has {length} tokens; give longer texts.")
        room = np.array([len(text) - length + 1 for text in long])
        fitting += long
        chances.append(room / room.sum())
    which = rng.choice(len(fitting), size=count, p=np.concatenate(chances) / len(kinds))
    return np.stack(
        [fitting[index][(at := rng.integers(len(fitting[index]) - length + 1)) : at + length] for index in which]
    )


def write_continuations(
    target: LanguageModel,
    prompts: Sequence[Sequence[int]],
    written: int,
    temperature: float,
    seed: int,
    *,
    batch: int = 256,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """What the target writes after each of the n prompts, of any lengths: `[n, written]`, past its end tokens too."""
    strategy = Autoregressive(DecodeSettings(Sampling(temperature)))
    session = Session(Models(target))
    parts = []
    for begin in range(0, len(prompts), batch):
        part = prompts[begin : begin + batch]
        # The last batch is filled up, so that everything is compiled once.
        size = min(batch, len(prompts))
        full = [list(part[index % len(part)]) for index in range(size)]
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), begin), size)
        state = session.prefill(full, written, settings=strategy.settings, keys=keys)
        state = session.decode(strategy, session.start(strategy, state), written)
        parts.append(np.asarray(state.output)[: len(part), :written])
        if progress is not None:
            progress(begin + len(part))
    return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Everything that batches are drawn from.

    Attributes:
        kinds: training part of every text of each kind.
        own: texts `[n, prompt + written]` that the target continued.
        held_out: prompts from the held-out ends, `[n, prompt + written]`, continued greedily.
    """

    kinds: list[list[np.ndarray]]
    own: np.ndarray
    held_out: np.ndarray

    def fingerprint(self) -> str:
        """SHA-256 of everything that batches are drawn from; a resumed run must find the same."""
        digest = hashlib.sha256()
        if len(self.kinds) > 1:
            digest.update(repr([len(texts) for texts in self.kinds]).encode())
        for array in [*itertools.chain(*self.kinds), self.own]:
            digest.update(repr(array.shape).encode() + np.ascontiguousarray(array, np.int32).tobytes())
        return digest.hexdigest()

    def batch(self, step: int, settings: TrainSettings) -> np.ndarray:
        """Rows `[rows, length]` of one step: a function of seed and step alone, so that a resumed run sees the same."""
        rng = np.random.default_rng([settings.seed, step])
        num_own = round(settings.rows * settings.own_share)
        books = random_windows(self.kinds, max(settings.rows - num_own, 1), settings.length, rng)
        per_row = settings.length // self.own.shape[1]
        chosen = self.own[rng.integers(len(self.own), size=(num_own, per_row))]
        return np.concatenate([books[: settings.rows - num_own], chosen.reshape(num_own, settings.length)])


def make_data(
    target: LanguageModel,
    documents: Documents,
    settings: TrainSettings,
    *,
    held_out: int = 64,
    batch: int = 256,
    progress: Callable[[str, int, int], None] | None = None,
) -> TrainingData:
    """Splits the texts and lets the target continue pieces of them, at several temperatures."""
    train, ends = split_kinds(documents, settings.length, settings.prompt)
    rng = np.random.default_rng(settings.seed)
    share = -(-settings.continuations // len(TEMPERATURES))
    own = []
    for index, temperature in enumerate(TEMPERATURES):
        prompts = random_windows(train, share, settings.prompt, rng)

        def tell(done: int, before: int = index * share) -> None:
            if progress is not None:
                progress("the target writes", before + done, share * len(TEMPERATURES))

        seed = settings.seed * len(TEMPERATURES) + index
        own.append(_continued(target, prompts, settings.written, temperature, seed, batch=batch, progress=tell))
    long_ends = [
        [end for end in of_kind if len(end) >= settings.prompt] or texts
        for of_kind, texts in zip(ends, train, strict=True)
    ]
    prompts = random_windows(long_ends, held_out, settings.prompt, rng)
    greedy = _continued(target, prompts, settings.written, 0.0, settings.seed, batch=batch)
    return TrainingData(train, np.concatenate(own), greedy)


def _continued(target: LanguageModel, prompts: np.ndarray, *arguments: Any, **options: Any) -> np.ndarray:
    """Prompts `[n, prompt]`, each with what `write_continuations` adds."""
    return np.concatenate([prompts, write_continuations(target, prompts.tolist(), *arguments, **options)], axis=1)


def load_or_make_data(
    file: Path,
    target: LanguageModel,
    documents: Documents,
    settings: TrainSettings,
    *,
    batch: int = 256,
    progress: Callable[[str, int, int], None] | None = None,
) -> TrainingData:
    """`make_data`, with what the target wrote kept in a file, so that a resumed run and runs to compare share it.

    Args:
        file: `.npz`; read if it exists, written otherwise.
        target: the target.
        documents: token ids of each text, or of each text of each kind.
        settings: of the run.
        batch: texts that the target writes at once.
        progress: told the stage, texts done and texts in all.

    Raises:
        UserError: the file is damaged, belongs to another target, other texts or other settings, or cannot be written;
            or no text is as long as one sequence.
    """
    origin = _origin(target, documents, settings)
    if not file.exists():
        data = make_data(target, documents, settings, batch=batch, progress=progress)
        with atomic_file(file) as work, work.open("wb") as stream:
            np.savez(stream, own=data.own, held_out=data.held_out, origin=np.array(origin))
        return data
    with sensible(file, "remove it, and the target writes its texts anew"), np.load(file) as arrays:
        found, own, held_out = str(arrays["origin"]), arrays["own"], arrays["held_out"]
    if found != origin:
        raise UserError(
            f"{file}: holds what another target wrote, or after other texts or settings; choose another folder or "
            "remove the file."
        )
    return TrainingData(split_kinds(documents, settings.length, settings.prompt)[0], own, held_out)


def _origin(target: LanguageModel, documents: Documents, settings: TrainSettings) -> str:
    """What the target's own texts depend on, as one digest."""
    wanted = (settings.length, settings.continuations, settings.prompt, settings.written, settings.seed, TEMPERATURES)
    digest = hashlib.sha256(repr(wanted).encode())
    digest.update(embedding_fingerprint(np.asarray(target.module().embedding[...])).encode())
    for kind, texts in by_kind(documents).items():
        digest.update(kind.encode())
        for document in texts:
            digest.update(np.asarray(document, np.int32).tobytes())
    return digest.hexdigest()
