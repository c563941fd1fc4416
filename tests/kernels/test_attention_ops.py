"""One suite for every backend's attention: each op against the float32 reference, and what the ops promise beyond it.

A new backend is a new entry of `cases.IMPLEMENTATIONS`, or of those of the ops that it has.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import specattn_kernels as kernels
from cases import (
    IMPLEMENTATIONS,
    SEEDS,
    SHAPES,
    TOLERANCE,
    Shape,
    assert_close,
    draw_attention,
    draw_plan,
    dtype_for,
    examples,
    jitted,
    shape_for,
    takes_example,
)
from hypothesis import given
from hypothesis import strategies as st
from specattn_kernels import SelectionPlan, reference, xla

# The interpreter of Mosaic takes minutes.
ATTENTION_IMPLEMENTATIONS = [*IMPLEMENTATIONS, pytest.param("pallas_mosaic_gpu", marks=pytest.mark.slow)]
PLAN_KINDS = st.sampled_from(["random", "empty", "single", "full"])


def skip_without(implementation, dtype):
    if implementation == "pallas_tpu" and dtype == jnp.float16:
        pytest.skip("TPUs have no float16")


def has_scores(implementation):
    return implementation != "pallas_mosaic_gpu"


def tolerance_for(implementation, least=2e-5):
    return max(least, TOLERANCE[dtype_for(implementation)]) if implementation == "pallas_mosaic_gpu" else least


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
class TestDecodeAttention:
    @pytest.mark.optimised
    @examples(max_examples=12)
    @given(shape=st.sampled_from(SHAPES), seed=SEEDS, dead=st.sampled_from([np.nan, np.inf]))
    def test_matches_reference(self, implementation, shape, seed, dead):
        if not takes_example(implementation, seed):
            return
        arguments = draw_attention(seed, shape_for(implementation, shape), dead=dead, dtype=dtype_for(implementation))
        scores = has_scores(implementation)
        op = jitted(kernels.decode_attention, return_scores=scores, return_lse=True, implementation=implementation)
        got, want = op(*arguments), jitted(reference.decode_attention)(*arguments)
        assert_close(got.out, want.out, tolerance_for(implementation))
        assert_close(got.lse, want.lse, tolerance_for(implementation))
        assert got.lse.dtype == jnp.float32
        if scores:
            assert_close(got.scores, want.scores)
            assert got.scores.dtype == jnp.float32

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_low_precision(self, implementation, dtype):
        skip_without(implementation, dtype)
        arguments = draw_attention(3, shape_for(implementation, SHAPES[2]), dtype=dtype)
        scores = has_scores(implementation)
        op = jitted(kernels.decode_attention, return_scores=scores, return_lse=True, implementation=implementation)
        got, want = op(*arguments), jitted(reference.decode_attention)(*arguments)
        assert got.out.dtype == dtype
        assert_close(got.out, want.out, TOLERANCE[dtype])
        assert_close(got.lse, want.lse, 1e-4)
        # Triton kernels keep logits in 16 bits where the cache has as many.
        if scores:
            assert_close(got.scores, want.scores, 1e-2 if implementation == "pallas_triton" else 1e-4)

    def test_float32_queries_over_a_bfloat16_cache(self, implementation):
        if implementation == "pallas_mosaic_gpu":
            pytest.skip("takes queries in the dtype of the cache alone")
        q, k, v, lengths = draw_attention(4, shape_for(implementation, SHAPES[2]), dtype=dtype_for(implementation))
        arguments = q, k.astype(jnp.bfloat16), v.astype(jnp.bfloat16), lengths
        got = jitted(kernels.decode_attention, implementation=implementation)(*arguments)
        assert got.out.dtype == jnp.float32
        assert_close(got.out, jitted(reference.decode_attention)(*arguments).out)

    def test_scores_of_the_newest_token_alone(self, implementation):
        if not has_scores(implementation):
            pytest.skip("returns no scores")
        arguments = draw_attention(5, shape_for(implementation, SHAPES[2]), dtype=dtype_for(implementation))
        op = jitted(kernels.decode_attention, return_scores="newest", implementation=implementation)
        assert_close(op(*arguments).scores, jitted(reference.decode_attention)(*arguments).scores[:, -1:])

    def test_optional_parts_and_scale(self, implementation):
        arguments = draw_attention(5, shape_for(implementation, SHAPES[2]), least=1, dtype=dtype_for(implementation))
        plain = jitted(kernels.decode_attention, implementation=implementation)(*arguments)
        assert plain.lse is None
        assert plain.scores is None
        op = jitted(kernels.decode_attention, return_lse=True, implementation=implementation)
        scaled = op(*arguments, scale=0.7)
        want = jitted(reference.decode_attention)(*arguments, scale=0.7)
        assert_close(scaled.lse, want.lse, tolerance_for(implementation))

    def test_row_that_sees_nothing(self, implementation):
        q, k, v, _ = draw_attention(6, shape_for(implementation, SHAPES[3]), dead=1.0, dtype=dtype_for(implementation))
        scores = has_scores(implementation)
        op = jitted(kernels.decode_attention, return_scores=scores, return_lse=True, implementation=implementation)
        got = op(q, k, v, jnp.asarray([0, q.shape[1] - 2]))
        for part, empty in ((got.out, 0.0), (got.lse, -np.inf), *([(got.scores, 0.0)] if scores else [])):
            assert (part[0] == empty).all()
            assert (part[1, :2] == empty).all()
        assert np.isfinite(got.lse[1, 2:]).all()

    def test_batched_equals_single_and_vmap(self, implementation):
        q, k, v, lengths = draw_attention(
            7, shape_for(implementation, SHAPES[2]), least=6, dtype=dtype_for(implementation)
        )
        op = jitted(kernels.decode_attention, implementation=implementation)
        together = op(q, k, v, lengths).out
        mapped = jax.vmap(lambda *row: op(*(x[None] for x in row)).out[0])(q, k, v, lengths)
        for b in range(len(lengths)):
            row = slice(b, b + 1)
            assert_close(
                op(q[row], k[row], v[row], lengths[row]).out, together[row], tolerance_for(implementation, 1e-6)
            )
        assert_close(mapped, together, tolerance_for(implementation, 1e-6))

    def test_deterministic(self, implementation):
        arguments = draw_attention(8, shape_for(implementation, SHAPES[3]), dtype=dtype_for(implementation))
        op = jitted(kernels.decode_attention, return_lse=True, implementation=implementation)
        first, second = op(*arguments), op(*arguments)
        assert (first.out == second.out).all()
        assert (first.lse == second.lse).all()


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
class TestSparseDecodeAttention:
    @pytest.mark.optimised
    @examples(max_examples=12)
    @given(shape=st.sampled_from(SHAPES), seed=SEEDS, kind=PLAN_KINDS, dead=st.sampled_from([np.nan, np.inf]))
    def test_matches_reference(self, implementation, shape, seed, kind, dead):
        if not takes_example(implementation, seed):
            return
        shape = shape_for(implementation, shape)
        q, k, v, lengths = draw_attention(seed, shape, dead=dead, dtype=dtype_for(implementation))
        plan = draw_plan(seed, shape, lengths, kind)
        op = jitted(kernels.sparse_decode_attention, return_lse=True, implementation=implementation)
        got = op(q, k, v, plan, lengths)
        want = jitted(reference.sparse_decode_attention)(q, k, v, plan, lengths)
        assert_close(got.out, want.out, tolerance_for(implementation))
        assert_close(got.lse, want.lse, tolerance_for(implementation))

    @pytest.mark.parametrize(
        ("shape", "dtype"), [(SHAPES[2], jnp.float16), (SHAPES[5], jnp.bfloat16)], ids=["mask", "gather"]
    )
    def test_low_precision(self, implementation, shape, dtype):
        skip_without(implementation, dtype)
        shape = shape_for(implementation, shape)
        q, k, v, lengths = draw_attention(9, shape, dtype=dtype)
        plan = draw_plan(9, shape, lengths, "random")
        op = jitted(kernels.sparse_decode_attention, return_lse=True, implementation=implementation)
        got, want = op(q, k, v, plan, lengths), jitted(reference.sparse_decode_attention)(q, k, v, plan, lengths)
        assert got.out.dtype == dtype
        assert_close(got.out, want.out, TOLERANCE[dtype])
        assert_close(got.lse, want.lse, 1e-4)

    @pytest.mark.parametrize(
        "shape", [SHAPES[0], pytest.param(SHAPES[2], marks=pytest.mark.slow)], ids=["tokens", "blocks"]
    )
    def test_everything_equals_dense(self, implementation, shape):
        shape = shape_for(implementation, shape)
        q, k, v, lengths = draw_attention(10, shape, dtype=dtype_for(implementation))
        mask = jnp.ones((shape.batch, shape.kv_heads, -(-shape.slots // shape.block_size)), bool)
        plan = kernels.compact_blocks(mask, block_size=shape.block_size)
        sparse = jitted(kernels.sparse_decode_attention, return_lse=True, implementation=implementation)
        dense = jitted(kernels.decode_attention, return_lse=True, implementation=implementation)
        got, want = sparse(q, k, v, plan, lengths), dense(q, k, v, lengths)
        assert_close(got.out, want.out, tolerance_for(implementation, 1e-6))
        assert_close(got.lse, want.lse, tolerance_for(implementation, 1e-6))

    @pytest.mark.parametrize(
        "shape", [pytest.param(SHAPES[2], marks=pytest.mark.slow), SHAPES[5]], ids=["mask", "gather"]
    )
    def test_nothing_equals_the_new_tokens_alone(self, implementation, shape):
        shape = shape_for(implementation, shape)
        q, k, v, lengths = draw_attention(11, shape, least=shape.tokens, dtype=dtype_for(implementation))
        plan = draw_plan(11, shape, lengths, "empty")
        got = jitted(kernels.sparse_decode_attention, implementation=implementation)(q, k, v, plan, lengths)
        for b, length in enumerate(np.asarray(lengths)):
            new = slice(length - shape.tokens, length)
            row = slice(b, b + 1)
            count = jnp.asarray([shape.tokens], jnp.int32)
            alone = jitted(reference.decode_attention)(q[row], k[row, :, new], v[row, :, new], count)
            assert_close(got.out[row], alone.out, tolerance_for(implementation))

    @pytest.mark.parametrize(
        "shape", [pytest.param(SHAPES[2], marks=pytest.mark.slow), SHAPES[5]], ids=["mask", "gather"]
    )
    def test_one_plan_for_all_layers(self, implementation, shape):
        shape = shape_for(implementation, shape)
        q, k, v, lengths = draw_attention(13, shape, dtype=dtype_for(implementation))
        plans = [draw_plan(seed, shape, lengths, "random") for seed in (1, 2)]
        both = jax.tree.map(lambda *layers: jnp.stack(layers, axis=1), *plans)
        op = jitted(kernels.sparse_decode_attention, implementation=implementation)
        for layer, plan in enumerate(plans):
            got = op(q, k, v, both.at_layer(layer), lengths)
            want = jitted(reference.sparse_decode_attention)(q, k, v, plan, lengths)
            assert_close(got.out, want.out, tolerance_for(implementation))

    @pytest.mark.optimised
    @examples(max_examples=12)
    @given(shape=st.sampled_from(SHAPES), seed=SEEDS, kind=PLAN_KINDS, dead=st.sampled_from([np.nan, np.inf]))
    def test_remembers_what_the_slots_got(self, implementation, shape, seed, kind, dead):
        if not takes_example(implementation, seed):
            return
        shape = shape_for(implementation, shape)
        q, k, v, lengths = draw_attention(seed, shape, dead=dead, dtype=dtype_for(implementation))
        plan = draw_plan(seed, shape, lengths, kind)
        memory = jnp.asarray(np.random.default_rng(seed).random(k.shape[:3]), jnp.float32)
        op = jitted(kernels.sparse_decode_attention, implementation=implementation)
        got = op(q, k, v, plan, lengths, memory=memory)
        want = jitted(reference.sparse_decode_attention)(q, k, v, plan, lengths, memory=memory)
        assert_close(got.out, want.out, tolerance_for(implementation))
        assert_close(got.memory, want.memory, tolerance_for(implementation))
        slots, past = np.arange(shape.slots), np.asarray(lengths - shape.tokens)[:, None, None]
        untouched = ~np.asarray(kernels.plan_slots(plan, shape.slots)) | (slots >= past)
        np.testing.assert_array_equal(np.asarray(got.memory)[untouched], np.asarray(memory)[untouched])

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_remembers_in_low_precision_and_of_one_layer(self, implementation, dtype):
        skip_without(implementation, dtype)
        shape = shape_for(implementation, SHAPES[5])
        q, k, v, lengths = draw_attention(15, shape, dtype=dtype)
        plans = [draw_plan(seed, shape, lengths, "random") for seed in (1, 2)]
        both = jax.tree.map(lambda *layers: jnp.stack(layers, axis=1), *plans)
        memory = jnp.full(k.shape[:3], 0.5, dtype)
        op = jitted(kernels.sparse_decode_attention, implementation=implementation)
        got = op(q, k, v, both.at_layer(1), lengths, memory=memory).memory
        want = jitted(reference.sparse_decode_attention)(q, k, v, plans[1], lengths, memory=memory).memory
        assert got.dtype == dtype
        # Triton kernels keep logits in 16 bits where the cache has as many.
        assert_close(got, want, 2e-2)

    def test_merging_past_and_new_equals_dense(self, implementation):
        shape = shape_for(implementation, SHAPES[3])
        q, k, v, lengths = draw_attention(12, shape, least=shape.tokens, dtype=dtype_for(implementation))
        blocks = -(-shape.slots // shape.block_size)
        mask = np.random.default_rng(0).random((shape.batch, shape.kv_heads, blocks)) < 0.5
        first = kernels.compact_blocks(mask, block_size=shape.block_size)
        # Only one side may hold the new tokens, so the other is computed by hand.
        whole = jitted(kernels.decode_attention, return_lse=True, implementation=implementation)(q, k, v, lengths)
        sparse = jitted(kernels.sparse_decode_attention, return_lse=True, implementation=implementation)
        a = sparse(q, k, v, first, lengths)
        past = np.arange(shape.slots) < np.asarray(lengths - shape.tokens)[:, None]
        rest = np.repeat(~mask, shape.block_size, axis=-1)[:, :, None, : shape.slots] & past[:, None, None]
        rest = np.broadcast_to(rest, (shape.batch, shape.heads, shape.tokens, shape.slots))
        b = jitted(reference.attend, scale=None)(q, k, v, rest)
        out, lse = jitted(kernels.merge_states)(a.out, a.lse, b.out, b.lse)
        assert_close(out, whole.out, tolerance_for(implementation))
        assert_close(lse, whole.lse, tolerance_for(implementation))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestScoreCache:
    @pytest.mark.optimised
    @examples(max_examples=10)
    @given(shape=st.sampled_from(SHAPES), seed=SEEDS, dead=st.sampled_from([np.nan, np.inf]))
    def test_matches_reference(self, implementation, shape, seed, dead):
        q, k, v, lengths = draw_attention(seed, shape_for(implementation, shape), dead=dead)
        lse = jitted(reference.decode_attention)(q, k, v, lengths).lse
        got = jitted(kernels.score_cache, implementation=implementation)(q, k, lse, lengths)
        assert_close(got, jitted(reference.score_cache)(q, k, lse, lengths))

    def test_is_the_largest_mean_of_the_weights_of_the_past(self, implementation):
        shape = shape_for(implementation, SHAPES[2])
        q, k, v, lengths = draw_attention(14, shape, least=shape.tokens)
        past = lengths - shape.tokens
        dense = jitted(reference.decode_attention)(q, k, v, lengths)
        got = jitted(kernels.score_cache, implementation=implementation)(q, k, dense.lse, past)
        weights = np.asarray(dense.scores).reshape(*q.shape[:2], shape.kv_heads, -1, shape.slots)
        want = weights.mean(axis=3).max(axis=1) * (np.arange(shape.slots) < np.asarray(past)[:, None, None])
        assert_close(got, want)

    def test_what_sparse_attention_left_out_weighs_no_more_than_all(self, implementation):
        shape = shape_for(implementation, SHAPES[2])
        q, k, _, lengths = draw_attention(16, shape, least=shape.slots)
        # One key that all queries want, and a log-sum-exp of those that did not read it.
        k = k.at[:, :, 7].set(40.0 * q[:, 0, :: q.shape[2] // shape.kv_heads])
        lse = jnp.full(q.shape[:3], -5.0)
        got = jitted(kernels.score_cache, implementation=implementation)(q, k, lse, lengths)
        assert_close(got, jitted(reference.score_cache)(q, k, lse, lengths))
        assert float(got.max()) == 1.0

    def test_low_precision_in_and_out(self, implementation):
        q, k, v, lengths = draw_attention(15, shape_for(implementation, SHAPES[2]), dtype=jnp.bfloat16)
        lse = jitted(reference.decode_attention)(q, k, v, lengths).lse
        op = jitted(kernels.score_cache, dtype=jnp.bfloat16, implementation=implementation)
        got = op(q, k, lse, lengths)
        assert got.dtype == jnp.bfloat16
        assert_close(got, jitted(reference.score_cache)(q, k, lse, lengths), 1e-2)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_merge_states(dtype):
    rng = np.random.default_rng(0)
    out_a, out_b = (jnp.asarray(rng.normal(size=(2, 3, 4, 8)), dtype) for _ in range(2))
    lse_a, lse_b = (jnp.asarray(rng.normal(size=(2, 3, 4)) * 50, jnp.float32) for _ in range(2))
    lse_a, lse_b = lse_a.at[0].set(-jnp.inf), lse_b.at[:, 0].set(-jnp.inf)
    out_a, out_b = out_a.at[0].set(0), out_b.at[:, 0].set(0)
    got, want = (jitted(op)(out_a, lse_a, out_b, lse_b) for op in (kernels.merge_states, reference.merge_states))
    assert got[0].dtype == dtype
    assert_close(got[0], want[0], TOLERANCE[dtype])
    assert_close(got[1], want[1], 1e-6)
    assert (got[1][0, 0] == -jnp.inf).all()
    assert (got[0][0, 0] == 0).all()


@pytest.mark.optimised
class TestXlaPaths:
    """The choices that only the XLA implementation makes."""

    @pytest.fixture
    def in_chunks(self, monkeypatch):
        """Sends calls with more logits than nothing through the loop, 128 slots a time."""
        monkeypatch.setattr(xla, "SINGLE_PASS_LOGITS_BYTES", 0)
        monkeypatch.setattr(xla, "CHUNK_LOGITS_BYTES", 0)

    @pytest.mark.parametrize(("dtype", "least"), [(jnp.float32, 0), (jnp.bfloat16, 300)])
    def test_chunks_match_reference(self, in_chunks, least, dtype):
        shape = Shape(2, 16, 8, 2, 300, 16, 19)
        q, k, v, lengths = draw_attention(20, shape, dtype=dtype, least=least)
        plan = draw_plan(20, shape, lengths, "random")
        dense = jax.jit(lambda *args: kernels.decode_attention(*args, return_lse=True))
        sparse = jax.jit(lambda *args: kernels.sparse_decode_attention(*args, return_lse=True))
        assert "while" in dense.lower(q, k, v, lengths).as_text()
        for got, want in (
            (dense(q, k, v, lengths), jitted(reference.decode_attention)(q, k, v, lengths)),
            (sparse(q, k, v, plan, lengths), jitted(reference.sparse_decode_attention)(q, k, v, plan, lengths)),
        ):
            assert_close(got.out, want.out, TOLERANCE[dtype])
            assert_close(got.lse, want.lse, 1e-4)

    def test_chunks_stop_at_the_longest_length(self, in_chunks):
        shape = Shape(2, 16, 8, 2, 300, 16, 19)
        q, k, v, _ = draw_attention(21, shape, dead=1.0)
        lengths = jnp.asarray([20, 100])
        got = kernels.decode_attention(q, k.at[:, :, 128:].set(jnp.nan), v.at[:, :, 128:].set(jnp.nan), lengths)
        assert_close(got.out, jitted(reference.decode_attention)(q, k, v, lengths).out)

    def test_temporaries_of_a_prefill_chunk(self):
        q = jax.ShapeDtypeStruct((1, 1024, 8, 64), jnp.float32)
        cache = jax.ShapeDtypeStruct((1, 8, 16384, 64), jnp.float32)
        compiled = jax.jit(kernels.decode_attention).lower(q, cache, cache, jax.ShapeDtypeStruct((1,), jnp.int32))
        logits = 4 * 1024 * 8 * 16384
        assert compiled.compile().memory_analysis().temp_size_in_bytes < logits / 4

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_temporaries_of_a_decode_step(self, dtype):
        """One layer of values and the logits, nothing more: under 5 % of the cache from 13 layers on."""
        q = jax.ShapeDtypeStruct((1, 5, 9, 64), dtype)
        cache = jax.ShapeDtypeStruct((1, 3, 8192, 64), dtype)
        lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
        plan = jax.eval_shape(lambda m: kernels.compact_blocks(m, block_size=1), jnp.zeros((1, 3, 8192), bool))
        layer = 3 * 8192 * 64 * jnp.dtype(dtype).itemsize
        logits = 4 * 5 * 9 * 8192
        for op, arguments in (
            (kernels.decode_attention, (q, cache, cache, lengths)),
            (kernels.sparse_decode_attention, (q, cache, cache, plan, lengths)),
        ):
            compiled = jax.jit(op).lower(*arguments).compile()
            assert compiled.memory_analysis().temp_size_in_bytes < layer + 3.5 * logits

    def test_small_calls_are_differentiable(self):
        q, k, v, lengths = draw_attention(22, SHAPES[2], dead=0.0, least=1)

        def gradient(op):
            return jax.jit(jax.grad(lambda *qkv: (op(*qkv, lengths).out ** 2).sum(), argnums=(0, 1, 2)))(q, k, v)

        full = np.asarray(lengths) >= SHAPES[2].tokens
        for got, want in zip(gradient(kernels.decode_attention), gradient(reference.decode_attention), strict=True):
            assert np.isfinite(got).all()
            assert_close(got[full], want[full], 1e-4)


def test_plan_is_a_pytree_with_static_block_size():
    plan = SelectionPlan(jnp.zeros((1, 1, 2), jnp.int32), jnp.ones((1, 1), jnp.int32), 4)
    assert len(jax.tree.leaves(plan)) == 2
    assert jax.tree.map(lambda x: x, plan).block_size == 4
