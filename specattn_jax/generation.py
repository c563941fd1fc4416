"""Text in, text out: the host side of generation around the jitted loop of `speculative.py`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specattn_jax.alignment import NucleusMass
from specattn_jax.cache import init_cache
from specattn_jax.display import Picture
from specattn_jax.errors import UserError
from specattn_jax.loading.memory import check_memory
from specattn_jax.loading.tokenizer import TextStream, Tokenizer
from specattn_jax.model import LanguageModel, prefill
from specattn_jax.pair import ModelPair
from specattn_jax.sampling import Sampling
from specattn_jax.selection import Selector, load_policy
from specattn_jax.shading import SelectionRecord, shade_window
from specattn_jax.speculative import DecodeSettings, DecodeState, Mode, decode, start_decoding, watched_step

DEFAULT_KV_REDUCTION = 0.75
DEFAULT_P = 0.95


@dataclasses.dataclass(frozen=True)
class Generation:
    """One continued prompt and what it cost.

    Attributes:
        text: the new text, stop tokens left out.
        tokens: the new token ids, a stop token at the end included.
        prompt_tokens: length of the prompt.
        mode: how it was generated.
        windows: verification passes of the target.
        accepted_per_window: mean number of drafted tokens accepted (0 to W), the target's own token not counted.
        kv_reduction: share of the target's cache reads saved, averaged over layers, heads and windows.
        layer_reads: share of the cache that each target layer read, averaged over windows.
        selection: which tokens each window read; None unless `generate` was asked to keep it.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    mode: Mode
    windows: int
    accepted_per_window: float
    kv_reduction: float
    layer_reads: list[float]
    selection: SelectionRecord | None = None

    @property
    def stats(self) -> dict[str, float | int | str]:
        """The numbers, by name.

        Example:
            >>> from specattn_jax.examples import tiny_pair
            >>> result = generate(tiny_pair(), ["Call me"], mode="speculative", max_new_tokens=8).results[0]
            >>> {name: result.stats[name] for name in ("mode", "prompt_tokens", "new_tokens", "kv_reduction")}
            {'mode': 'speculative', 'prompt_tokens': 7, 'new_tokens': 8, 'kv_reduction': 0.0}
        """
        return {
            "mode": self.mode,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.tokens),
            "windows": self.windows,
            "accepted_per_window": self.accepted_per_window,
            "kv_reduction": self.kv_reduction,
        }

    def plot_selection(self, window: int = -1, *, most_tokens: int = 400) -> Picture:
        """The text before a window, each word shaded by how many layers and kv heads read it.

        Args:
            window: which window; negative numbers count from the last.
            most_tokens: how much of the text before the window is shown.

        Returns:
            What a notebook shows as it is; its `html` can be written to a file.

        Raises:
            UserError: there is no such window, or the selection was not kept.

        Example:
            >>> from specattn_jax.examples import tiny_pair
            >>> run = generate(tiny_pair(), ["Call me Ishmael."], max_new_tokens=8, p=0.8, keep_selection=True)
            >>> picture = run.results[0].plot_selection(window=0)  # in a notebook, shown as it is
            >>> picture.html.startswith("<div")
            True
        """
        if self.selection is None:
            raise UserError("plot_selection: nothing was kept; call generate with keep_selection=True.")
        if not -self.windows <= window < self.windows:
            raise UserError(f"window is {window}; expected a number below {self.windows}, the windows of this text.")
        return shade_window(self.selection, window, most_tokens=most_tokens)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Where the time of one call went, in seconds; compiling is kept apart because it happens once."""

    compile_s: float
    prefill_s: float
    decode_s: float


@dataclasses.dataclass(frozen=True)
class Generations:
    """The results of one call, prompt by prompt, and its timing (shared by the batch)."""

    results: list[Generation]
    timing: Timing

    @property
    def tokens_per_s(self) -> float:
        """New tokens of the whole batch per second of decoding; prefill gives each sequence its first token."""
        decoded = sum(len(result.tokens) - 1 for result in self.results)
        return decoded / self.timing.decode_s if self.timing.decode_s > 0 else 0.0


def make_selector(
    pair: ModelPair, *, policy: str = "default", p: float | None = None, kv_reduction: float | None = None
) -> Selector:
    """What the target will read: a policy with its nucleus mass.

    Args:
        pair: the models and their alignment.
        policy: name of a preset in `configs/policies.toml`.
        p: nucleus mass, the same in every layer, in (0, 1]; 1 reads everything.
        kv_reduction: wanted share of cache reads saved, met with the per-layer masses found at calibration. Without
            either, the default policy saves 0.75 and the published one takes p = 0.95.

    Raises:
        UserError: both are given, a value is out of range, or the pair has no alignment.
    """
    chosen = load_policy(policy)
    if pair.alignment is None:
        raise UserError(
            f"alignment: the pair {pair.name} has none, and specattn cannot choose what to read without it; make one "
            "with `specattn calibrate` and pass its folder, or use mode speculative."
        )
    if p is not None and kv_reduction is not None:
        raise UserError(f"p is {p} and kv_reduction is {kv_reduction}; expected one of them, not both.")
    if chosen.prediction == "layer_map":
        if kv_reduction is not None:
            raise UserError(f"kv_reduction is {kv_reduction}, but policy {policy} has no budgets; give p instead.")
        p = DEFAULT_P if p is None else p
    if p is None:
        mass = pair.alignment.mass_for_saving(DEFAULT_KV_REDUCTION if kv_reduction is None else kv_reduction)
    else:
        if not 0.0 < p <= 1.0:
            raise UserError(f"p is {p}; expected a number in (0, 1].")
        mass = NucleusMass.uniform(p, pair.target.config.num_layers)
    return Selector(
        alignment=pair.alignment,
        mass=mass,
        policy=chosen,
        target=pair.target.config,
        draft=pair.draft.config,
    )


def generate(
    pair: ModelPair,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 128,
    mode: Mode = "specattn",
    window: int = 5,
    policy: str = "default",
    p: float | None = None,
    kv_reduction: float | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_at_eos: bool = True,
    prefill_chunk: int = 512,
    windows_per_call: int = 4,
    keep_selection: bool = False,
    on_text: Callable[[int, str], None] | None = None,
    on_prefill: Callable[[int, int], None] | None = None,
) -> Generations:
    """Continues a batch of prompts of any lengths.

    Args:
        pair: target, draft, tokenizer and alignment, from `load_pair`.
        prompts: texts, or lists of token ids.
        max_new_tokens: most new tokens per prompt.
        mode: `autoregressive`, `speculative` (dense verification) or `specattn` (sparse verification).
        window: drafted tokens per window.
        policy: selection policy of mode `specattn`.
        p: nucleus mass in every layer, or
        kv_reduction: wanted share of cache reads saved (see `make_selector`).
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with this probability; 1 keeps all.
        seed: of the random draws; sequence i of a batch draws the same whatever the other sequences are.
        stop_at_eos: whether the tokenizer's end tokens end a sequence.
        prefill_chunk: prompt tokens read at a time.
        windows_per_call: windows per jitted call when streaming.
        keep_selection: whether to keep which tokens each window read, for `Generation.plot_selection`; the host then
            sees every window, which costs time.
        on_text: receives the index of a prompt and what was added to its text, whole characters only, after each call;
            without it one call does everything.
        on_prefill: receives positions read and positions to read.

    Returns:
        One `Generation` per prompt, and timings.

    Raises:
        UserError: an argument is out of range, a prompt is empty or too long, or memory does not suffice.

    Example:
        >>> from specattn_jax.examples import tiny_pair  # load_pair() gives one that makes sense
        >>> pieces = []
        >>> run = generate(
        ...     tiny_pair(),
        ...     ["Call me Ishmael.", "Once upon a time"],
        ...     kv_reduction=0.75,
        ...     max_new_tokens=8,
        ...     on_text=lambda index, text: pieces.append((index, text)),
        ... )
        >>> [len(result.tokens) for result in run.results]
        [8, 8]
        >>> run.results[1].text == "".join(text for index, text in pieces if index == 1)
        True
    """
    if isinstance(prompts, str):
        raise UserError(f"prompts is one text, {prompts[:40]!r}; expected a list of prompts: put it into brackets.")
    for name, value in {"prefill_chunk": prefill_chunk, "windows_per_call": windows_per_call}.items():
        if value < 1:
            raise UserError(f"{name} is {value}; expected at least 1.")
    settings = DecodeSettings(
        mode=mode,
        window=window,
        sampling=Sampling(temperature, top_k, top_p),
        stop_tokens=pair.tokenizer.eos_ids if stop_at_eos else (),
    )
    selector = make_selector(pair, policy=policy, p=p, kv_reduction=kv_reduction) if mode == "specattn" else None
    if keep_selection and selector is None:
        raise UserError(f"keep_selection is set, but mode {mode} selects nothing; use mode='specattn'.")
    draft = None if mode == "autoregressive" else pair.draft
    encoded = [_encode(pair, prompt, index) for index, prompt in enumerate(prompts)]
    _check_lengths(pair, encoded, max_new_tokens)

    clock = _Clock()
    state = _prefill_both(pair.target, draft, encoded, max_new_tokens, settings, seed, prefill_chunk, clock, on_prefill)
    writer = _Writer(pair.tokenizer, len(encoded), on_text or (lambda index, text: None))
    if keep_selection and draft is not None and selector is not None:
        state, watched = _decode_watched(pair.target, draft, selector, state, settings, writer)
    else:
        state = decode(pair.target, draft, selector, state, jnp.int32(0), settings=settings)
        clock.lap("compile", state)
        steps, watched = max_new_tokens if on_text is None else windows_per_call, None
        while not bool(jnp.all(state.done)):
            state = decode(pair.target, draft, selector, state, jnp.int32(steps), settings=settings)
            writer.show(_new_tokens(state))
    clock.lap("decode", state)
    writer.finish(_new_tokens(state))
    results = _results(pair, encoded, state, mode)
    if watched is not None:
        results = [
            dataclasses.replace(result, selection=_record(pair, prompt, result.tokens, watched, index))
            for index, (prompt, result) in enumerate(zip(encoded, results, strict=True))
        ]
    return Generations(results, Timing(**clock.seconds))


class _Window(NamedTuple):
    """What the host saw of one window: the cache before it, whether a sequence still decoded, and who read what."""

    past: Int[np.ndarray, " B"]
    active: Bool[np.ndarray, " B"]
    readers: Int[np.ndarray, "B S"]


def _decode_watched(
    target: LanguageModel,
    draft: LanguageModel,
    selector: Selector,
    state: DecodeState,
    settings: DecodeSettings,
    writer: _Writer,
) -> tuple[DecodeState, list[_Window]]:
    """Decodes window by window, keeping what each of them read."""
    windows = []
    while not bool(jnp.all(state.done)):
        past, active = jax.device_get((state.target_cache.lengths, ~state.done))
        state, readers = watched_step(target, draft, selector, state, settings=settings)
        windows.append(_Window(past, active, np.asarray(readers)))
        writer.show(_new_tokens(state))
    return state, windows


def _record(
    pair: ModelPair, prompt: Sequence[int], new: Sequence[int], windows: Sequence[_Window], index: int
) -> SelectionRecord:
    """What the windows read of one sequence."""
    mine = [window for window in windows if window.active[index]]
    slots = len(prompt) + len(new)
    config = pair.target.config
    return SelectionRecord(
        pieces=pair.tokenizer.pieces([*prompt, *new]),
        past=np.array([window.past[index] for window in mine], np.int64),
        readers=np.array([window.readers[index, :slots] for window in mine], np.int64).reshape(len(mine), slots),
        num_readers=config.num_layers * config.num_kv_heads,
    )


class _Clock:
    """Sums wall time by kind, waiting for the device at each lap."""

    def __init__(self) -> None:
        self.seconds = {"compile_s": 0.0, "prefill_s": 0.0, "decode_s": 0.0}
        self._last = time.perf_counter()

    def lap(self, kind: str, value: object = None) -> None:
        jax.block_until_ready(value)
        now = time.perf_counter()
        self.seconds[f"{kind}_s"] += now - self._last
        self._last = now


class _Writer:
    """Tells the text of each prompt's new tokens as they arrive."""

    def __init__(self, tokenizer: Tokenizer, count: int, on_text: Callable[[int, str], None]) -> None:
        self._streams = [TextStream(tokenizer) for _ in range(count)]
        self._shown = [0] * count
        self._on_text = on_text

    def show(self, tokens: list[list[int]]) -> None:
        """Tells what is new in `tokens`, which are all new tokens so far."""
        for index, (stream, ids) in enumerate(zip(self._streams, tokens, strict=True)):
            self._tell(index, stream.push(ids[self._shown[index] :]))
            self._shown[index] = len(ids)

    def finish(self, tokens: list[list[int]]) -> None:
        """Tells what is left, unfinished characters included."""
        self.show(tokens)
        for index, stream in enumerate(self._streams):
            self._tell(index, stream.flush())

    def _tell(self, index: int, text: str) -> None:
        if text:
            self._on_text(index, text)


def _encode(pair: ModelPair, prompt: str | Sequence[int], index: int) -> list[int]:
    """Token ids of one prompt."""
    tokens = pair.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
    if not tokens:
        raise UserError(f"prompt {index + 1} is empty; expected at least one token.")
    size = pair.target.config.vocab_size
    if not all(0 <= token < size for token in tokens):
        raise UserError(f"prompt {index + 1} has a token id outside the vocabulary; expected ids from 0 to {size - 1}.")
    return tokens


def _check_lengths(pair: ModelPair, encoded: list[list[int]], max_new_tokens: int) -> None:
    """Refuses what cannot fit either model's context."""
    if not encoded:
        raise UserError("prompts is empty; expected at least one prompt.")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; expected at least 1.")
    context = min(pair.target.config.max_context, pair.draft.config.max_context)
    longest = max(len(tokens) for tokens in encoded)
    if longest >= context:
        raise UserError(f"The prompt has {longest} tokens, but the context of {pair.name} is {context}; shorten it.")
    if longest + max_new_tokens > context:
        raise UserError(
            f"max_new_tokens is {max_new_tokens}, but after a prompt of {longest} tokens the context of {pair.name}, "
            f"{context}, leaves room for {context - longest}; ask for fewer tokens."
        )


def _prefill_both(
    target: LanguageModel,
    draft: LanguageModel | None,
    encoded: list[list[int]],
    max_new_tokens: int,
    settings: DecodeSettings,
    seed: int,
    chunk: int,
    clock: _Clock,
    on_prefill: Callable[[int, int], None] | None,
) -> DecodeState:
    """Reads the prompts with both models and returns the state in which decoding starts."""
    lengths = np.array([len(tokens) for tokens in encoded], np.int32)
    batch, longest = len(encoded), max(map(len, encoded))
    chunk = min(chunk, _round_up(longest, 64))
    padded = _round_up(longest, chunk)
    # A window may write W + 1 entries beyond the last token that is kept.
    slots = _round_up(max(padded, longest + max_new_tokens + settings.tokens_per_window), 128)
    tokens = np.zeros((batch, padded), np.int32)
    for row, prompt in zip(tokens, encoded, strict=True):
        row[: len(prompt)] = prompt
    models = {"target": target} | ({} if draft is None else {"draft": draft})
    check_memory(
        {
            f"the KV cache of the {role}": model.config.cache_bytes(batch, slots, model.dtype.itemsize)
            for role, model in models.items()
        }
    )

    def read(model: LanguageModel, offset: int) -> tuple[Float[Array, "B D"], object]:
        def progress(position: int) -> None:
            clock.lap("compile" if position == 0 else "prefill")
            if on_prefill is not None:
                on_prefill(offset + position, padded * len(models))

        cache = init_cache(model.config, batch, slots, model.dtype)
        return prefill(model, jnp.asarray(tokens), jnp.asarray(lengths), cache, chunk=chunk, progress=progress)

    hidden, target_cache = read(target, 0)
    draft_cache = None if draft is None else read(draft, padded)[1]
    key = jax.random.key(seed)
    state = start_decoding(
        target,
        hidden,
        target_cache,
        draft_cache,
        jnp.asarray([prompt[-1] for prompt in encoded], jnp.int32),
        jnp.full((batch,), max_new_tokens, jnp.int32),
        jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(batch)),
        settings=settings,
        room=max_new_tokens,
    )
    clock.lap("prefill", state)
    return state


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _new_tokens(state: DecodeState) -> list[list[int]]:
    """The new tokens of every sequence so far."""
    output, emitted = jax.device_get((state.output, state.emitted))
    return [row[:count].tolist() for row, count in zip(output, emitted, strict=True)]


def _results(pair: ModelPair, encoded: list[list[int]], state: DecodeState, mode: Mode) -> list[Generation]:
    """What a finished state says, per prompt."""
    counts = jax.device_get(state.statistics)
    results = []
    for index, tokens in enumerate(_new_tokens(state)):
        windows = int(counts.windows[index])
        reads = counts.read[index] / max(windows, 1)
        results.append(
            Generation(
                text=pair.tokenizer.decode(tokens),
                tokens=tokens,
                prompt_tokens=len(encoded[index]),
                mode=mode,
                windows=windows,
                accepted_per_window=float(counts.accepted[index]) / max(windows, 1),
                kv_reduction=1.0 - float(reads.mean()) if windows else 0.0,
                layer_reads=[float(read) for read in reads],
            )
        )
    return results
