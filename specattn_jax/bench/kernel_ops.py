"""What can be called at one point of a kernel benchmark: each backend of the op, and what competes with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from specattn_kernels import (
    ATTENTION_OPS,
    SCORE_OPS,
    AttentionCall,
    Call,
    Implementation,
    SelectionCall,
    SelectionPlan,
    compact_blocks,
    compiled_implementations,
    current_device,
    decode_attention,
    score_cache,
    select_blocks,
    sparse_decode_attention,
    top_p_threshold,
)

from specattn_jax.bench.kernel_cases import Case

Inputs = tuple[jax.Array, ...]


class Contender(NamedTuple):
    """Something that can be timed.

    Attributes:
        call: takes the arrays of `make`.
        make: inputs from a seed.
        error: relative error of the outputs for the inputs, against float64; None where it is another function.
    """

    call: Callable[..., Any]
    make: Callable[[int], Inputs]
    error: Callable[[Inputs, Any], float] | None = None


class Work(NamedTuple):
    """One case.

    Attributes:
        nbytes: what has to be moved: each input that is needed read once, each output written once.
        contenders: by name; our backends under their own, baselines under theirs.
    """

    nbytes: int
    contenders: dict[str, Contender]


def make_work(case: Case) -> Work:
    """The contenders of a case on this platform."""
    makers: dict[str, Callable[[Case], Work]] = {
        "decode_attention": _dense,
        "decode_attention_scores": functools.partial(_dense, scores=True),
        "score_cache": _score,
        "sparse_decode_attention": _sparse,
        "top_p_threshold": _threshold,
        "select_blocks": _select,
        "compact_blocks": _compact,
    }
    return makers[case.op](case)


def _backends(op: str, case: Case, scores: bool = False) -> tuple[Implementation, ...]:
    """Our backends that can serve the case on this device."""
    call: Call
    if op in ATTENTION_OPS + SCORE_OPS:
        cache = case.batch, case.kv_heads, case.slots, case.head_dim
        block_size = case.block_size if op == "sparse_decode_attention" else None
        call = AttentionCall(op, cache, case.tokens, case.group, case.dtype, block_size=block_size, scores=scores)
    else:
        call = SelectionCall(op, case.batch * case.kv_heads, case.slots, case.block_size)
    return compiled_implementations(call, current_device())


def _attention_inputs(case: Case, seed: int) -> Inputs:
    """Queries, keys, values, lengths; the lengths are full."""
    dtype = jnp.dtype(case.dtype)
    q_key, k_key, v_key = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(q_key, (case.batch, case.tokens, case.kv_heads * case.group, case.head_dim), dtype)
    shape = (case.batch, case.kv_heads, case.slots, case.head_dim)
    cache = (jax.random.normal(key, shape, dtype) for key in (k_key, v_key))
    return q, *cache, jnp.full((case.batch,), case.slots, jnp.int32)


def _attention_bytes(case: Case, share: float) -> int:
    item = jnp.dtype(case.dtype).itemsize
    cache = 2 * case.batch * case.kv_heads * case.slots * case.head_dim * item
    queries = 2 * case.batch * case.tokens * case.kv_heads * case.group * case.head_dim * item
    return round(cache * share) + queries


def _attention_error(inputs: Inputs, output: Any, block_size: int = 1) -> float:
    """Of the first sequence and kv head: norm of the difference over the norm."""
    q, k, v, _, *plan = inputs
    tokens, slots = q.shape[1], k.shape[2]
    seen = np.arange(slots) <= (slots - tokens + np.arange(tokens))[:, None]
    if plan:
        chosen = np.isin(np.arange(slots) // block_size, np.asarray(plan[0][0, 0]))
        seen &= chosen | (np.arange(slots) >= slots - tokens)
    logits = np.where(seen[:, None], _logits(q, k), -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    want = np.einsum("tgs,sh->tgh", weights / weights.sum(axis=-1, keepdims=True), _float64(v[0, 0]))
    return _distance(jax.tree.leaves(output)[0][0, :, : logits.shape[1]], want)


def _logits(q: jax.Array, k: jax.Array) -> np.ndarray:
    """Float64 logits [T, G, S] of the first sequence and kv head."""
    group = q.shape[2] // k.shape[1]
    return np.einsum("tgh,sh->tgs", _float64(q[0, :, :group]), _float64(k[0, 0])) * q.shape[-1] ** -0.5


def _float64(array: jax.Array) -> np.ndarray:
    return np.asarray(array.astype(jnp.float32), np.float64)


def _distance(got: jax.Array, want: np.ndarray) -> float:
    """Norm of the difference over the norm."""
    return float(np.linalg.norm(_float64(got) - want) / np.linalg.norm(want))


def _attention_contenders(
    op: str, case: Case, call: Callable[..., Any], make: Callable[[int], Inputs], scores: bool = False
) -> dict[str, Contender]:
    """Our backends of an attention op."""
    error = functools.partial(_attention_error, block_size=case.block_size)
    return {
        str(name): Contender(functools.partial(call, implementation=name), make, error)
        for name in _backends(op, case, scores)
    }


def _dense(case: Case, scores: bool = False) -> Work:
    make = functools.partial(_attention_inputs, case)
    call = functools.partial(decode_attention, return_scores=scores)
    contenders = _attention_contenders("decode_attention", case, call, make, scores)
    if not scores:
        contenders |= _library_attention(case)
    nbytes = _attention_bytes(case, 1.0)
    if scores:
        nbytes += 4 * case.batch * case.tokens * case.kv_heads * case.group * case.slots
    return Work(nbytes, contenders)


def _score(case: Case) -> Work:
    def make(seed: int) -> Inputs:
        q, k, _, lengths = _attention_inputs(case, seed)
        # About the log-sum-exp of so many normal numbers.
        return q, k, jnp.full(q.shape[:3], np.log(case.slots) + 0.5, jnp.float32), lengths

    def call(*inputs: jax.Array, implementation: Implementation) -> jax.Array:
        return score_cache(*inputs, dtype=jnp.dtype(case.dtype), implementation=implementation)

    contenders = {
        str(name): Contender(functools.partial(call, implementation=name), make, _score_error)
        for name in _backends("score_cache", case)
    }
    slots = case.batch * case.kv_heads * case.slots
    return Work(slots * (case.head_dim + 1) * jnp.dtype(case.dtype).itemsize, contenders)


def _score_error(inputs: Inputs, output: Any) -> float:
    """Of the first sequence and kv head: norm of the difference over the norm."""
    q, k, lse, _ = inputs
    logits = _logits(q, k)
    want = np.exp(logits - _float64(lse[0, :, : logits.shape[1]])[..., None]).mean(axis=1).max(axis=0)
    return _distance(output[0, 0], want)


def _library_attention(case: Case) -> dict[str, Contender]:
    """JAX's own attention, on a cache laid out as it likes it: without the causal mask, which favours it a little."""

    def make(seed: int) -> Inputs:
        q, k, v, _ = _attention_inputs(case, seed)
        return q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)

    names = {"jax.nn (xla)": "xla"}
    if jax.default_backend() == "gpu" and case.dtype != "float32":
        names["jax.nn (cudnn)"] = "cudnn"
    return {
        name: Contender(functools.partial(jax.nn.dot_product_attention, implementation=implementation), make)
        for name, implementation in names.items()
    }


def _sparse(case: Case) -> Work:
    blocks = -(-case.slots // case.block_size)
    capacity = max(1, round(case.density * blocks))

    def make(seed: int) -> Inputs:
        order = jax.random.uniform(jax.random.key(seed + 1000), (case.batch, case.kv_heads, blocks))
        ids = jnp.sort(jnp.argsort(order, axis=-1)[..., :capacity], axis=-1).astype(jnp.int32)
        return *_attention_inputs(case, seed), ids, jnp.full(ids.shape[:2], capacity, jnp.int32)

    def call(*inputs: jax.Array, implementation: Implementation) -> Any:
        q, k, v, lengths, ids, counts = inputs
        plan = SelectionPlan(ids, counts, case.block_size)
        return sparse_decode_attention(q, k, v, plan, lengths, implementation=implementation)

    contenders = _attention_contenders("sparse_decode_attention", case, call, make)
    ids_bytes = 4 * case.batch * case.kv_heads * capacity
    return Work(_attention_bytes(case, min(1.0, capacity * case.block_size / case.slots)) + ids_bytes, contenders)


def _score_inputs(case: Case, seed: int) -> Inputs:
    """A nucleus share per row and rows like attention weights: most of the mass in a few hundredths of the slots."""
    shape = (case.batch, case.kv_heads, case.slots)
    scores = jax.nn.softmax(2.5 * jax.random.normal(jax.random.key(seed), shape), axis=-1)
    share = jnp.full(shape[:2], case.p, jnp.float32)
    return share, scores.astype(case.dtype), jnp.full((case.batch,), case.slots, jnp.int32)


def _nucleus_error(case: Case, inputs: Inputs, kept: int) -> float:
    """How far the size of the first row's selection is from that of the minimal set, found by sorting in float64."""
    row = np.asarray(inputs[1][0, 0], np.float64)
    blocks = np.pad(row, (0, -row.size % case.block_size)).reshape(-1, case.block_size).sum(axis=-1)
    mass = np.cumsum(np.sort(blocks)[::-1])
    minimal = int(np.searchsorted(mass, case.p * mass[-1])) + 1
    return abs(kept - minimal) / minimal


def _sorted_threshold(share: Float[Array, "B K"], scores: Float[Array, "B K S"]) -> Float[Array, "B K"]:
    """The nucleus threshold as it is usually found: sort, add up, look for the place."""
    descending = jnp.sort(scores, axis=-1, descending=True)
    mass = jnp.cumsum(descending, axis=-1)
    last = jnp.argmax(mass >= (share * mass[..., -1])[..., None], axis=-1)
    return jnp.take_along_axis(descending, last[..., None], axis=-1)[..., 0]


def _threshold(case: Case) -> Work:
    make = functools.partial(_score_inputs, case)

    def error(inputs: Inputs, threshold: Any) -> float:
        kept = int((np.asarray(inputs[1][0, 0]) >= np.asarray(threshold)[0, 0]).sum())
        return _nucleus_error(case, inputs, kept)

    def call(name: Implementation, share: jax.Array, scores: jax.Array, lengths: jax.Array) -> jax.Array:
        return top_p_threshold(scores, share, lengths=lengths[:, None], implementation=name)

    def by_sort(share: jax.Array, scores: jax.Array, _: jax.Array) -> jax.Array:
        return _sorted_threshold(share, scores)

    contenders = {
        str(name): Contender(functools.partial(call, name), make, error) for name in _backends("top_p_threshold", case)
    }
    contenders["sort and cumsum"] = Contender(by_sort, make, error)
    rows = case.batch * case.kv_heads
    return Work(rows * (case.slots * jnp.dtype(case.dtype).itemsize + 4), contenders)


def _select(case: Case) -> Work:
    make = functools.partial(_score_inputs, case)
    blocks = -(-case.slots // case.block_size)

    def error(inputs: Inputs, plan: Any) -> float:
        return _nucleus_error(case, inputs, int(plan.counts[0, 0]))

    def call(name: Implementation, share: jax.Array, scores: jax.Array, lengths: jax.Array) -> SelectionPlan:
        return select_blocks(scores, share, lengths, block_size=case.block_size, implementation=name)

    def block_scores(share: jax.Array, scores: jax.Array) -> jax.Array:
        padded = jnp.pad(scores, ((0, 0), (0, 0), (0, blocks * case.block_size - case.slots)))
        return padded.reshape(*scores.shape[:2], blocks, case.block_size).sum(axis=-1)

    def by_sort(share: jax.Array, scores: jax.Array, _: jax.Array) -> SelectionPlan:
        sums = block_scores(share, scores)
        chosen = sums >= _sorted_threshold(share, sums)[..., None]
        return compact_blocks(chosen, block_size=case.block_size, implementation="xla")

    def by_top_k(share: jax.Array, scores: jax.Array, _: jax.Array) -> jax.Array:
        return jnp.sort(jax.lax.top_k(block_scores(share, scores), max(1, blocks // 4))[1], axis=-1)

    contenders = {
        str(name): Contender(functools.partial(call, name), make, error) for name in _backends("select_blocks", case)
    }
    contenders["sort and cumsum"] = Contender(by_sort, make, error)
    contenders["top_k of a quarter"] = Contender(by_top_k, make)
    rows = case.batch * case.kv_heads
    # Of the ids only those of the nucleus are written, which are few.
    return Work(rows * (case.slots * jnp.dtype(case.dtype).itemsize + 4), contenders)


def _compact(case: Case) -> Work:
    def make(seed: int) -> Inputs:
        shape = (case.batch, case.kv_heads, case.slots)
        return (jax.random.uniform(jax.random.key(seed), shape) < case.density,)

    def error(inputs: Inputs, plan: Any) -> float:
        chosen = np.flatnonzero(np.asarray(inputs[0][0, 0]))
        ids = np.asarray(plan.block_ids[0, 0, : int(plan.counts[0, 0])])
        return 0.0 if np.array_equal(ids, chosen) else 1.0

    def call(name: Implementation, mask: jax.Array) -> SelectionPlan:
        return compact_blocks(mask, block_size=1, implementation=name)

    def by_sort(mask: jax.Array) -> jax.Array:
        return jnp.argsort(~mask, axis=-1, stable=True)

    contenders = {
        str(name): Contender(functools.partial(call, name), make, error) for name in _backends("compact_blocks", case)
    }
    contenders["stable argsort"] = Contender(by_sort, make)
    rows = case.batch * case.kv_heads
    return Work(rows * case.slots * 5 + 4 * rows, contenders)
