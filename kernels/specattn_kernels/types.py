"""Values that the ops exchange: the plan of what to read, and what attention returns."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

# Which softmax weights dense attention returns: none, those of all T new tokens, or of the newest alone.
Scores: TypeAlias = bool | Literal["newest"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelectionPlan:
    """Which blocks of the KV cache one target layer reads for one window.

    Only slots of the past are ever read through a plan: the T new tokens of the call are attended in any case.

    Attributes:
        block_ids: ids of the selected blocks, per sequence and kv head, each at most once, in any order. Block `i`
            covers the slots `[i * block_size, (i + 1) * block_size)`. Entries at or beyond `counts` are unspecified, no
            ids even: what is not written may hold anything. Nothing may be read by them.
        counts: how many leading entries of `block_ids` are selected, per sequence and kv head.
        block_size: slots per block, static. 1 is token granular.
        first_row: the row of the first of the K kv heads; the others follow. So the plans of many layers can lie in one
            array of which no layer has to copy its part. None where there are no more rows than kv heads.
        num_rows: K where `first_row` is given, static.
    """

    block_ids: Int32[Array, "B rows P"]
    counts: Int32[Array, "B rows"]
    block_size: int = dataclasses.field(default=1, metadata={"static": True})
    first_row: Int32[Array, ""] | None = None
    num_rows: int | None = dataclasses.field(default=None, metadata={"static": True})

    def own_rows(self) -> SelectionPlan:
        """The same plan with the rows of its K kv heads alone."""
        if self.first_row is None or self.num_rows is None:
            return self
        ids, counts = (
            lax.dynamic_slice_in_dim(x, self.first_row, self.num_rows, axis=1) for x in (self.block_ids, self.counts)
        )
        return SelectionPlan(ids, counts, self.block_size)

    def layer(self, index: int, kv_heads: int) -> SelectionPlan:
        """The plan of one of several layers whose rows follow each other."""
        return dataclasses.replace(self, first_row=jnp.int32(index * kv_heads), num_rows=kv_heads)


class AttentionOutput(NamedTuple):
    """What an attention op returns; the optional parts are None unless they were asked for.

    Attributes:
        out: attention output, in the dtype of the query. A row that attends to nothing is zero.
        lse: float32 log-sum-exp of the scaled logits that were attended; -inf for a row that attends to nothing.
        scores: float32 softmax weights over the cache slots; zero where a query may not look.
    """

    out: Float[Array, "B T N H"]
    lse: Float[Array, "B T N"] | None = None
    scores: Float[Array, "B T N S"] | Float[Array, "B 1 N S"] | None = None
