"""Argument checks of the public ops.

Each failure is one sentence that names the argument, what it was and what it should be. Only shapes, dtypes and
Python values are looked at, so every check also runs while an op is being traced.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from specattn_kernels.types import SelectionPlan


def require(condition: bool, op: str, argument: str, was: object, expected: str) -> None:
    """Raises the one-sentence error of a bad argument.

    Args:
        condition: whether the argument is fine.
        op: name of the public op.
        argument: name of the argument.
        was: what it was; shown as text.
        expected: what it should have been.

    Raises:
        ValueError: if `condition` is false.
    """
    if not condition:
        raise ValueError(f"{op}: `{argument}` is {was}, but must be {expected}.")


def shape_text(shape: tuple[int, ...]) -> str:
    """Writes a shape the way the documentation does, e.g. `[2, 4]`."""
    return "of shape [" + ", ".join(map(str, shape)) + "]"


def check_shape(op: str, argument: str, array: jax.Array, shape: tuple[int, ...], meaning: str) -> None:
    """Requires exactly `shape`; `meaning` says which axes these are."""
    require(array.shape == shape, op, argument, shape_text(array.shape), f"{shape_text(shape)} ({meaning})")


def check_floating(op: str, argument: str, array: jax.Array) -> None:
    """Requires a floating dtype."""
    require(jnp.issubdtype(array.dtype, jnp.floating), op, argument, f"of dtype {array.dtype}", "floating point")


def check_integer(op: str, argument: str, array: jax.Array) -> None:
    """Requires an integer dtype."""
    require(
        jnp.issubdtype(array.dtype, jnp.integer), op, argument, f"of dtype {array.dtype}", "an integer array (int32)"
    )


def check_attention(
    op: str, q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, argument: str = "lengths"
) -> None:
    """Requires q [B, T, N, H], k and v [B, K, S, H] of one dtype, lengths [B], with N a multiple of K and T <= S.

    `argument` is what the op calls the lengths.
    """
    require(q.ndim == 4, op, "q", shape_text(q.shape), "[B, T, N, H] (batch, new tokens, query heads, head dim)")
    require(k.ndim == 4, op, "k", shape_text(k.shape), "[B, K, S, H] (batch, kv heads, cache slots, head dim)")
    batch, tokens, heads, head_dim = q.shape
    kv_heads, slots = k.shape[1:3]
    check_shape(op, "k", k, (batch, kv_heads, slots, head_dim), "[B, K, S, H], B and H as in `q`")
    check_shape(op, "v", v, k.shape, "that of `k`")
    for name, array in (("q", q), ("k", k), ("v", v)):
        check_floating(op, name, array)
        require(0 not in array.shape, op, name, shape_text(array.shape), "without an empty axis")
    require(v.dtype == k.dtype, op, "v", f"of dtype {v.dtype}", f"of the dtype of `k`, {k.dtype}")
    require(
        heads % kv_heads == 0, op, "q", f"for {heads} query heads", f"for a multiple of the {kv_heads} kv heads of `k`"
    )
    require(tokens <= slots, op, "q", f"for {tokens} new tokens", f"for at most the {slots} slots of the cache `k`")
    check_shape(op, argument, lengths, (batch,), "[B]")
    check_integer(op, argument, lengths)


def check_scores(op: str, scores: object) -> None:
    """Requires a `Scores`."""
    fine = isinstance(scores, bool) or scores == "newest"
    require(fine, op, "return_scores", repr(scores), "False, True or 'newest'")


def check_plan(op: str, plan: SelectionPlan, k: jax.Array) -> None:
    """Requires a plan for the cache `k`: block_ids [B, K, P], or [B, L, K, P] and a layer; counts alike."""
    require(isinstance(plan, SelectionPlan), op, "plan", f"a {type(plan).__name__}", "a SelectionPlan")
    batch, kv_heads, slots = k.shape[:3]
    ids, layer = plan.block_ids, plan.layer
    check_block_size(op, "plan.block_size", plan.block_size)
    require(ids.ndim in (3, 4), op, "plan.block_ids", shape_text(ids.shape), "[B, K, P] or [B, L, K, P]")
    if ids.ndim == 4:
        require(layer is not None, op, "plan.layer", "None", "the layer to read, as `block_ids` has a layer axis")
    if layer is not None:
        require(ids.ndim == 4, op, "plan.layer", "given", "None, as `block_ids` has no layer axis")
        check_shape(op, "plan.layer", layer, (), "a scalar")
        check_integer(op, "plan.layer", layer)
    rows, meaning = (batch, *ids.shape[1:-2], kv_heads), "B, L, K" if ids.ndim == 4 else "B, K"
    check_shape(op, "plan.block_ids", ids, (*rows, ids.shape[-1]), f"[{meaning}, P], B and K as in `k`")
    check_shape(op, "plan.counts", plan.counts, rows, f"[{meaning}]")
    check_integer(op, "plan.block_ids", ids)
    check_integer(op, "plan.counts", plan.counts)
    blocks = -(-slots // plan.block_size)
    require(
        ids.shape[-1] <= blocks, op, "plan.block_ids", f"for {ids.shape[-1]} blocks", f"for at most the {blocks} of `k`"
    )


def check_rows(op: str, argument: str, array: jax.Array, last: str, meaning: str) -> None:
    """Requires [B, K, last] or [B, L, K, last] with at least one of the last."""
    fine = array.ndim in (3, 4) and array.shape[-1] >= 1
    expected = f"[B, K, {last}] or [B, L, K, {last}] with at least one {meaning}"
    require(fine, op, argument, shape_text(array.shape), expected)


def check_block_size(op: str, argument: str, block_size: int) -> None:
    """Requires a positive Python integer."""
    fine = isinstance(block_size, int) and not isinstance(block_size, bool) and block_size > 0
    require(fine, op, argument, repr(block_size), "a positive integer (static slots per block)")


def check_count(op: str, argument: str, count: int, least: int) -> None:
    """Requires a Python integer of at least `least`."""
    fine = isinstance(count, int) and not isinstance(count, bool) and count >= least
    require(fine, op, argument, repr(count), f"an integer of at least {least}")


def check_broadcast(op: str, argument: str, array: jax.Array, shape: tuple[int, ...], meaning: str) -> None:
    """Requires a shape that broadcasts to `shape`."""
    try:
        fine = jnp.broadcast_shapes(array.shape, shape) == shape
    except ValueError:
        fine = False
    require(fine, op, argument, shape_text(array.shape), f"a scalar or broadcastable to {list(shape)} ({meaning})")


def check_method(op: str, method: str, steps: int) -> None:
    """Requires a known bisection and at least one step of it."""
    require(method in ("exact", "linear"), op, "method", repr(method), "'exact' or 'linear'")
    check_count(op, "steps", steps, least=1)


def check_measure(op: str, measure: str, method: str) -> None:
    """Requires a known measure, and the exact method for counts."""
    require(measure in ("mass", "count"), op, "measure", repr(measure), "'mass' or 'count'")
    require(measure == "mass" or method == "exact", op, "method", repr(method), "'exact' where the measure is 'count'")


def check_capacity(op: str, capacity: int, blocks: int) -> None:
    """Requires room for at least one block and at most all."""
    check_count(op, "capacity", capacity, least=1)
    require(capacity <= blocks, op, "capacity", repr(capacity), f"at most {blocks}, the blocks of a row")


def check_p(op: str, p: object) -> None:
    """Requires a p above zero where it is a Python number; a traced or array p cannot be looked at."""
    if isinstance(p, (int, float)):
        require(p > 0, op, "p", repr(p), "above 0 (1 or more selects everything)")
