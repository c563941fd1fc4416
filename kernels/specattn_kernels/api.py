"""The public ops: arguments are checked here and the call goes to one implementation.

Axes: B batch, T new tokens of this call, S cache slots, N query heads, K kv heads, H head dim, P blocks of a plan.
Every op is pure, works under `jax.jit` and `jax.vmap`, and takes traced lengths and p. `implementation` names the
backend, or several in order of preference, of which the first that can serve does; None chooses one. No other backend
ever takes the place of those that are named.
`split` says how the arrays lie on several devices: each runs the op on its own sequences and kv heads, or on all of
them where they do not divide.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from specattn_kernels import checks, xla
from specattn_kernels.backends import XLA, Backend, Wanted, find_backend
from specattn_kernels.calls import AttentionCall
from specattn_kernels.split import Split
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
    split: Split | None = None,
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
        split: how the arrays lie on several devices, see the module; None: on one.

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
    parts: dict[str, Any] = {"return_scores": return_scores, "return_lse": return_lse}
    if split is not None:
        local = functools.partial(decode_attention, scale=scale, **parts, implementation=implementation)
        return _split_attention(split, local, (q, k, v, lengths), ("B",), **parts)
    backend = find_backend(_call(op, q, k, scores=bool(return_scores)), implementation)
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
    split: Split | None = None,
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
        split: how the arrays lie on several devices, see the module; None: on one.

    Returns:
        The output in the dtype of `q`, and the lse if it was asked for.

    Raises:
        ValueError: if an argument has the wrong shape, dtype or value.
        NotImplementedError: if none of the named backends can serve; it says why.
    """
    op = "prefill_attention"
    q, k, v, starts = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(starts)
    checks.check_attention(op, q, k, v, starts, "starts")
    if split is not None:

        def local(
            q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array, lengths: jax.Array | None
        ) -> AttentionOutput:
            options: dict[str, Any] = {"scale": scale, "return_lse": return_lse, "implementation": implementation}
            return prefill_attention(q, k, v, starts, lengths=lengths, **options)

        valid, valid_axes = (None, None) if lengths is None else (jnp.asarray(lengths), "B")
        return _split_attention(split, local, (q, k, v, starts, valid), ("B", valid_axes), return_lse=return_lse)
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
    memory: Float[ArrayInput, "B K S"] | None = None,
    return_lse: bool = False,
    implementation: Wanted = None,
    split: Split | None = None,
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
        memory: how much each slot got when it was last read; any floating dtype. What is returned has for the plan's
            slots of the past what they get now, and is as it was elsewhere: the softmax weight of the oldest of the T
            tokens, which is the mean over the query heads of a kv head.
        return_lse: whether to return the log-sum-exp of the scaled logits that were read, [B, T, N] float32.
        implementation: backend, see the module.
        split: how the arrays lie on several devices, see the module; None: on one.

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
    if memory is not None:
        memory = jnp.asarray(memory)
        checks.check_shape(op, "memory", memory, k.shape[:3], "[B, K, S], as in `k`")
        checks.check_floating(op, "memory", memory)
    if split is not None:

        def local(
            q: jax.Array, k: jax.Array, v: jax.Array, plan: SelectionPlan, lengths: jax.Array, memory: jax.Array | None
        ) -> AttentionOutput:
            options: dict[str, Any] = {"scale": scale, "return_lse": return_lse, "implementation": implementation}
            return sparse_decode_attention(q, k, v, plan, lengths, memory=memory, **options)

        remembers = memory is not None
        axes = (_plan_axes(plan), "B", "B K S" if remembers else None)
        arguments = (q, k, v, plan, lengths, memory)
        return _split_attention(split, local, arguments, axes, return_lse=return_lse, remembers=remembers)
    backend = find_backend(_call(op, q, k, plan.block_size), implementation)
    plan = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), plan)
    return _differentiable(
        op,
        lambda attend, q, k, v, scale, plan, lengths, memory: attend(
            q, k, v, plan, lengths, scale=scale, memory=memory, return_lse=return_lse
        ),
        backend,
        (q, k, v, _scale(op, scale, q.shape[-1]), plan, lengths.astype(jnp.int32), memory),
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
    split: Split | None = None,
) -> Float[Array, "B K S"]:
    """How strongly tokens look at each cache slot: the largest over T tokens of a kv head's mean weight.

    The weight of query head n of token t for slot s is `exp(scale * q[t, n] . k[s] - lse[t, n])`, of at most 1. If
    `lse` is that of attention over the whole cache, that is its softmax weight, and no more than 1 anyhow. If it is
    that of sparse attention, weights are too large by what was left out, the same factor for all slots of a query: a
    slot that was left out and mattered would weigh many times as much as all that was read, and its token would drown
    the other ones. Keys are read once for all tokens, values not at all.

    Args:
        q: queries of tokens that were read before, any floating dtype.
        k: cached keys.
        lse: log-sum-exp of each query's scaled logits, as the attention ops return it; -inf: a query does not count.
        lengths: slots of each sequence that are scored, at most S; the others, which may hold anything, get zero. There
            is no causal mask: all tokens look at all of them.
        scale: factor on the logits; H ** -0.5 if None.
        dtype: of the result.
        implementation: backend, see the module.
        split: how the arrays lie on several devices, see the module; None: on one.

    Returns:
        Scores, from 0 to 1.

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
    if split is not None:
        local = functools.partial(score_cache, scale=scale, dtype=dtype, implementation=implementation)
        arguments, axes = (q, k, lse, lengths), ("B T N H", "B K S H", "B T N", "B")
        scores: jax.Array = split.fitting(B=len(q), K=k.shape[1]).run(local, arguments, axes, "B K S")
        return scores
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


def _split_attention(
    split: Split,
    op: Callable[..., AttentionOutput],
    arguments: tuple[Any, ...],
    rest: tuple[Any, ...],
    *,
    return_lse: bool,
    return_scores: Scores = False,
    remembers: bool = False,
) -> AttentionOutput:
    """An attention op on every device; `rest` are the axes of the arguments after queries, keys and values.

    An argument that is None has None for its axes.
    """
    result: Any = AttentionOutput(
        "B T N H",  # type: ignore[arg-type]
        "B T N" if return_lse else None,  # type: ignore[arg-type]
        "B T N S" if return_scores else None,  # type: ignore[arg-type]
        "B K S" if remembers else None,  # type: ignore[arg-type]
    )
    split = split.fitting(B=len(arguments[0]), K=arguments[1].shape[1])
    attended: AttentionOutput = split.run(op, arguments, ("B T N H", "B K S H", "B K S H", *rest), result)
    return attended


def _plan_axes(plan: SelectionPlan) -> SelectionPlan:
    """The axes of a plan's arrays."""
    axes: Any = "B L K" if plan.block_ids.ndim == 4 else "B K"
    layer: Any = None if plan.layer is None else ""
    return SelectionPlan(axes, axes, plan.block_size, layer)


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
