"""The public selection ops; `api` says what all ops have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specattn_kernels import checks
from specattn_kernels.backends import Wanted, find_backend
from specattn_kernels.calls import SelectionCall
from specattn_kernels.split import Split
from specattn_kernels.types import ArrayInput, SelectionPlan


def top_p_threshold(
    scores: Float[ArrayInput, "*rows S"],
    p: Float[ArrayInput, ...] | float,
    *,
    lengths: Int[ArrayInput, ...] | int | None = None,
    method: Literal["exact", "linear"] = "exact",
    steps: int = 10,
    implementation: Wanted = None,
    split: Split | None = None,
) -> Float[Array, "*rows"]:
    """The threshold whose set `{scores >= threshold}` is the nucleus of each row, found without a sort.

    Relative to the row's own total over its valid slots, so scores need not sum to one. NaN, negative and subnormal
    scores count as 0; scores above float32 max / 2 / S, +inf included, count as that. A row without mass gives 0, and
    so does p >= 1: then everything valid is selected, zeros included.

    Args:
        scores: non-negative scores, any floating dtype; sums and thresholds are float32.
        p: share of the row's total to reach, above 0; a scalar or broadcastable to the rows. At or below 0 (possible
            for an array) only the row's largest scores are selected.
        lengths: valid leading slots of each row, a scalar or broadcastable to the rows; all if None.
        method: "exact" gives the minimal set that reaches p, ties included: the largest such threshold, which is one
            of the row's scores, by bisection on the float's bit pattern. "linear" is the published bisection of
            arXiv 2510.27641, `steps` halvings of [0, max] and then the lower end; it cannot resolve below
            max / 2 ** steps and keeps far too much on peaked rows. Kept to reproduce the paper.
        steps: halvings of the linear method; unused by the exact one.
        implementation: backend, see the module.
        split: how the arrays lie on several devices, see the module; None: on one.

    Returns:
        One float32 threshold a row.

    Raises:
        ValueError: if an argument has the wrong shape, dtype or value.
        NotImplementedError: if none of the named backends can serve; it says why.
    """
    op = "top_p_threshold"
    scores = jnp.asarray(scores)
    checks.check_floating(op, "scores", scores)
    at_least_one = scores.ndim >= 1 and scores.shape[-1] >= 1
    checks.require(at_least_one, op, "scores", checks.shape_text(scores.shape), "[..., S] with at least one slot")
    checks.check_method(op, method, steps)
    rows = scores.shape[:-1]
    if lengths is not None:
        lengths = jnp.asarray(lengths)
        checks.check_integer(op, "lengths", lengths)
        checks.check_broadcast(op, "lengths", lengths, rows, "the rows of `scores`")
        lengths = jnp.broadcast_to(lengths, rows)
    share = _share(op, p, rows, "the rows of `scores`")
    if split is not None and rows:
        local = functools.partial(top_p_threshold, method=method, steps=steps, implementation=implementation)
        limits = jnp.broadcast_to(jnp.int32(scores.shape[-1]) if lengths is None else lengths, rows)
        split = split.fitting(B=len(scores))
        threshold: jax.Array = split.run(
            lambda scores, p, lengths: local(scores, p, lengths=lengths), (scores, share, limits), ("B", "B", "B"), "B"
        )
        return threshold
    backend = find_backend(_selection_call(op, scores, method=method), implementation)
    result: jax.Array = backend.load(op)(scores, share, lengths=lengths, method=method, steps=steps)
    return result


def select_blocks(
    scores: Float[ArrayInput, "B *layers K S"],
    p: Float[ArrayInput, ...] | float,
    lengths: Int[ArrayInput, " B"],
    *,
    block_size: int = 1,
    num_sink: int = 0,
    num_recent: int = 0,
    method: Literal["exact", "linear"] = "exact",
    steps: int = 10,
    measure: Literal["mass", "count"] = "mass",
    capacity: int | None = None,
    implementation: Wanted = None,
    split: Split | None = None,
) -> SelectionPlan:
    """Selects the blocks that hold share p of each row's score, plus sinks and a recent window.

    A block's score is the sum over its valid slots, and the nucleus is taken over blocks (`top_p_threshold`). Blocks
    that touch the first `num_sink` or the last `num_recent` valid slots join it. Blocks that start at or beyond
    `lengths` are never selected.

    If there is less room than that, the plan keeps the recent window and, of the blocks before it, the first ones by
    id: sinks stay, and the nucleus loses its blocks right before the window. A window that is itself too large loses
    its first blocks.

    Args:
        scores: non-negative scores of the cache slots per kv head, of one layer or of L; those at or beyond `lengths`
            may be anything.
        p: share of the total to reach, above 0; a scalar or broadcastable to the rows, [B, K] or [B, L, K]. 1 or more
            selects all that is valid.
        lengths: valid slots of each sequence.
        block_size: slots per block, static.
        num_sink: slots at the beginning to select in any case, static.
        num_recent: slots before `lengths` to select in any case, static.
        method: see `top_p_threshold`.
        steps: see `top_p_threshold`.
        measure: what p is a share of. "mass": of the row's score. "count": of its valid blocks; the nucleus is then the
            ceil(p * valid blocks) blocks with the largest scores (that product in float32, at least one), and those
            that tie with the last of them, but never a block whose score counts as 0. Needs method "exact".
        capacity: P, room for blocks in the plan, static; all ceil(S / block_size) if None.
        implementation: backend, see the module.
        split: how the arrays lie on several devices, see the module; None: on one.

    Returns:
        A plan with room for P blocks, with the rows of the scores, selected ids ascending. What lies beyond `counts` is
        unspecified. `SelectionPlan.at_layer` gives what the attention of one of several layers reads.

    Raises:
        ValueError: if an argument has the wrong shape, dtype or value.
        NotImplementedError: if none of the named backends can serve; it says why.
    """
    op = "select_blocks"
    scores, lengths = jnp.asarray(scores), jnp.asarray(lengths)
    checks.check_floating(op, "scores", scores)
    checks.check_rows(op, "scores", scores, "S", "slot")
    checks.check_shape(op, "lengths", lengths, scores.shape[:1], "[B]")
    checks.check_integer(op, "lengths", lengths)
    checks.check_block_size(op, "block_size", block_size)
    checks.check_count(op, "num_sink", num_sink, least=0)
    checks.check_count(op, "num_recent", num_recent, least=0)
    checks.check_method(op, method, steps)
    checks.check_measure(op, measure, method)
    if capacity is not None:
        checks.check_capacity(op, capacity, -(-scores.shape[-1] // block_size))
    share = _share(op, p, scores.shape[:-1], "the rows of `scores`")
    options: dict[str, Any] = {
        "block_size": block_size,
        "num_sink": num_sink,
        "num_recent": num_recent,
        "method": method,
        "steps": steps,
        "measure": measure,
        "capacity": capacity,
    }
    if split is not None:
        local = functools.partial(select_blocks, implementation=implementation, **options)
        return _split_selection(split, local, (scores, share, lengths), block_size)
    backend = find_backend(_selection_call(op, scores, block_size, method), implementation)
    plan: SelectionPlan = backend.load(op)(scores, share, lengths.astype(jnp.int32), **options)
    return plan


def compact_blocks(
    mask: Bool[ArrayInput, "B *layers K P"],
    *,
    block_size: int,
    implementation: Wanted = None,
    split: Split | None = None,
) -> SelectionPlan:
    """Turns a mask over the cache's blocks into a plan, on the device.

    Args:
        mask: True for the blocks to read, for all P = ceil(S / block_size) blocks of the cache, of one layer or of L.
        block_size: slots per block, static.
        implementation: backend, see the module.
        split: how the arrays lie on several devices, see the module; None: on one.

    Returns:
        A plan with the rows of the mask, selected ids ascending. What lies beyond `counts` is unspecified.

    Raises:
        ValueError: if an argument has the wrong shape, dtype or value.
        NotImplementedError: if none of the named backends can serve; it says why.
    """
    op = "compact_blocks"
    mask = jnp.asarray(mask)
    checks.require(mask.dtype == jnp.bool_, op, "mask", f"of dtype {mask.dtype}", "boolean")
    checks.check_rows(op, "mask", mask, "P", "block")
    checks.check_block_size(op, "block_size", block_size)
    if split is not None:
        local = functools.partial(compact_blocks, block_size=block_size, implementation=implementation)
        return _split_selection(split, local, (mask,), block_size)
    backend = find_backend(_selection_call(op, mask), implementation)
    plan: SelectionPlan = backend.load(op)(mask, block_size=block_size)
    return plan


def _selection_call(op: str, rows: jax.Array, block_size: int = 1, method: str = "exact") -> SelectionCall:
    """What backends are told of a selection call."""
    slots = rows.shape[-1]
    return SelectionCall(op, rows.size // slots, slots, block_size, method)


def _split_selection(
    split: Split, op: Callable[..., SelectionPlan], arguments: tuple[jax.Array, ...], block_size: int
) -> SelectionPlan:
    """A selection op on every device, of rows of entries, a number for each row, and one per sequence."""
    rows = arguments[0].shape[:-1]
    axes: Any = "B L K" if len(rows) == 3 else "B K"
    split = split.fitting(B=rows[0], K=rows[-1])
    plan: SelectionPlan = split.run(
        op, arguments, (axes, axes, "B")[: len(arguments)], SelectionPlan(axes, axes, block_size)
    )
    return plan


def _share(op: str, p: float | ArrayInput, rows: tuple[int, ...], meaning: str) -> Float[Array, "*rows"]:
    """Casts p to one float32 for every row."""
    checks.check_p(op, p)
    share = jnp.asarray(p, jnp.float32)
    checks.check_broadcast(op, "p", share, rows, meaning)
    return jnp.broadcast_to(share, rows)
