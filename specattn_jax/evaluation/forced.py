"""Teacher-forced reading: known text through the draft, selection and verification of real decoding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from specattn_jax.cache import init_cache
from specattn_jax.model import LanguageModel, prefill
from specattn_jax.selection import Selector
from specattn_jax.speculative import DecodeSettings, DecodeState, read_window, start_decoding


class ForcedRead(NamedTuple):
    """What reading documents cost and how well they were predicted.

    Attributes:
        nll: mean negative log-likelihood per token, in nats, over all documents.
        kv_reduction: share of the target's cache reads saved.
        tokens: tokens scored.
    """

    nll: float
    kv_reduction: float
    tokens: int


@functools.partial(jax.jit, static_argnames=("settings", "prompt"), donate_argnames=("state",))
def _read_windows(
    target: LanguageModel,
    draft: LanguageModel,
    selector: Selector | None,
    state: DecodeState,
    tokens: Int32[Array, "B length"],
    *,
    settings: DecodeSettings,
    prompt: int,
) -> tuple[DecodeState, Float[Array, ""]]:
    """Reads on after the prompt, window by window; the state then, and the summed log-likelihood of the tokens."""
    window = settings.window
    count = (tokens.shape[1] - prompt - 1) // window
    keys = state.keys

    def step(state: DecodeState, index: Int32[Array, ""]) -> tuple[DecodeState, Float[Array, ""]]:
        # Committed so far: prompt + 1 + index * W tokens, the newest not yet in the target's cache.
        at = prompt - 1 + index * window
        here = jax.lax.dynamic_slice_in_dim(tokens, at, window + 2, axis=1)
        state = dataclasses.replace(state, last=here[:, :2])
        read = read_window(target, draft, selector, state, keys, settings, forced=here[:, 2:])
        log_probs = jax.nn.log_softmax(target.logits(read.hidden[:, :-1]))
        picked = jnp.take_along_axis(log_probs, here[:, 2:, None], axis=-1)
        lengths = state.target_cache.lengths + window
        before = state.statistics
        state = dataclasses.replace(
            state,
            target_cache=read.cache.at_lengths(lengths),
            draft_cache=read.drafted.cache,
            statistics=dataclasses.replace(before, windows=before.windows + 1, read=before.read + read.read),
        )
        return state, jnp.sum(picked)

    state, sums = jax.lax.scan(step, state, jnp.arange(count))
    return state, jnp.sum(sums)


def read_documents(
    target: LanguageModel,
    draft: LanguageModel,
    selector: Selector | None,
    documents: Sequence[Sequence[int]],
    *,
    prefill_share: float = 0.1,
    window: int = 5,
) -> ForcedRead:
    """Prefills the first part of every document densely and reads the rest in teacher-forced windows.

    Args:
        target: the target.
        draft: the draft.
        selector: what the target reads; None reads everything.
        documents: token ids, all of one length.
        prefill_share: share of each document that is prefilled.
        window: W.
    """
    tokens = jnp.asarray(np.asarray(documents, np.int32))
    batch, length = tokens.shape
    prompt = max(2, round(length * prefill_share))
    chunk = 256
    padded = -(-prompt // chunk) * chunk
    slots = -(-max(padded, length + window + 1) // 128) * 128
    head = jnp.pad(tokens[:, :prompt], ((0, 0), (0, padded - prompt)))
    lengths = jnp.full((batch,), prompt, jnp.int32)
    settings = DecodeSettings("speculative" if selector is None else "specattn", window)
    caches = []
    for model in (target, draft):
        hidden, cache = prefill(model, head, lengths, init_cache(model.config, batch, slots, model.dtype), chunk=chunk)
        caches.append((hidden, cache))
    state = start_decoding(
        target,
        caches[0][0],
        caches[0][1],
        caches[1][1],
        tokens[:, prompt - 1],
        jnp.full((batch,), length, jnp.int32),
        jax.random.split(jax.random.key(0), batch),
        settings=settings,
        room=1,
    )
    state, total = _read_windows(target, draft, selector, state, tokens, settings=settings, prompt=prompt)
    windows = (length - prompt - 1) // window
    read = float(jnp.mean(state.statistics.read)) / windows
    return ForcedRead(-float(total) / (windows * window * batch), 1.0 - read, windows * window * batch)
