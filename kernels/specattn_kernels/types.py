"""Values that the ops exchange: the plan of what to read, and what attention returns."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple, TypeAlias, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

# What the public ops take for an array.
ArrayInput: TypeAlias = jax.Array | np.ndarray
# Which softmax weights dense attention returns: none, those of all T new tokens, or of the newest alone.
Scores: TypeAlias = bool | Literal["newest"]


# Transformations of JAX put other things than arrays into its fields: shapes, axes, objects without a type.
@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelectionPlan:
    """Which blocks of the KV cache are read for one window: by one layer, or by each of L layers.

    Only slots of the past are ever read through a plan: the T new tokens of the call are attended in any case.

    Attributes:
        block_ids: ids of the selected blocks, per sequence and kv head, each at most once, in any order. Block `i`
            covers the slots `[i * block_size, (i + 1) * block_size)`. Entries at or beyond `counts` are unspecified, no
            ids even: what is not written may hold anything. Nothing may be read by them.
        counts: how many leading entries of `block_ids` are selected, per sequence and kv head.
        block_size: slots per block, static. 1 is token granular.
        layer: which layer's part an op reads; needed by the ops exactly where there is a layer axis, see `at_layer`.
    """

    block_ids: Int32[Array, "B K P"] | Int32[Array, "B L K P"]
    counts: Int32[Array, "B K"] | Int32[Array, "B L K"]
    block_size: int = dataclasses.field(default=1, metadata={"static": True})
    layer: Int32[Array, ""] | None = None

    def at_layer(self, index: int | Int32[Array, ""]) -> SelectionPlan:
        """The plan of one of its L layers: a view, the arrays are the same.

        Raises:
            ValueError: if there is no layer axis, or `index` is a Python integer beyond it.
        """
        if self.block_ids.ndim != 4:
            raise ValueError("at_layer: `block_ids` is without a layer axis, but must be [B, L, K, P].")
        layers = self.block_ids.shape[1]
        if isinstance(index, int) and not 0 <= index < layers:
            raise ValueError(f"at_layer: `index` is {index}, but must be from 0 to {layers - 1}.")
        return dataclasses.replace(self, layer=jnp.asarray(index, jnp.int32))

    def take_layer(self) -> SelectionPlan:
        """The layer's plan with arrays of its own, [B, K, P]; copies them unless there is no layer axis."""
        if self.layer is None:
            return self
        ids, counts = (
            lax.dynamic_index_in_dim(x, self.layer, axis=1, keepdims=False) for x in (self.block_ids, self.counts)
        )
        return SelectionPlan(ids, counts, self.block_size)

    def stacked(self) -> tuple[Int32[Array, "B L K P"], Int32[Array, "B L K"], Int32[Array, " 1"]]:
        """Ids, counts and layer, with a layer axis in any case: what kernels take."""
        if self.layer is not None:
            return self.block_ids, self.counts, self.layer[None]
        return self.block_ids[:, None], self.counts[:, None], jnp.zeros(1, jnp.int32)


class AttentionOutput(NamedTuple):
    """What an attention op returns; the optional parts are None unless they were asked for.

    Attributes:
        out: attention output, in the dtype of the query. A row that attends to nothing is zero.
        lse: float32 log-sum-exp of the scaled logits that were attended; -inf for a row that attends to nothing.
        scores: float32 softmax weights over the cache slots; zero where a query may not look.
        memory: how much each cache slot got when it was last read, in the dtype that it came in.
    """

    out: Float[Array, "B T N H"]
    lse: Float[Array, "B T N"] | None = None
    scores: Float[Array, "B T N S"] | Float[Array, "B 1 N S"] | None = None
    memory: Float[Array, "B K S"] | None = None
