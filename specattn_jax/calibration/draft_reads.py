"""What it costs that a draft leaves out a part of its own cache: measured at the end of calibration, for each pair."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from specattn_jax.decoding import loop
from specattn_jax.decoding.forced import Forced
from specattn_jax.decoding.protocol import Models
from specattn_jax.decoding.state import DecodeState, begin
from specattn_jax.models.cache import KVCache, round_up
from specattn_jax.models.forward import next_token_kl, prefill
from specattn_jax.models.sharding import fetch
from specattn_jax.models.transformer import LanguageModel
from specattn_jax.selection.alignment import Alignment
from specattn_jax.selection.make import make_selection
from specattn_jax.selection.own import OwnReads
from specattn_jax.selection.policy import SelectionPolicy

SHARES = (1.0, 0.25, 0.1, 0.05)
SAVING = 0.75
# Tokens of a prefill at a time; a cache has a multiple of so many slots.
_CHUNK, _SLOTS = 512, 128


def measured_shares(past: int) -> tuple[float, ...]:
    """The `SHARES` that a draft can read of so many entries: of few it reads no less than `LEAST_DRAFT_ENTRIES`."""
    return tuple(dict.fromkeys(OwnReads(share).share_of(past) for share in SHARES))


def measure_draft_reads(
    target: LanguageModel,
    draft: LanguageModel,
    alignment: Alignment,
    policy: SelectionPolicy,
    tokens: Int32[Array, "B T"],
    *,
    window: int,
    windows: int,
) -> Alignment:
    """The alignment with the KL of reading when the draft reads a share of its cache.

    The end of each passage is read in the windows of real decoding, at a saving of 75 %, once for every share.

    Args:
        target: the target.
        draft: the draft.
        alignment: fitted on other passages.
        policy: the mixture policy.
        tokens: passages.
        window: W.
        windows: windows of each passage, if they take no more than its second half.

    Returns:
        The alignment as it was where the draft can leave out nothing, because the passages are short or the sources
        no kv heads.
    """
    batch, count = tokens.shape
    windows = min(windows, (count // 2 - 1) // window)
    first = count - windows * window - 1
    shares = measured_shares(first)
    if alignment.granularity != "kv_head" or len(shares) == 1 or windows < 1:
        return alignment
    models, text = Models(target, draft), tokens[:, first:]
    target_cache, draft_cache = (_prefilled(model, tokens, first) for model in (target, draft))
    state = begin(
        target_cache,
        draft_cache,
        tokens[:, first - 1 : first + 1],
        jnp.full((batch,), count, jnp.int32),
        jax.random.split(jax.random.key(0), batch),
        room=count + window + 1,
    )
    dense = _read(Forced(text, None, window), models, state, windows=windows)
    mass, losses = alignment.mass_for_saving(SAVING), []
    for share in shares:
        chosen = policy.with_draft_reads(share)
        selection = make_selection(chosen, alignment, mass, target.config, draft.config)
        read = _read(Forced(text, selection, window), models, state, windows=windows)
        losses.append(max(0.0, float(fetch(_mean_kl(target, dense, read)))))
    return dataclasses.replace(
        alignment, draft_shares=jnp.asarray(shares, jnp.float32), draft_kl=jnp.asarray(losses, jnp.float32)
    )


def _prefilled(model: LanguageModel, tokens: Int32[Array, "B T"], first: int) -> KVCache:
    """The cache of a model that read the first tokens of each passage, with room for the others and a window more."""
    batch, count = tokens.shape
    padded = round_up(first, _CHUNK)
    slots = round_up(max(padded, count + _SLOTS), _SLOTS)
    prompts = jnp.pad(tokens[:, :first], ((0, 0), (0, padded - first)))
    empty = KVCache.empty(model.config, batch, slots, model.dtype, split=model.split)
    return prefill(model, prompts, jnp.full((batch,), first, jnp.int32), empty, chunk=_CHUNK)[1]


@functools.partial(jax.jit, static_argnames=("windows",))
def _read(strategy: Forced, models: Models, state: DecodeState, *, windows: int) -> Float[Array, "windows B W D"]:
    """Hidden states of forced windows; the state is not donated, as others begin with it too."""
    state = strategy.start(models, state)
    read: Float[Array, "windows B T D"] = loop.watch(strategy, models, state, loop.KeepHidden(), windows=windows)[1]
    # The last token of a window predicts one of the next.
    return read[:, :, :-1]


@jax.jit
def _mean_kl(
    target: LanguageModel, wanted: Float[Array, "windows B W D"], found: Float[Array, "windows B W D"]
) -> Float[Array, ""]:
    """Mean KL of the next-token distributions, in nats."""
    # Window by window: the logits of all would be the largest array of all.
    return jnp.mean(jax.lax.map(lambda pair: next_token_kl(target, *pair), (wanted, found)))
