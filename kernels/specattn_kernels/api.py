"""The public ops: arguments are checked here and the call goes to one implementation.

Axes: B batch, T new tokens of this call, S cache slots, N query heads, K kv heads, H head dim, P blocks of a plan.
Every op is pure, works under `jax.jit` and `jax.vmap`, and takes traced lengths and p. `implementation` names the
backend, or several in order of preference, of which the first that can serve does; None chooses one. No other backend
ever takes the place of those that are named.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from specattn_kernels import checks, xla
from specattn_kernels.backends import XLA, Backend, Wanted, find_backend
from specattn_kernels.calls import AttentionCall, SelectionCall
from specattn_kernels.types import ArrayInput, AttentionOutput, Scores, SelectionPlan


def decode_attention(
    q: Float[ArrayInput, "B T N H"],
    k: Float[ArrayInput, "B K S H"],
    v: Float[ArrayInput, "B K S H"],
    lengths: Int[ArrayInput, " B"],
    *,
    scale: float | Float[ArrayInput, ""] | None = None,
    return_scores: Scores = False,
    return_lse: bool = False,
    implementation: Wanted = None,
) -> AttentionOutput:
    """Attention of the T newest tokens over the whole KV cache, causal among themselves.

    The new tokens' keys and values are already in the cache: query t sits at slot `lengths - T + t` and sees the slots
    up to and including that one. Slots at or beyond `lengths` may hold anything, NaN included. Softmax and lse are
    float32 whatever the dtype, and float32 inputs are multiplied in float32. A row that sees nothing, as there are
    when `lengths < T`, gives zeros and an lse of -inf.

    Unless scores are asked for, large calls (long prefill chunks) run as a loop up to the longest sequence, which
    reverse-mode differentiation does not support.

    Args:
        q: queries, any floating dtype. The N / K consecutive query heads n with equal n // (N / K) share a kv head.
        k: cached keys.
        v: cached values, in the dtype of `k`.
        lengths: valid slots of each sequence, the new tokens included; at most S.
        scale: factor on the logits; H ** -0.5 if None.
        return_scores: whether to return the softmax weights, [B, T, N, S] float32; "newest" returns those of the last
            token alone, [B, 1, N, S].
        return_lse: whether to return the log-sum-exp of the scaled logits, [B, T, N] float32.
        implementation: backend, see the module. Derivatives are those of "xla" in any case.

    Returns:
        The output in the dtype of `q`, and what else was asked for.

    Raises:
        ValueError: if an argument has the wrong shape, dtype or value.
        NotImplementedError: if none of the named backends can serve; it says why.
    """
    op = "decode_attention"
    q, k, v, lengths = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(lengths)
    checks.check_attention(op, q, k, v, lengths)
    checks.check_scores(op, return_scores)
    backend = find_backend(_call(op, q, k, scores=bool(return_scores)), implementation)
    parts = {"return_scores": return_scores, "return_lse": return_lse}
    return _differentiable(
        op,
        lambda attend, q, k, v, scale, lengths: attend(q, k, v, lengths, scale=scale, **parts),
        backend,
        (q, k, v, _scale(op, scale, q.shape[-1]), lengths.astype(jnp.int32)),
    )


def prefill_attention(
    q: Float[ArrayInput, "B T N H"],
    k: Float[ArrayInput, "B K S H"],
    v: Float[ArrayInput, "B K S H"],
    starts: Int[ArrayInput, " B"],
    *,
    lengths: Int[ArrayInput, " B"] | None = None,
    scale: float | Float[ArrayInput, ""] | None = None,
    return_lse: bool = False,
    implementation: Wanted = None,
) -> AttentionOutput:
    """Attention of T new tokens, up to whole prompts, over the KV cache; causal, aligned at the bottom right.

    The new tokens' keys and values are already in the cache: query t of a sequence is at slot `starts + t` and sees the
    slots up to and including that one. Slots at or beyond `starts + T` may hold anything, NaN included, and cost
    nothing, and so do those that the causal mask hides, but for the tiles that it cuts. No array has both a T and an S
    axis. Softmax and lse are float32 whatever the dtype, and float32 inputs are multiplied in float32.

    The same as `decode_attention` with `lengths = starts + T`, and made for T of 64 or more, where arithmetic is what
    takes the time; that one is made for a few tokens, where reading the cache is. Reading in chunks gives what reading
    at once does. It cannot be differentiated in reverse mode.

    Args:
        q: queries, any floating dtype. The N / K consecutive query heads n with equal n // (N / K) share a kv head.
        k: cached keys.
        v: cached values, in the dtype of `k`.
        starts: slot of each sequence's first new token, not negative; `starts + T` is at most S.
        lengths: valid slots of each sequence, for prompts that are padded on the right to T tokens: slots at or beyond
            may hold anything, queries there get something finite, and blocks of such queries cost nothing. All
            `starts + T` if None.
        scale: factor on the logits, above 0; H ** -0.5 if None.
        return_lse: whether to return the log-sum-exp of the scaled logits, [B, T, N] float32; anything for queries at
            or beyond `lengths`.
        implementation: backend, see the module. Derivatives are those of "xla" in any case.

    Returns:
        The output in the dtype of `q`, and the lse if it was asked for.

    Raises:
        ValueError: if an argument has the wrong shape, dtype or value.
        NotImplementedError: if none of the named backends can serve; it says why.
    """
    op = "prefill_attention"
    q, k, v, starts = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(starts)
    checks.check_attention(op, q, k, v, starts, "starts")
    limits = starts.astype(jnp.int32) + q.shape[1]
    if lengths is not None:
        lengths = jnp.asarray(lengths)
        checks.check_shape(op, "lengths", lengths, starts.shape, "[B]")
        checks.check_integer(op, "lengths", lengths)
        limits = jnp.minimum(limits, lengths.astype(jnp.int32))
    backend = find_backend(_call(op, q, k), implementation)
    return _differentiable(
        op,
        lambda attend, q, k, v, scale, starts, limits: attend(
            q, k, v, starts, limits, scale=scale, return_lse=return_lse
        ),
        backend,
        (q, k, v, _scale(op, scale, q.shape[-1]), starts.astype(jnp.int32), limits),
    )


def sparse_decode_attention(
    q: Float[ArrayInput, "B T N H"],
    k: Float[ArrayInput, "B K S H"],
    v: Float[ArrayInput, "B K S H"],
    plan: SelectionPlan,
    lengths: Int[ArrayInput, " B"],
    *,
    scale: float | Float[ArrayInput, ""] | None = None,
    return_lse: bool = False,
    implementation: Wanted = None,
) -> AttentionOutput:
    """Attention of the T newest tokens over the plan's blocks of the past and over themselves (SpecAttn, step 5).

    As `decode_attention`, except that of the past (slots below `lengths - T`) only the plan's blocks are read, each of
    them whole. The softmax is over what was read. A plan of everything gives `decode_attention`, an empty plan gives
    attention over the new tokens alone. Source: arXiv 2510.27641, there with CSR masks and FlashInfer.

    Args:
        q: queries, any floating dtype.
        k: cached keys.
        v: cached values, in the dtype of `k`.
        plan: which blocks to read, per kv head; ids in any order, each at most once, inside the cache. Of a
            plan of many layers the one at `plan.layer` is read where it lies, see `SelectionPlan.at_layer`.
        lengths: valid slots of each sequence, the new tokens included; at most S.
        scale: factor on the logits; H ** -0.5 if None.
        return_lse: whether to return the log-sum-exp of the scaled logits that were read, [B, T, N] float32.
        implementation: backend, see the module.

    Returns:
        The output in the dtype of `q`, and the lse if it was asked for.

    Raises:
        ValueError: if an argument has the wrong shape, dtype or value.
        NotImplementedError: if none of the named backends can serve; it says why.
    """
    op = "sparse_decode_attention"
    q, k, v, lengths = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(lengths)
    checks.check_attention(op, q, k, v, lengths)
    checks.check_plan(op, plan, k)
    backend = find_backend(_call(op, q, k, plan.block_size), implementation)
    plan = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), plan)
    return _differentiable(
        op,
        lambda attend, q, k, v, scale, plan, lengths: attend(
            q, k, v, plan, lengths, scale=scale, return_lse=return_lse
        ),
        backend,
        (q, k, v, _scale(op, scale, q.shape[-1]), plan, lengths.astype(jnp.int32)),
    )


def score_cache(
    q: Float[ArrayInput, "B T N H"],
    k: Float[ArrayInput, "B K S H"],
    lse: Float[ArrayInput, "B T N"],
    lengths: Int[ArrayInput, " B"],
    *,
    scale: float | Float[ArrayInput, ""] | None = None,
    dtype: DTypeLike = jnp.float32,
    implementation: Wanted = None,
) -> Float[Array, "B K S"]:
    """How strongly tokens look at each cache slot: the largest over T tokens of a kv head's mean weight.

    The weight of query head n of token t for slot s is `exp(scale * q[t, n] . k[s] - lse[t, n])`: its softmax weight,
    if `lse` is that of attention over the whole cache; if it is that of sparse attention, too large by what was left
    out, the same for all slots. Keys are read once for all tokens, values not at all.

    Args:
        q: queries of tokens that were read before, any floating dtype.
        k: cached keys.
        lse: log-sum-exp of each query's scaled logits, as the attention ops return it; -inf: a query does not count.
        lengths: slots of each sequence that are scored, at most S; the others, which may hold anything, get zero. There
            is no causal mask: all tokens look at all of them.
        scale: factor on the logits; H ** -0.5 if None.
        dtype: of the result.
        implementation: backend, see the module.

    Returns:
        Scores, not negative.

    Raises:
        ValueError: if an argument has the wrong shape, dtype or value.
        NotImplementedError: if none of the named backends can serve; it says why.
    """
    op = "score_cache"
    q, k, lse, lengths = jnp.asarray(q), jnp.asarray(k), jnp.asarray(lse), jnp.asarray(lengths)
    checks.check_attention(op, q, k, k, lengths)
    checks.check_shape(op, "lse", lse, q.shape[:-1], "[B, T, N], as in `q`")
    checks.check_floating(op, "lse", lse)
    checks.require(jnp.issubdtype(dtype, jnp.floating), op, "dtype", repr(dtype), "a floating dtype")
    backend = find_backend(_call(op, q, k), implementation)
    result: jax.Array = backend.load(op)(
        q,
        k,
        lse.astype(jnp.float32),
        lengths.astype(jnp.int32),
        scale=_scale(op, scale, q.shape[-1]),
        dtype=jnp.dtype(dtype),
    )
    return result


def top_p_threshold(
    scores: Float[ArrayInput, "*rows S"],
    p: Float[ArrayInput, ...] | float,
    *,
    lengths: Int[ArrayInput, ...] | int | None = None,
    method: Literal["exact", "linear"] = "exact",
    steps: int = 10,
    implementation: Wanted = None,
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
    backend = find_backend(_selection_call(op, scores, block_size, method), implementation)
    plan: SelectionPlan = backend.load(op)(
        scores,
        share,
        lengths.astype(jnp.int32),
        block_size=block_size,
        num_sink=num_sink,
        num_recent=num_recent,
        method=method,
        steps=steps,
        measure=measure,
        capacity=capacity,
    )
    return plan


def compact_blocks(
    mask: Bool[ArrayInput, "B *layers K P"], *, block_size: int, implementation: Wanted = None
) -> SelectionPlan:
    """Turns a mask over the cache's blocks into a plan, on the device.

    Args:
        mask: True for the blocks to read, for all P = ceil(S / block_size) blocks of the cache, of one layer or of L.
        block_size: slots per block, static.
        implementation: backend, see the module.

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
    backend = find_backend(_selection_call(op, mask), implementation)
    plan: SelectionPlan = backend.load(op)(mask, block_size=block_size)
    return plan


def merge_states(
    out_a: Float[ArrayInput, "*rows H"],
    lse_a: Float[ArrayInput, "*rows"],
    out_b: Float[ArrayInput, "*rows H"],
    lse_b: Float[ArrayInput, "*rows"],
) -> tuple[Float[Array, "*rows H"], Float[Array, "*rows"]]:
    """Combines the attention of the same queries over two disjoint sets of slots into that over their union.

    Args:
        out_a: attention output over the first set, e.g. [B, T, N, H].
        lse_a: log-sum-exp of its scaled logits, e.g. [B, T, N]; -inf where the set is empty.
        out_b: attention output over the second set.
        lse_b: log-sum-exp of its scaled logits.

    Returns:
        The output over the union, in the dtype of `out_a`, and its float32 lse: zero and -inf where both are empty.

    Raises:
        ValueError: if an argument has the wrong shape or dtype.
    """
    op = "merge_states"
    out_a, lse_a, out_b, lse_b = jnp.asarray(out_a), jnp.asarray(lse_a), jnp.asarray(out_b), jnp.asarray(lse_b)
    checks.require(out_a.ndim >= 1, op, "out_a", checks.shape_text(out_a.shape), "[..., H]")
    checks.check_shape(op, "out_b", out_b, out_a.shape, "that of `out_a`")
    checks.check_shape(op, "lse_a", lse_a, out_a.shape[:-1], "that of `out_a` without the head dim")
    checks.check_shape(op, "lse_b", lse_b, out_a.shape[:-1], "that of `out_a` without the head dim")
    for name, array in (("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        checks.check_floating(op, name, array)
    return xla.merge_states(out_a, lse_a.astype(jnp.float32), out_b, lse_b.astype(jnp.float32))


def _call(op: str, q: jax.Array, k: jax.Array, block_size: int | None = None, scores: bool = False) -> AttentionCall:
    """What backends are told of an attention call."""
    return AttentionCall(op, k.shape, q.shape[1], q.shape[2] // k.shape[1], k.dtype, q.dtype, block_size, scores)


def _selection_call(op: str, rows: jax.Array, block_size: int = 1, method: str = "exact") -> SelectionCall:
    """What backends are told of a selection call."""
    slots = rows.shape[-1]
    return SelectionCall(op, rows.size // slots, slots, block_size, method)


def _differentiable(
    op: str, call: Callable[..., AttentionOutput], backend: Backend, arguments: tuple[Any, ...]
) -> AttentionOutput:
    """Attends with a backend; what is differentiated is computed by `xla`, as kernels have no derivative."""
    plain = functools.partial(call, XLA.load(op))
    if backend is XLA:
        return plain(*arguments)
    kernel = jax.custom_jvp(functools.partial(call, backend.load(op)))
    kernel.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return kernel(*arguments)


def _scale(op: str, scale: float | ArrayInput | None, head_dim: int) -> float | jax.Array:
    """The factor on the logits, H ** -0.5 by default."""
    if scale is None:
        return float(head_dim**-0.5)
    if isinstance(scale, (int, float)):
        checks.require(scale > 0, op, "scale", repr(scale), "above 0, or None for H ** -0.5")
        return scale
    scale = jnp.asarray(scale, jnp.float32)
    checks.check_shape(op, "scale", scale, (), "a scalar")
    return scale


def _share(op: str, p: float | ArrayInput, rows: tuple[int, ...], meaning: str) -> Float[Array, "*rows"]:
    """Casts p to one float32 for every row."""
    checks.check_p(op, p)
    share = jnp.asarray(p, jnp.float32)
    checks.check_broadcast(op, "p", share, rows, meaning)
    return jnp.broadcast_to(share, rows)
