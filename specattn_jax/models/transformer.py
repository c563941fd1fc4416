"""One decoder for draft and target: a Flax NNX module, split once into structure and weights.

Under jit everything is a value: `LanguageModel` carries the weights; `forward.py` reads with them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int32, PRNGKeyArray
from specattn_kernels import Split

from specattn_jax.models.config import ModelConfig
from specattn_jax.models.layers import Block, Keys, RMSNorm, Rotation

Attend = Callable[
    [int, Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]], Float[Array, "B T N H"]
]


class Transformer(nnx.Module):
    """Llama-family decoder. Layers are unrolled: each has weights, cache and plan of its own."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, keys: Keys) -> None:
        init = nnx.initializers.normal(stddev=0.02)
        self.embedding = nnx.Param(init(keys.draw(), (config.vocab_size, config.embed_dim), dtype), axes="V D")
        self.layers = nnx.List([Block(config, dtype=dtype, keys=keys) for _ in range(config.num_layers)])
        self.final_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype=dtype)
        # Laid out like the embedding, [V, D], so that tied and untied outputs are read alike.
        self.output = (
            None
            if config.tie_embeddings
            else nnx.Param(init(keys.draw(), (config.vocab_size, config.embed_dim), dtype), axes="V D")
        )

    def __call__(
        self, tokens: Int32[Array, "B T"], by: Rotation, attend: Attend, *, again: bool = False
    ) -> Float[Array, "B T D"]:
        """Normalised hidden states of the T tokens.

        Args:
            tokens: ids.
            by: rotary angles at their positions.
            attend: `attend(layer, q, k, v)` supplies each layer's attention.
            again: whether a backward pass works out what is inside a layer again in place of keeping it; `attend` must
                then have no effects.
        """
        x = self.embedding[...][tokens]
        for index, block in enumerate(self.layers):

            def layer(x: Float[Array, "B T D"], block: Block = block, index: int = index) -> Float[Array, "B T D"]:
                return block.after(x, attend(index, *block.before(x, by)))

            x = jax.checkpoint(layer)(x) if again else layer(x)
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
        split: how the weights are split over a mesh, and so the caches and states made for them; None: one device.
    """

    params: nnx.State[Any, Any]
    graphdef: nnx.GraphDef[Transformer] = dataclasses.field(metadata={"static": True})
    config: ModelConfig = dataclasses.field(metadata={"static": True})
    split: Split | None = dataclasses.field(default=None, metadata={"static": True})

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
    model = nnx.eval_shape(lambda: Transformer(config, dtype=dtype, keys=Keys(jax.random.key(0))))
    graphdef, params = nnx.split(model)
    return LanguageModel(params=params, graphdef=graphdef, config=config)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _random_weights(config: ModelConfig, key: PRNGKeyArray, dtype: jnp.dtype) -> nnx.State[Any, Any]:
    return nnx.state(Transformer(config, dtype=dtype, keys=Keys(key)))


def init_model(config: ModelConfig, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32) -> LanguageModel:
    """A model with random weights, for tests, benchmarks and training."""
    params = _random_weights(config, key, jnp.dtype(dtype))
    return dataclasses.replace(abstract_model(config, dtype), params=params)
