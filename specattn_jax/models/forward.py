"""Forward passes: tokens in, hidden states and a longer cache out; whole prompts; whole sequences without a cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32
from specattn_kernels import lay

from specattn_jax.models.cache import KVCache, Reach
from specattn_jax.models.layers import rotation
from specattn_jax.models.transformer import Attend as AttendSequence
from specattn_jax.models.transformer import LanguageModel

# Up to so many tokens all weights of a layer are held at once; beyond, those of so many queries.
_WHOLE_TOKENS, _BLOCK_TOKENS = 2048, 512


class Attended(NamedTuple):
    """What attending gave in one layer.

    Attributes:
        out: the attention output.
        note: whatever the one who attended wants to keep; must be made of arrays.
    """

    out: Float[Array, "B T N H"]
    note: Any = None


# Attends in one layer: takes the layer, the queries of the T new tokens, and the cache they were appended to.
Attend: TypeAlias = Callable[[int, Float[Array, "B T N H"], KVCache], Attended]


def attend_to_all(layer: int, q: Float[Array, "B T N H"], cache: KVCache) -> Attended:
    """Attends to everything, and notes nothing."""
    return Attended(cache.attend(layer, q).out)


class Read(NamedTuple):
    """What one cached forward pass returns.

    Attributes:
        hidden: normalised hidden states of the T tokens.
        cache: the cache with the T tokens.
        notes: what was noted while attending, layer by layer.
    """

    hidden: Float[Array, "B T D"]
    cache: KVCache
    notes: tuple[Any, ...]


def forward(model: LanguageModel, tokens: Int32[Array, "B T"], cache: KVCache, attend: Attend = attend_to_all) -> Read:
    """Reads T more tokens: appends their keys and values, attends to the cache, returns hidden states.

    Args:
        model: draft or target.
        tokens: the next T tokens of every sequence, at positions `cache.lengths` onwards. There must be room for them.
        cache: what was read so far.
        attend: how each layer attends, and what is noted on the way; densely by default.
    """
    starts, num_new = cache.lengths, tokens.shape[1]
    grown, notes = cache, []

    def attend_layer(
        layer: int, q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
    ) -> Float[Array, "B T N H"]:
        nonlocal grown
        grown = grown.append(layer, k, v)
        out, note = attend(layer, q, grown)
        notes.append(note)
        return out

    positions = starts[:, None] + jnp.arange(num_new, dtype=jnp.int32)
    hidden = model.module()(tokens, rotation(model.config, positions), attend_layer)
    return Read(hidden, grown.at(starts + num_new), tuple(notes))


@functools.partial(jax.jit, static_argnames=("chunk", "reach"), donate_argnames=("cache", "last"))
def _prefill_chunks(
    model: LanguageModel,
    tokens: Int32[Array, "B padded"],
    prompt_lengths: Int32[Array, " B"],
    begun: Int32[Array, " B"],
    cache: KVCache,
    last: Float[Array, "B D"],
    first: Int32[Array, ""],
    stop: Int32[Array, ""],
    *,
    chunk: int,
    reach: Reach | None,
) -> tuple[Float[Array, "B D"], KVCache]:
    """Reads chunks `first` to `stop - 1`; keeps the hidden state of each sequence whose prompt ends in one of them."""

    def attend(layer: int, q: Float[Array, "B T N H"], cache: KVCache) -> Attended:
        valid = begun + prompt_lengths
        if reach is not None:
            return Attended(cache.attend_within(layer, q, reach, valid=valid).out)
        return Attended(cache.attend(layer, q, valid=valid).out)

    def read(
        index: Int32[Array, ""], carry: tuple[Float[Array, "B D"], KVCache]
    ) -> tuple[Float[Array, "B D"], KVCache]:
        last, cache = carry
        start = index * chunk
        chunk_tokens = jax.lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
        hidden, cache, _ = forward(model, chunk_tokens, cache, attend)
        end = prompt_lengths - 1 - start
        picked = jnp.take_along_axis(hidden, jnp.clip(end, 0, chunk - 1)[:, None, None], axis=1)[:, 0]
        return jnp.where(((end >= 0) & (end < chunk))[:, None], picked, last), cache

    return jax.lax.fori_loop(first, stop, read, (last, cache))


def prefill(
    model: LanguageModel,
    tokens: Int32[Array, "B padded"],
    prompt_lengths: Int32[Array, " B"],
    cache: KVCache,
    *,
    chunk: int,
    reach: Reach | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Float[Array, "B D"], KVCache]:
    """Reads whole prompts, or what is left of them, in chunks of a fixed size.

    Prompts are padded on the right: what the padding writes lies beyond their lengths, where nobody attends and the
    next tokens overwrite it.

    Args:
        model: draft or target.
        tokens: prompts, right-padded to a multiple of `chunk` that the cache has room for.
        prompt_lengths: true length of each prompt, at least 1.
        cache: what was read before, mostly nothing; it is donated.
        chunk: tokens read at a time.
        reach: how far back the tokens of a chunk see; None is everything, and does not depend on `chunk`.
        progress: told the number of positions read: 0 once everything is compiled, then after every chunk.

    Returns:
        The hidden state of each prompt's last token, and the filled cache.

    Raises:
        ValueError: the padded prompts are no multiple of `chunk` or do not fit the cache.
    """
    batch, padded = tokens.shape
    # Not the cache's own array, which is donated.
    begun = jnp.array(cache.lengths, copy=True)
    if padded % chunk or padded > cache.num_slots:
        raise ValueError(
            f"tokens: padded to {padded} positions; expected a multiple of chunk={chunk} of at most "
            f"{cache.num_slots} slots."
        )
    last = lay(cache.split, jnp.zeros((batch, model.config.embed_dim), model.dtype), "B D")
    count = padded // chunk
    # Without someone to tell, one call reads everything; with, an empty call first separates compiling from reading.
    steps = [(0, count)] if progress is None else [(0, 0), *((index, index + 1) for index in range(count))]
    for first, stop in steps:
        last, cache = _prefill_chunks(
            model,
            tokens,
            prompt_lengths,
            begun,
            cache,
            last,
            jnp.int32(first),
            jnp.int32(stop),
            chunk=chunk,
            reach=reach,
        )
        if progress is not None:
            last.block_until_ready()
            progress(stop * chunk)
    # An array of its own: two caches that shared one could not both be donated.
    return last, cache.at(begun + prompt_lengths)


def read_sequence(
    model: LanguageModel, tokens: Int32[Array, "B T"], attend: AttendSequence, *, again: bool = False
) -> Float[Array, "B T D"]:
    """Hidden states of whole sequences without a cache, for calibration and training.

    Args:
        model: draft or target.
        tokens: whole sequences, from position 0.
        attend: attention of each layer: given its index and the queries, keys and values of all T tokens.
        again: whether a backward pass works layers out again in place of keeping what is inside them.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return model.module()(tokens, rotation(model.config, positions), attend, again=again)


def causal_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
) -> Float[Array, "B T N H"]:
    """Dense attention of whole sequences; can be differentiated, in memory that grows with T alone."""
    # cuDNN holds no T x T weights, but knows only half precision.
    if jax.default_backend() == "gpu" and q.dtype != jnp.float32:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    tokens = q.shape[1]
    if tokens <= _WHOLE_TOKENS:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)
    slots = jnp.arange(tokens)

    @jax.checkpoint
    def attend(block: tuple[Array, Array]) -> Float[Array, "B t N H"]:
        rows, first = block
        visible = slots <= (first + jnp.arange(_BLOCK_TOKENS))[:, None]
        return jax.nn.dot_product_attention(rows, k, v, mask=visible[None, None])

    starts = jnp.arange(0, tokens, _BLOCK_TOKENS)
    rows = jnp.pad(q, ((0, 0), (0, -tokens % _BLOCK_TOKENS), (0, 0), (0, 0)))
    rows = jnp.moveaxis(rows.reshape(q.shape[0], len(starts), _BLOCK_TOKENS, *q.shape[2:]), 1, 0)
    out = jnp.moveaxis(jax.lax.map(attend, (rows, starts)), 0, 1)
    return out.reshape(q.shape[0], -1, *q.shape[2:])[:, :tokens]


def next_token_kl(
    model: LanguageModel, wanted: Float[Array, "*n D"], found: Float[Array, "*n D"]
) -> Float[Array, "*n"]:
    """KL(wanted || found) of the next-token distributions of hidden states, in nats."""
    full, other = (jax.nn.log_softmax(model.logits(hidden)) for hidden in (wanted, found))
    return jnp.sum(jnp.exp(full) * (full - other), axis=-1)


@jax.jit
def likeliest_next(model: LanguageModel, tokens: Int32[Array, "B T"]) -> Int32[Array, "B T"]:
    """The model's likeliest next token after every prefix of whole sequences."""
    hidden = read_sequence(model, tokens, lambda _, q, k, v: causal_attention(q, k, v))
    # Row by row: the logits of all rows at once would be the largest array of all.
    return jax.lax.map(lambda row: jnp.argmax(model.logits(row), axis=-1).astype(jnp.int32), hidden)
