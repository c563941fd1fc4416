"""One decoder for draft and target: a Flax NNX module, split once into structure and weights.

Under jit everything is a value: `LanguageModel` carries the weights, `KVCache` what was read, and `forward` returns
both the hidden states and the new cache.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int32, PRNGKeyArray
from specattn_kernels import Implementation, Scores, SelectionPlan, decode_attention, sparse_decode_attention

from specattn_jax.models.cache import KVCache, append
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.layers import Block, RMSNorm, Rotation, rotation

Attend = Callable[
    [int, Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]], Float[Array, "B T N H"]
]


class Transformer(nnx.Module):
    """Llama-family decoder. Layers are unrolled: each has weights, cache and plan of its own."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(stddev=0.02)
        self.embedding = nnx.Param(init(rngs.params(), (config.vocab_size, config.embed_dim), dtype))
        self.layers = nnx.List([Block(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)])
        self.final_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype=dtype)
        # Laid out like the embedding, [V, D], so that tied and untied outputs are read alike.
        self.output = (
            None
            if config.tie_embeddings
            else nnx.Param(init(rngs.params(), (config.vocab_size, config.embed_dim), dtype))
        )

    def __call__(self, tokens: Int32[Array, "B T"], by: Rotation, attend: Attend) -> Float[Array, "B T D"]:
        """Normalised hidden states of the T tokens; `attend(layer, q, k, v)` supplies each layer's attention."""
        x = self.embedding[...][tokens]
        for index, block in enumerate(self.layers):
            q, k, v = block.before(x, by)
            x = block.after(x, attend(index, q, k, v))
        return self.final_norm(x)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Next-token logits in float32."""
        return jnp.einsum("...d,vd->...v", hidden, self.output_matrix(), preferred_element_type=jnp.float32)

    def output_matrix(self) -> Float[Array, "V D"]:
        """What turns hidden states into logits: the embedding where a model has no matrix of its own."""
        return (self.embedding if self.output is None else self.output)[...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A decoder split at the boundary: its weights are a pytree, its structure is static.

    Attributes:
        params: the weights.
        graphdef: the module without its weights.
        config: shape and variant.
    """

    params: nnx.State[Any, Any]
    graphdef: nnx.GraphDef[Transformer] = dataclasses.field(metadata={"static": True})
    config: ModelConfig = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of weights and cache."""
        return jnp.dtype(jax.tree.leaves(self.params)[0].dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.params))

    def module(self) -> Transformer:
        """The module with its weights, to be called inside a traced function."""
        return nnx.merge(self.graphdef, self.params)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Next-token logits of hidden states, in float32."""
        return self.module().logits(hidden)


def abstract_model(config: ModelConfig, dtype: DTypeLike) -> LanguageModel:
    """The model with `jax.ShapeDtypeStruct` leaves in place of weights: what a loader has to fill."""
    model = nnx.eval_shape(lambda: Transformer(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model)
    return LanguageModel(params=params, graphdef=graphdef, config=config)


def init_model(config: ModelConfig, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32) -> LanguageModel:
    """A model with random weights, for tests, benchmarks and training."""

    @functools.partial(jax.jit, static_argnums=0)
    def make(config: ModelConfig, key: PRNGKeyArray) -> nnx.State[Any, Any]:
        return nnx.state(Transformer(config, dtype=dtype, rngs=nnx.Rngs(params=key)))

    return dataclasses.replace(abstract_model(config, dtype), params=make(config, key))


# Decides what a layer reads once its queries are there: takes them, the keys with the new tokens, and the past lengths.
LayerPlanner: TypeAlias = Callable[
    [Float[Array, "B T N H"], Float[Array, "B K S H"], Int32[Array, " B"]], SelectionPlan
]
# The slots of the past that a layer reads; None is all of them.
LayerChoice: TypeAlias = SelectionPlan | LayerPlanner | None
# Attends in the place of the model's own attention, for evaluation: takes the queries, the keys and values with the new
# tokens, what to read of the past, and the lengths with the new tokens; gives the output and what to keep besides.
LayerReader: TypeAlias = Callable[
    [
        Float[Array, "B T N H"],
        Float[Array, "B K S H"],
        Float[Array, "B K S H"],
        SelectionPlan | None,
        Int32[Array, " B"],
    ],
    tuple[Float[Array, "B T N H"], Any],
]


class Look(NamedTuple):
    """How a layer's tokens looked at the cache: their queries, and the log-sum-exp of their scaled logits."""

    q: Float[Array, "B T N H"]
    lse: Float[Array, "B T N"]


class ForwardOutput(NamedTuple):
    """What one cached forward returns.

    Attributes:
        hidden: normalised hidden states of the T tokens.
        cache: the cache with the T tokens appended.
        observed: what `observe` returned, one value per observed layer, in the order of the layers.
        plans: what each layer read; None is everything. Empty if no layer was given a choice.
        kept: what `reader` kept, one value per layer; empty without a reader.
        looks: how each layer's tokens looked at what they read; empty unless wanted.
    """

    hidden: Float[Array, "B T D"]
    cache: KVCache
    observed: tuple[Array, ...]
    plans: tuple[SelectionPlan | None, ...]
    kept: tuple[Any, ...]
    looks: tuple[Look, ...]


def forward(
    model: LanguageModel,
    tokens: Int32[Array, "B T"],
    cache: KVCache,
    *,
    plans: Sequence[LayerChoice] | None = None,
    observe_layers: tuple[int, ...] = (),
    observe: Callable[[Float[Array, "B 1 N S"]], Array] | None = None,
    reader: LayerReader | None = None,
    keep_looks: bool = False,
    implementation: Implementation | None = None,
) -> ForwardOutput:
    """Reads T more tokens: appends their keys and values, attends to the cache, returns hidden states.

    Args:
        model: draft or target.
        tokens: the next T tokens of every sequence, at positions `cache.lengths` onwards. There must be room for them.
        cache: what was read so far.
        plans: one choice per layer. Without it every layer is dense.
        observe_layers: dense layers whose softmax weights are shown to `observe`.
        observe: receives the newest token's softmax weights `[B, 1, N, S]` in float32, and returns what to keep of
            them; reducing here keeps them from piling up over layers.
        reader: attends in the place of the model's own attention, for evaluation; nothing is observed then.
        keep_looks: whether to keep how the tokens looked at what they read.
        implementation: backend of the attention ops; None lets the library choose.

    Returns:
        Hidden states, the longer cache, and what was observed or kept.
    """
    config, module = model.config, model.module()
    starts, num_new = cache.lengths, tokens.shape[1]
    lengths = starts + num_new
    attend_to_all = functools.partial(decode_attention, implementation=implementation)
    attend_to_plan = functools.partial(sparse_decode_attention, implementation=implementation)
    keys, values = list(cache.k), list(cache.v)
    observed: list[Array] = []
    used: list[SelectionPlan | None] = []
    kept: list[Any] = []
    looks: list[Look] = []

    def attend(
        layer: int, q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
    ) -> Float[Array, "B T N H"]:
        keys[layer] = append(keys[layer], k, starts)
        values[layer] = append(values[layer], v, starts)
        choice = plans[layer] if plans is not None else None
        plan = choice(q, keys[layer], starts) if callable(choice) else choice
        if plans is not None:
            used.append(plan)
        if reader is not None:
            out, rest = reader(q, keys[layer], values[layer], plan, lengths)
            kept.append(rest)
            return out
        if plan is not None:
            result = attend_to_plan(q, keys[layer], values[layer], plan, lengths, return_lse=keep_looks)
        else:
            watched: Scores = "newest" if observe is not None and layer in observe_layers else False
            result = attend_to_all(q, keys[layer], values[layer], lengths, return_scores=watched, return_lse=keep_looks)
        if result.lse is not None:
            looks.append(Look(q, result.lse))
        if observe is not None and result.scores is not None:
            observed.append(observe(result.scores))
        return result.out

    positions = starts[:, None] + jnp.arange(num_new, dtype=jnp.int32)
    hidden = module(tokens, rotation(config, positions), attend)
    grown = KVCache(tuple(keys), tuple(values), lengths)
    return ForwardOutput(hidden, grown, tuple(observed), tuple(used), tuple(kept), tuple(looks))


@functools.partial(jax.jit, static_argnames=("chunk",), donate_argnames=("cache", "last"))
def _prefill_chunks(
    model: LanguageModel,
    tokens: Int32[Array, "B padded"],
    prompt_lengths: Int32[Array, " B"],
    cache: KVCache,
    last: Float[Array, "B D"],
    first: Int32[Array, ""],
    stop: Int32[Array, ""],
    *,
    chunk: int,
) -> tuple[Float[Array, "B D"], KVCache]:
    """Reads chunks `first` to `stop - 1`; keeps the hidden state of each sequence whose prompt ends in one of them."""

    def read(
        index: Int32[Array, ""], carry: tuple[Float[Array, "B D"], KVCache]
    ) -> tuple[Float[Array, "B D"], KVCache]:
        last, cache = carry
        start = index * chunk
        hidden, cache, *_ = forward(model, jax.lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1), cache)
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
    progress: Callable[[int], None] | None = None,
) -> tuple[Float[Array, "B D"], KVCache]:
    """Reads whole prompts in chunks of a fixed size.

    Prompts are padded on the right: what the padding writes lies beyond `prompt_lengths`, where nobody attends and the
    next tokens overwrite it.

    Args:
        model: draft or target.
        tokens: prompts, right-padded to a multiple of `chunk` that the cache has room for.
        prompt_lengths: true length of each prompt, at least 1.
        cache: an empty cache; it is donated.
        chunk: tokens read at a time.
        progress: told the number of positions read: 0 once everything is compiled, then after every chunk.

    Returns:
        The hidden state of each prompt's last token, and the filled cache.

    Raises:
        ValueError: the padded prompts are no multiple of `chunk` or do not fit the cache.
    """
    batch, padded = tokens.shape
    if padded % chunk or padded > cache.num_slots:
        raise ValueError(
            f"tokens: padded to {padded} positions; expected a multiple of chunk={chunk} of at most "
            f"{cache.num_slots} slots."
        )
    last = jnp.zeros((batch, model.config.embed_dim), model.dtype)
    count = padded // chunk
    # Without someone to tell, one call reads everything; with, an empty call first separates compiling from reading.
    steps = [(0, count)] if progress is None else [(0, 0), *((index, index + 1) for index in range(count))]
    for first, stop in steps:
        last, cache = _prefill_chunks(
            model, tokens, prompt_lengths, cache, last, jnp.int32(first), jnp.int32(stop), chunk=chunk
        )
        if progress is not None:
            last.block_until_ready()
            progress(stop * chunk)
    # A copy: two caches that shared the caller's buffer could not both be donated.
    return last, cache.at_lengths(jnp.array(prompt_lengths, copy=True))


def read_sequence(model: LanguageModel, tokens: Int32[Array, "B T"], attend: Attend) -> Float[Array, "B T D"]:
    """Hidden states of whole sequences without a cache, for calibration and training.

    Args:
        model: draft or target.
        tokens: whole sequences, from position 0.
        attend: attention of each layer: given its index and the queries, keys and values of all T tokens.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return model.module()(tokens, rotation(model.config, positions), attend)


def causal_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
) -> Float[Array, "B T N H"]:
    """Dense attention of whole sequences; can be differentiated."""
    # cuDNN holds no T x T weights, but knows only half precision.
    fused = jax.default_backend() == "gpu" and q.dtype != jnp.float32
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn" if fused else None)


@jax.jit
def likeliest_next(model: LanguageModel, tokens: Int32[Array, "B T"]) -> Int32[Array, "B T"]:
    """The model's likeliest next token after every prefix of whole sequences."""
    hidden = read_sequence(model, tokens, lambda _, q, k, v: causal_attention(q, k, v))
    # Row by row: the logits of all rows at once would be the largest array of all.
    return jax.lax.map(lambda row: jnp.argmax(model.logits(row), axis=-1).astype(jnp.int32), hidden)
