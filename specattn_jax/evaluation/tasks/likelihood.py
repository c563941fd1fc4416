"""Log-likelihoods of given continuations, read densely or as a method reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from specattn_jax.decoding.forced import Forced
from specattn_jax.decoding.protocol import Models, WindowRecord
from specattn_jax.evaluation.drift import read_densely
from specattn_jax.evaluation.methods import Case, make_selection
from specattn_jax.evaluation.tasks.answering import LOSSLESS
from specattn_jax.loading.pair import ModelPair
from specattn_jax.models.cache import round_up
from specattn_jax.models.transformer import LanguageModel
from specattn_jax.runtime.faults import unsound
from specattn_jax.runtime.session import Session
from specattn_jax.selection.protocol import Selection

# Tokens that are always scored densely: before them there is nothing to leave out.
_DENSE = 3
# Places scored at a time, and what their number is rounded up to, so that few programs are compiled.
_POSITIONS, _ROUND = 16, 64


class Continuation(NamedTuple):
    """A text whose end is scored.

    Attributes:
        tokens: context and continuation.
        first: where the continuation begins, at least 1.
    """

    tokens: list[int]
    first: int


class Likelihood(NamedTuple):
    """How likely a continuation is.

    Attributes:
        log_prob: sum of the log probabilities of its tokens, in nats.
        greedy: whether each of them is the likeliest.
    """

    log_prob: float
    greedy: bool


def likelihoods(
    pair: ModelPair, case: Case, asked: Sequence[Continuation], *, window: int = 5, batch: int = 1
) -> list[Likelihood]:
    """Scores continuations: densely for lossless methods, else in the forced windows of the method's own reading.

    Where reading is sparse, the context is prefilled densely, as in decoding, and so are the first three tokens of all.

    Args:
        pair: the models.
        case: the method with its setting.
        asked: what is scored.
        window: W of the forced windows.
        batch: texts read at a time.

    Raises:
        UserError: the target computes NaN or infinity.
    """
    sparse = case.method not in LOSSLESS
    selection = make_selection(pair, case) if sparse else None
    order = sorted(range(len(asked)), key=lambda index: -len(asked[index].tokens))
    found: dict[int, Likelihood] = {}
    for at in range(0, len(order), batch):
        indices = order[at : at + batch]
        part = [asked[index] for index in indices]
        if selection is None:
            scored = _score_densely(pair.target, part)
        else:
            heads = [Continuation(one.tokens[:_DENSE], one.first) for one in part if one.first < _DENSE]
            early = iter(_score_densely(pair.target, heads) if heads else [])
            late = _score_sparsely(pair, selection, part, window)
            scored = [
                _joined(next(early), end) if one.first < _DENSE else end for one, end in zip(part, late, strict=True)
            ]
        for one, likelihood in zip(part, scored, strict=True):
            if not np.isfinite(likelihood.log_prob):
                raise unsound("target", pair.target, "in a text that is scored", one.tokens)
        found.update(zip(indices, scored, strict=True))
    return [found[index] for index in range(len(asked))]


def _joined(one: Likelihood, other: Likelihood) -> Likelihood:
    return Likelihood(one.log_prob + other.log_prob, one.greedy and other.greedy)


def _padded(rows: Sequence[Sequence[int]], length: int) -> Int32[np.ndarray, "B length"]:
    """Rows of one length; what is added is never scored."""
    tokens = np.zeros((len(rows), length), np.int32)
    for row, given in zip(tokens, rows, strict=True):
        row[: len(given)] = given
    return tokens


def _sums(
    log_probs: Float[np.ndarray, "B n"], greedy: Bool[np.ndarray, "B n"], counts: Sequence[int]
) -> list[Likelihood]:
    """What the first tokens of each row come to."""
    return [
        Likelihood(float(row[:count].sum(dtype=np.float64)), bool(best[:count].all()))
        for row, best, count in zip(log_probs, greedy, counts, strict=True)
    ]


def _score_densely(target: LanguageModel, asked: Sequence[Continuation]) -> list[Likelihood]:
    """Reads everything."""
    counts = [len(one.tokens) - one.first for one in asked]
    length = round_up(max(len(one.tokens) for one in asked), _ROUND)
    places = round_up(max(1, *counts, 1), _ROUND)
    tokens = _padded([one.tokens for one in asked], length)
    first = np.array([one.first for one in asked], np.int32)
    at = np.minimum(first[:, None] + np.arange(places, dtype=np.int32), length - 1)
    # A token is predicted by what stands before it.
    hidden = read_densely(target, jnp.asarray(tokens))
    log_probs, greedy = _score(target, hidden, jnp.asarray(tokens), jnp.asarray(at))
    return _sums(np.asarray(log_probs), np.asarray(greedy), counts)


@jax.jit
def _score(
    target: LanguageModel, hidden: Float[Array, "B length D"], tokens: Int32[Array, "B length"], at: Int32[Array, "B n"]
) -> tuple[Float[Array, "B n"], Bool[Array, "B n"]]:
    """Log probabilities of the tokens at these places, and whether they are the likeliest."""
    before = jnp.take_along_axis(hidden, at[..., None] - 1, axis=1)
    given = jnp.take_along_axis(tokens, at, axis=1)

    def at_place(pair: tuple[Float[Array, "B D"], Int32[Array, " B"]]) -> tuple[Array, Array]:
        logits = jax.nn.log_softmax(target.logits(pair[0]))
        return jnp.take_along_axis(logits, pair[1][:, None], axis=-1)[:, 0], jnp.argmax(logits, axis=-1) == pair[1]

    log_probs, greedy = jax.lax.map(at_place, (jnp.moveaxis(before, 1, 0), given.T), batch_size=_POSITIONS)
    return log_probs.T, greedy.T


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _KeepScores:
    """Keeps the log probability of every token of a forced window, and whether it is the likeliest."""

    target: LanguageModel

    def __call__(self, record: WindowRecord) -> dict[str, Array]:
        """By token, `[B, W]`."""
        log_probs = jax.nn.log_softmax(self.target.logits(record.hidden[:, :-1]))
        given = record.verdict.tokens
        return {
            "log_probs": jnp.take_along_axis(log_probs, given[..., None], axis=-1)[..., 0],
            "greedy": jnp.argmax(log_probs, axis=-1) == given,
        }


def _score_sparsely(
    pair: ModelPair, selection: Selection, asked: Sequence[Continuation], window: int
) -> list[Likelihood]:
    """Reads the continuations in forced windows; their tokens before `_DENSE` are left out."""
    starts = [max(one.first, _DENSE) for one in asked]
    counts = [max(len(one.tokens) - start, 0) for one, start in zip(asked, starts, strict=True)]
    windows = -(-max(counts) // window)
    if not windows:
        return [Likelihood(0.0, True) for _ in asked]
    # The token before the first scored one is the newest, which the target has not read yet.
    prompts = [(one.tokens + [0] * _DENSE)[: start - 1] for one, start in zip(asked, starts, strict=True)]
    text = _padded([one.tokens[start - 1 :] for one, start in zip(asked, starts, strict=True)], 1 + windows * window)
    session, strategy = Session(Models(pair.target, pair.draft)), Forced(jnp.asarray(text), selection, window)
    state = session.start(strategy, session.prefill(prompts, text.shape[1], window=window))
    _, kept = session.watch(strategy, state, windows, _KeepScores(pair.target))
    by_token = {name: np.moveaxis(np.asarray(value), 0, 1).reshape(len(asked), -1) for name, value in kept.items()}
    return _sums(by_token["log_probs"], by_token["greedy"], counts)
