"""What `specattn bench kernels` measures: the grids."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal, TypeAlias

Grid: TypeAlias = Literal["tiny", "small", "precision", "full"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one point of the grid; what an op does not know is at its default.

    Attributes:
        op: name of the public op; `decode_attention_scores` is `decode_attention` that also returns its scores.
        batch: B.
        kv_heads: K.
        slots: S.
        group: G.
        tokens: T.
        head_dim: H.
        dtype: of cache and queries, or of the scores.
        block_size: slots per block.
        density: share of the blocks that a plan or mask selects.
        p: nucleus mass.
    """

    op: str
    batch: int
    kv_heads: int
    slots: int
    group: int = 1
    tokens: int = 1
    head_dim: int = 128
    dtype: str = "bfloat16"
    block_size: int = 1
    density: float = 1.0
    p: float = 1.0


def _attention(
    shape: tuple[int, int, int, int],
    densities: tuple[float, ...],
    blocks: tuple[int, ...],
    head_dim: int = 128,
    dtype: str = "bfloat16",
    tokens: int = 5,
) -> list[Case]:
    """Dense attention, with and without scores, and sparse attention of one shape (B, K, G, S)."""
    batch, kv_heads, group, slots = shape
    dense = Case("decode_attention", batch, kv_heads, slots, group, tokens, head_dim, dtype)
    # Scores are the draft's, which reads one token at a time.
    scores = dataclasses.replace(dense, op="decode_attention_scores", tokens=1)
    sparse = [
        dataclasses.replace(dense, op="sparse_decode_attention", density=density, block_size=block)
        for density, block in itertools.product(densities, blocks)
    ]
    # Once a window, for the queries of all its steps.
    cache = dataclasses.replace(dense, op="score_cache")
    return [dense, dataclasses.replace(dense, tokens=1), scores, cache, *sparse]


def _selection(rows: tuple[tuple[int, int, int], ...], ps: tuple[float, ...], blocks: tuple[int, ...]) -> list[Case]:
    """Threshold, selection and compaction for rows (B, K, S) of float32 scores."""
    cases = []
    for (batch, kv_heads, slots), p in itertools.product(rows, ps):
        row = Case("top_p_threshold", batch, kv_heads, slots, dtype="float32", p=p)
        cases += [row, *(dataclasses.replace(row, op="select_blocks", block_size=block) for block in blocks)]
    cases += [Case("compact_blocks", *shape, dtype="bool", density=0.25) for shape in rows]
    return cases


def make_grid(grid: Grid) -> list[Case]:
    """The cases of a grid.

    `tiny` runs anywhere in seconds, `small` has the main points, `precision` all dtypes and head dims, `full` these and
    many more.
    """
    if grid == "tiny":
        return [
            *_attention((2, 2, 2, 256), (0.25,), (1, 16), head_dim=64, dtype="float32"),
            *_selection(((2, 3, 512),), (0.95,), (1, 16)),
            Case("select_blocks", 1, 2, 40_000, dtype="float32", p=0.95),
        ]
    if grid == "small":
        return [
            *_attention((8, 8, 4, 32768), (0.25, 0.1), (1, 16, 64)),
            *_attention((1, 8, 4, 131072), (0.25, 0.1), (1, 16, 64)),
            *_selection(((1, 110, 8192), (1, 110, 32768), (1, 110, 131072), (8, 128, 32768)), (0.95,), (1, 16)),
        ]
    precision = itertools.chain.from_iterable(
        _attention((4, 8, 4, 8192), (0.25,), (1, 32), head_dim, dtype)
        for head_dim, dtype in itertools.product((64, 96, 128, 256), ("bfloat16", "float16", "float32"))
    )
    if grid == "precision":
        return list(precision)
    shapes = ((8, 8, 4, 32768), (1, 8, 4, 131072), (1, 32, 1, 32768), (1, 32, 1, 2048), (8, 8, 4, 8192))
    densities, blocks = (1.0, 0.5, 0.25, 0.1, 0.05), (1, 16, 64)
    rows = tuple((1, 110, slots) for slots in (2048, 8192, 32768, 65536, 131072))
    return [
        *itertools.chain.from_iterable(_attention(shape, densities, blocks) for shape in shapes),
        *precision,
        *_selection((*rows, (8, 128, 32768), (8, 256, 8192)), (0.5, 0.95), (1, 16)),
    ]
