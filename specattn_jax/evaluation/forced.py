"""Teacher-forced reading: known text through the draft, selection and verification of real decoding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from specattn_jax.decoding import loop
from specattn_jax.decoding.forced import Forced
from specattn_jax.decoding.protocol import Models, WindowRecord, check_window
from specattn_jax.decoding.state import DecodeState
from specattn_jax.errors import UserError
from specattn_jax.evaluation.attention import mass_read
from specattn_jax.models.cache import Reach
from specattn_jax.models.transformer import LanguageModel
from specattn_jax.runtime.faults import unsound
from specattn_jax.runtime.session import Session
from specattn_jax.selection.protocol import Selection
from specattn_jax.selection.reads import head_shares

# Token ids of B documents of one length.
Documents: TypeAlias = Sequence[Sequence[int] | Int[np.ndarray, " n"]] | Int[np.ndarray, "B n"]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What reading documents cost, and how well they were predicted. B documents of one length.

    Attributes:
        tokens: tokens scored per document.
        nll: mean negative log-likelihood per token and document, in nats.
        kl: mean KL(full || this) of the next-token distributions, in nats; None without a reference.
        top1: how often the likeliest token is the full target's; None without a reference.
        read: share of the past that each layer read, averaged over windows and kv heads.
        head_read: the same for each kv head.
        mass: share of its own attention mass that each layer read; None unless it was measured.
        hidden: the target's hidden states before every scored token, window by window: a reference for other readings;
            None where many selections were read together.
    """

    tokens: int
    nll: Float[np.ndarray, " B"]
    kl: Float[np.ndarray, " B"] | None
    top1: Float[np.ndarray, " B"] | None
    read: Float[np.ndarray, "B L"]
    head_read: Float[np.ndarray, "B L K"]
    mass: Float[np.ndarray, "B L"] | None
    hidden: Float[Array, "windows B W D"] | None

    @property
    def perplexity(self) -> float:
        """Over all documents."""
        return float(np.exp(self.nll.mean()))

    @property
    def kv_reduction(self) -> float:
        """Share of the target's cache reads saved."""
        return float(1.0 - self.read.mean())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Score:
    """Scores the tokens of each forced window, and keeps what was read.

    Attributes:
        target: for its logits.
        first: entries in the caches before the first window.
        reference: hidden states of a dense reading, to compare distributions with.
        measure_mass: whether to measure the attention mass that is read, at the cost of attending densely too.
        keep_hidden: whether hidden states are kept.
    """

    target: LanguageModel
    first: Int32[Array, ""]
    reference: Float[Array, "windows B W D"] | None
    measure_mass: bool = dataclasses.field(metadata={"static": True})
    keep_hidden: bool = dataclasses.field(metadata={"static": True})

    def __call__(self, record: WindowRecord) -> dict[str, Array]:
        """Sums over the window's tokens."""
        layers, cache = record.seen.layers, record.seen.cache
        scored, given = record.hidden[:, :-1], record.verdict.tokens
        log_probs = jax.nn.log_softmax(self.target.logits(scored))
        found = {
            "nll": -jnp.sum(jnp.take_along_axis(log_probs, given[..., None], axis=-1), axis=(1, 2)),
            "read": record.read,
            "head_read": head_shares(record.seen),
        }
        if self.reference is not None:
            index = (record.seen.past[0] - self.first) // given.shape[1]
            wanted = jax.nn.log_softmax(self.target.logits(self.reference[index]))
            found["kl"] = jnp.sum(jnp.exp(wanted) * (wanted - log_probs), axis=(1, 2))
            found["top1"] = jnp.sum(jnp.argmax(wanted, axis=-1) == jnp.argmax(log_probs, axis=-1), axis=1)
        if self.measure_mass:
            masses = [mass_read(index, seen.q, cache, seen.plan) for index, seen in enumerate(layers)]
            found["mass"] = jnp.stack(masses, axis=1)
        return {**found, "hidden": scored} if self.keep_hidden else found


def read_documents(
    target: LanguageModel,
    draft: LanguageModel,
    selection: Selection | None,
    documents: Documents,
    *,
    reference: Float[Array, "windows B W D"] | None = None,
    prefill_share: float = 0.1,
    window: int = 5,
    measure_mass: bool = False,
    draft_reach: Reach | None = None,
) -> Reading:
    """Prefills the first part of every document densely and reads the rest in teacher-forced windows.

    Up to W - 1 tokens at the end that fill no window are not scored.

    Args:
        target: the target.
        draft: the draft.
        selection: what the target reads; None reads everything, without drafting.
        documents: token ids, all of one length.
        reference: `hidden` of a dense reading of the same documents, to compare distributions with.
        prefill_share: share of each document that is prefilled.
        window: W.
        measure_mass: whether to measure the attention mass that is read, at the cost of attending densely too.
        draft_reach: how far back the draft sees while it prefills; None is everything.

    Raises:
        UserError: the documents are too short for one window after the prefill, or longer than a model's context, or
            the target's logits are NaN or infinite.
    """
    models = Models(target, draft if selection is not None else None)
    cut = _cut(models, documents, prefill_share, window)
    session, strategy = Session(models, draft_reach=draft_reach), Forced(cut.text, selection, window)
    state = session.start(strategy, session.prefill(cut.prompts, cut.text.shape[1], window=window))
    keep = _Score(target, state.target_cache.lengths[0], reference, measure_mass, keep_hidden=True)
    _, kept = session.watch(strategy, state, cut.windows, keep)
    return _checked(_summary(window, kept), target, documents)


def read_together(
    target: LanguageModel,
    draft: LanguageModel,
    selections: Sequence[Selection],
    documents: Documents,
    *,
    reference: Float[Array, "windows B W D"],
    prefill_share: float = 0.1,
    window: int = 5,
) -> list[Reading]:
    """`read_documents` for selections that differ only in their arrays: one compilation, and one batch of all of them.

    Pays on an accelerator; the memory for caches grows with the number of selections.

    Args:
        target: the target.
        draft: the draft.
        selections: of one kind, with equal shapes and static fields.
        documents: token ids, all of one length.
        reference: `hidden` of a dense reading of the same documents.
        prefill_share: share of each document that is prefilled.
        window: W.

    Returns:
        One reading for each selection, without hidden states.

    Raises:
        UserError: as `read_documents`.
    """
    models = Models(target, draft)
    cut = _cut(models, documents, prefill_share, window)
    state = Session(models).prefill(cut.prompts, cut.text.shape[1], window=window)
    keep = _Score(target, state.target_cache.lengths[0], reference, measure_mass=False, keep_hidden=False)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *selections)
    kept = _watch_each(stacked, models, state, cut.text, keep, window=window, windows=cut.windows)
    readings = [_summary(window, jax.tree.map(lambda x, i=index: x[i], kept)) for index in range(len(selections))]
    return [_checked(reading, target, documents) for reading in readings]


@functools.partial(jax.jit, static_argnames=("window", "windows"))
def _watch_each(
    stacked: Selection,
    models: Models,
    state: DecodeState,
    text: Int32[Array, "B n"],
    keep: _Score,
    *,
    window: int,
    windows: int,
) -> dict[str, Array]:
    """What is kept of forced windows, along the first axis of a selection's arrays."""

    def one(selection: Selection) -> dict[str, Array]:
        strategy = Forced(text, selection, window)
        kept: dict[str, Array] = loop.watch(strategy, models, strategy.start(models, state), keep, windows=windows)[1]
        return kept

    return jax.vmap(one)(stacked)


class _Cut(NamedTuple):
    """Documents, cut into what is prefilled and what is read in windows.

    Attributes:
        prompts: what is prefilled.
        text: the rest.
        windows: windows read.
    """

    prompts: list[list[int]]
    text: Int32[Array, "B n"]
    windows: int


def _cut(models: Models, documents: Documents, prefill_share: float, window: int) -> _Cut:
    """Cuts the documents.

    Raises:
        UserError: they are too short or too long, or the window is impossible.
    """
    check_window(window)
    tokens = np.asarray(documents, np.int32)
    length = tokens.shape[1]
    prompt = max(2, round(length * prefill_share))
    limit = min(model.config.max_context for model in (models.target, models.draft) if model is not None)
    if not prompt + window + 1 <= length <= limit:
        raise UserError(
            f"context is {length}; expected at least {prompt + window + 1} tokens, for one window after the prefill, "
            f"and at most the models' {limit}."
        )
    return _Cut(tokens[:, :prompt].tolist(), jnp.asarray(tokens[:, prompt:]), (length - prompt - 1) // window)


def _checked(reading: Reading, target: LanguageModel, documents: Documents) -> Reading:
    """The reading, if it consists of numbers.

    Raises:
        UserError: the target computes none.
    """
    bad = ~np.isfinite(np.asarray(reading.nll))
    if bad.any():
        index = int(np.argmax(bad))
        raise unsound("target", target, f"in document {index + 1}", np.asarray(documents)[index].tolist())
    return reading


def _summary(window: int, kept: dict[str, Any]) -> Reading:
    """Means over windows and tokens."""
    hidden = kept.get("hidden")
    windows, count = len(kept["nll"]), len(kept["nll"]) * window
    host = {name: np.asarray(jnp.sum(value, axis=0)) for name, value in kept.items() if name != "hidden"}
    return Reading(
        tokens=count,
        nll=host["nll"] / count,
        kl=host["kl"] / count if "kl" in host else None,
        top1=host["top1"] / count if "top1" in host else None,
        read=host["read"] / windows,
        head_read=host["head_read"] / windows,
        mass=host["mass"] / windows if "mass" in host else None,
        hidden=hidden,
    )
