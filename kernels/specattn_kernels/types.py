"""Values that the ops exchange: the plan of what to read, and what attention returns."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelectionPlan:
    """Which blocks of the KV cache one target layer reads for one window.

    Only slots of the past are ever read through a plan: the T new tokens of the call are attended in any case.

    Attributes:
        block_ids: ids of the selected blocks, per sequence and kv head, each at most once, in any order. Block `i`
            covers the slots `[i * block_size, (i + 1) * block_size)`. Entries at or beyond `counts` hold any valid
            id and are ignored.
        counts: how many leading entries of `block_ids` are selected, per sequence and kv head.
        block_size: slots per block, static. 1 is token granular.
    """

    block_ids: Int32[Array, "B K P"]
    counts: Int32[Array, "B K"]
    block_size: int = dataclasses.field(default=1, metadata={"static": True})


class AttentionOutput(NamedTuple):
    """What an attention op returns; the optional parts are None unless they were asked for.

    Attributes:
        out: attention output, in the dtype of the query. A row that attends to nothing is zero.
        lse: float32 log-sum-exp of the scaled logits that were attended; -inf for a row that attends to nothing.
        scores: float32 softmax weights over the cache slots; zero where a query may not look.
    """

    out: Float[Array, "B T N H"]
    lse: Float[Array, "B T N"] | None = None
    scores: Float[Array, "B T N S"] | None = None
