"""Drift: how errors of sparse reading add up in the cache while a pair generates freely."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from specattn_jax.decoding.loop import KeepHidden
from specattn_jax.decoding.protocol import DecodeSettings, Models, Strategy
from specattn_jax.decoding.sampling import Sampling
from specattn_jax.decoding.speculative import SpecAttn, Speculative
from specattn_jax.decoding.state import DecodeState
from specattn_jax.errors import UserError
from specattn_jax.loading.pair import ModelPair
from specattn_jax.models.cache import KVCache
from specattn_jax.models.forward import forward, next_token_kl
from specattn_jax.models.transformer import LanguageModel
from specattn_jax.runtime.session import Session
from specattn_jax.selection.protocol import Selection

_CHUNK = 128
# Positions whose distributions are compared at a time.
_POSITIONS = 16


@dataclasses.dataclass(frozen=True)
class Drift:
    """What generating freely did to the distributions. B prompts, n new tokens each.

    Attributes:
        kl: KL(clean || sparse) of the distribution that each new token was verified with, in nats, from the second new
            token on. Clean is the same target over the same prefix, all of it read densely.
        tokens: the new tokens.
        read: share of the cache that was read, averaged over layers and windows.
        accepted: drafted tokens accepted per window.
    """

    kl: Float[np.ndarray, "B n-1"]
    tokens: Int32[np.ndarray, "B n"]
    read: Float[np.ndarray, " B"]
    accepted: Float[np.ndarray, " B"]

    def to_json(self) -> dict[str, Any]:
        """Plain lists."""
        return {field.name: getattr(self, field.name).tolist() for field in dataclasses.fields(self)}


def measure_drift(
    pair: ModelPair,
    selection: Selection | None,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    window: int = 5,
    temperature: float = 1.0,
    seed: int = 0,
) -> Drift:
    """Lets the pair continue prompts, and compares each verification with a dense pass over what was written.

    Args:
        pair: the models.
        selection: what the target reads; None is everything, which leaves rounding alone.
        prompts: token ids, all of one length.
        new_tokens: tokens to generate; end tokens do not end a text.
        window: W.
        temperature: of the draws; greedy text (0) soon repeats itself, and repetition is easy to predict.
        seed: of the draws.

    Raises:
        UserError: prompt and new tokens do not fit a model's context, or there are fewer than 2 new tokens.
    """
    prompt = len(prompts[0])
    limit = min(pair.target.config.max_context, pair.need_draft().config.max_context)
    if new_tokens < 2 or prompt + new_tokens > limit:
        raise UserError(
            f"drift_tokens is {new_tokens}; expected at least 2, and at most {limit - prompt} after a prompt of "
            f"{prompt} tokens."
        )
    settings = DecodeSettings(Sampling(temperature))
    strategy = Speculative(settings=settings, window=window)
    if selection is not None:
        strategy = SpecAttn(selection, settings, window)
    session = Session(Models(pair.target, pair.need_draft()))
    keys = jax.random.split(jax.random.key(seed), len(prompts))
    state = session.prefill(prompts, new_tokens, settings=settings, window=window, keys=keys)
    state, hidden = _generate(session, strategy, state, new_tokens)
    tokens = jnp.asarray(np.asarray(prompts, np.int32))
    output, counts = state.output[:, :new_tokens], jax.device_get(state.statistics)
    clean = read_densely(pair.target, jnp.concatenate([tokens, output], axis=1))
    # The hidden state that decides token i is that of the token before it.
    kl = _compare(pair.target, clean[:, prompt : prompt + new_tokens - 1], hidden[:, 1:new_tokens])
    return Drift(
        kl=np.asarray(kl),
        tokens=np.asarray(output),
        read=counts.read.mean(axis=1) / counts.windows,
        accepted=counts.accepted / counts.windows,
    )


def _generate(
    session: Session, strategy: Strategy, state: DecodeState, room: int
) -> tuple[DecodeState, Float[Array, "B places D"]]:
    """Decodes to the end; besides, the hidden state that each new token was verified with, at the token's place."""
    state = session.start(strategy, state)
    target = session.models.target
    kept = jnp.zeros((state.limit.shape[0], room + strategy.window + 1, target.config.embed_dim), target.dtype)
    while not bool(jnp.all(state.done)):
        emitted = jnp.array(state.emitted, copy=True)
        state, hidden = session.watch(strategy, state, 1, KeepHidden())
        # What is not committed is overwritten by the next window.
        kept = _write(kept, hidden[0], emitted)
    return state, kept


@functools.partial(jax.jit, donate_argnames=("kept",))
def _write(
    kept: Float[Array, "B places D"], hidden: Float[Array, "B T D"], at: Int32[Array, " B"]
) -> Float[Array, "B places D"]:
    """Writes a window's hidden states at each sequence's own place."""
    return jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at, 0)))(kept, hidden, at)


@jax.jit
def read_densely(target: LanguageModel, tokens: Int32[Array, "B length"]) -> Float[Array, "B length D"]:
    """Hidden states of whole texts, read densely chunk by chunk."""
    batch, length = tokens.shape
    count = -(-length // _CHUNK)
    padded = jnp.pad(tokens, ((0, 0), (0, count * _CHUNK - length)))
    cache = KVCache.empty(target.config, batch, count * _CHUNK, target.dtype)

    def read(cache: KVCache, chunk: Int32[Array, "B chunk"]) -> tuple[KVCache, Float[Array, "B chunk D"]]:
        out = forward(target, chunk, cache)
        return out.cache, out.hidden

    hidden = jax.lax.scan(read, cache, jnp.moveaxis(padded.reshape(batch, count, _CHUNK), 1, 0))[1]
    return jnp.moveaxis(hidden, 0, 1).reshape(batch, count * _CHUNK, -1)[:, :length]


@jax.jit
def _compare(target: LanguageModel, clean: Float[Array, "B n D"], sparse: Float[Array, "B n D"]) -> Float[Array, "B n"]:
    """KL(clean || sparse) of the next-token distributions of hidden states, position by position."""
    by_position = (jnp.moveaxis(clean, 1, 0), jnp.moveaxis(sparse, 1, 0))
    return jax.lax.map(lambda pair: next_token_kl(target, *pair), by_position, batch_size=_POSITIONS).T


def drift_row(label: dict[str, Any], parts: Sequence[dict[str, Any]], prompt: int) -> dict[str, Any]:
    """One line of the plot: the mean over texts at every position, with its standard error.

    Args:
        label: what the line stands for.
        parts: `Drift.to_json` of each batch of prompts.
        prompt: tokens of each prompt.
    """
    kl = np.concatenate([np.asarray(part["kl"], np.float64) for part in parts])
    texts, count = kl.shape
    quarter = max(1, count // 4)
    error = kl.std(axis=0, ddof=1) / np.sqrt(texts) if texts > 1 else None
    return {
        **label,
        "prompt_tokens": prompt,
        "new_tokens": count + 1,
        "documents": texts,
        "kv_reduction": 1.0 - float(np.mean([value for part in parts for value in part["read"]])),
        "accepted_per_window": float(np.mean([value for part in parts for value in part["accepted"]])),
        "kl": float(kl.mean()),
        "kl_first_quarter": float(kl[:, :quarter].mean()),
        "kl_last_quarter": float(kl[:, -quarter:].mean()),
        "kl_by_position": kl.mean(axis=0).tolist(),
        "kl_by_position_se": None if error is None else error.tolist(),
    }
