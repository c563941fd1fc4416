"""What is known of a call before it runs; backends say by it whether they can serve."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from jaxtyping import DTypeLike


class AttentionCall(NamedTuple):
    """A call of an attention op, or of `score_cache`.

    Attributes:
        op: name of the public op.
        cache: shape of `k`, [B, K, S, H].
        tokens: T.
        group: G, query heads per kv head.
        dtype: of the cache.
        query_dtype: of the queries; that of the cache if None.
        block_size: slots per block of the plan; None where there is no plan.
        scores: whether softmax weights are returned.
    """

    op: str
    cache: tuple[int, ...]
    tokens: int
    group: int
    dtype: DTypeLike
    query_dtype: DTypeLike | None = None
    block_size: int | None = None
    scores: bool = False

    @property
    def query_rows(self) -> int:
        """T * G, the query rows per kv head."""
        return self.tokens * self.group


class SelectionCall(NamedTuple):
    """A call of a selection op.

    Attributes:
        op: name of the public op.
        rows: rows of scores, or of a mask.
        slots: numbers in a row.
        block_size: slots per block, of which a row has ceil(slots / block_size).
        method: how the threshold is found.
    """

    op: str
    rows: int
    slots: int
    block_size: int = 1
    method: str = "exact"

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return -(-self.slots // self.block_size)


Call: TypeAlias = AttentionCall | SelectionCall
