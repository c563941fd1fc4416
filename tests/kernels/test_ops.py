"""One suite for every backend: each op against the float32 reference, and what the ops promise beyond it.

A new backend is a new entry of IMPLEMENTATIONS, or of those of the ops that it has.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import specattn_kernels as kernels
from cases import (
    PS,
    ROW_KINDS,
    SEEDS,
    SHAPES,
    Shape,
    draw_attention,
    draw_plan,
    draw_row,
    examples,
    jitted,
    rounded,
    shape_for,
)
from hypothesis import given
from hypothesis import strategies as st
from numpy_oracles import linear_threshold, nucleus_size
from specattn_kernels import SelectionPlan, reference, xla

pytestmark = pytest.mark.optimised

# Pallas kernels run in its interpreters here.
IMPLEMENTATIONS = ["xla", "pallas_triton", "pallas_tpu"]
ATTENTION_IMPLEMENTATIONS = ["xla", "pallas_triton", "pallas_tpu"]
# Those with the published bisection.
LINEAR_IMPLEMENTATIONS = ["xla", "pallas_tpu"]
TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 3e-2, jnp.float16: 4e-3}
PLAN_KINDS = st.sampled_from(["random", "empty", "single", "full"])


def assert_close(got, want, tolerance=2e-5):
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=tolerance, atol=tolerance
    )


def selected(plan):
    """The plan's ids per sequence and kv head, as sets."""
    ids, counts = np.asarray(plan.block_ids), np.asarray(plan.counts)
    return [ids[b, h, : counts[b, h]].tolist() for b, h in np.ndindex(*counts.shape)]


def skip_without(implementation, dtype):
    if implementation == "pallas_tpu" and dtype == jnp.float16:
        pytest.skip("TPUs have no float16")


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
class TestDecodeAttention:
    @examples(max_examples=25)
    @given(shape=st.sampled_from(SHAPES), seed=SEEDS, dead=st.sampled_from([np.nan, np.inf]))
    def test_matches_reference(self, implementation, shape, seed, dead):
        arguments = draw_attention(seed, shape_for(implementation, shape), dead=dead)
        op = jitted(kernels.decode_attention, return_scores=True, return_lse=True, implementation=implementation)
        got, want = op(*arguments), jitted(reference.decode_attention)(*arguments)
        assert_close(got.out, want.out)
        assert_close(got.lse, want.lse)
        assert_close(got.scores, want.scores)
        assert got.lse.dtype == got.scores.dtype == jnp.float32

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_low_precision(self, implementation, dtype):
        skip_without(implementation, dtype)
        arguments = draw_attention(3, shape_for(implementation, SHAPES[2]), dtype=dtype)
        op = jitted(kernels.decode_attention, return_scores=True, return_lse=True, implementation=implementation)
        got, want = op(*arguments), jitted(reference.decode_attention)(*arguments)
        assert got.out.dtype == dtype
        assert_close(got.out, want.out, TOLERANCE[dtype])
        assert_close(got.lse, want.lse, 1e-4)
        # Triton kernels keep logits in 16 bits where the cache has as many.
        assert_close(got.scores, want.scores, 1e-2 if implementation == "pallas_triton" else 1e-4)

    def test_float32_queries_over_a_bfloat16_cache(self, implementation):
        q, k, v, lengths = draw_attention(4, shape_for(implementation, SHAPES[2]))
        arguments = q, k.astype(jnp.bfloat16), v.astype(jnp.bfloat16), lengths
        got = jitted(kernels.decode_attention, implementation=implementation)(*arguments)
        assert got.out.dtype == jnp.float32
        assert_close(got.out, jitted(reference.decode_attention)(*arguments).out)

    def test_scores_of_the_newest_token_alone(self, implementation):
        arguments = draw_attention(5, shape_for(implementation, SHAPES[2]))
        op = jitted(kernels.decode_attention, return_scores="newest", implementation=implementation)
        assert_close(op(*arguments).scores, jitted(reference.decode_attention)(*arguments).scores[:, -1:])

    def test_optional_parts_and_scale(self, implementation):
        arguments = draw_attention(5, shape_for(implementation, SHAPES[2]), least=1)
        plain = jitted(kernels.decode_attention, implementation=implementation)(*arguments)
        assert plain.lse is None
        assert plain.scores is None
        op = jitted(kernels.decode_attention, return_lse=True, implementation=implementation)
        scaled = op(*arguments, scale=0.7)
        assert_close(scaled.lse, jitted(reference.decode_attention)(*arguments, scale=0.7).lse)

    def test_row_that_sees_nothing(self, implementation):
        q, k, v, _ = draw_attention(6, shape_for(implementation, SHAPES[3]), dead=1.0)
        op = jitted(kernels.decode_attention, return_scores=True, return_lse=True, implementation=implementation)
        got = op(q, k, v, jnp.asarray([0, q.shape[1] - 2]))
        for part, empty in ((got.out, 0.0), (got.scores, 0.0), (got.lse, -np.inf)):
            assert (part[0] == empty).all()
            assert (part[1, :2] == empty).all()
        assert np.isfinite(got.lse[1, 2:]).all()

    def test_batched_equals_single_and_vmap(self, implementation):
        q, k, v, lengths = draw_attention(7, shape_for(implementation, SHAPES[2]), least=6)
        op = jitted(kernels.decode_attention, implementation=implementation)
        together = op(q, k, v, lengths).out
        mapped = jax.vmap(lambda *row: op(*(x[None] for x in row)).out[0])(q, k, v, lengths)
        for b in range(len(lengths)):
            row = slice(b, b + 1)
            assert_close(op(q[row], k[row], v[row], lengths[row]).out, together[row], 1e-6)
        assert_close(mapped, together, 1e-6)

    def test_deterministic(self, implementation):
        arguments = draw_attention(8, shape_for(implementation, SHAPES[3]))
        op = jitted(kernels.decode_attention, return_lse=True, implementation=implementation)
        first, second = op(*arguments), op(*arguments)
        assert (first.out == second.out).all()
        assert (first.lse == second.lse).all()


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
class TestSparseDecodeAttention:
    @examples(max_examples=30)
    @given(shape=st.sampled_from(SHAPES), seed=SEEDS, kind=PLAN_KINDS, dead=st.sampled_from([np.nan, np.inf]))
    def test_matches_reference(self, implementation, shape, seed, kind, dead):
        shape = shape_for(implementation, shape)
        q, k, v, lengths = draw_attention(seed, shape, dead=dead)
        plan = draw_plan(seed, shape, lengths, kind)
        op = jitted(kernels.sparse_decode_attention, return_lse=True, implementation=implementation)
        got = op(q, k, v, plan, lengths)
        want = jitted(reference.sparse_decode_attention)(q, k, v, plan, lengths)
        assert_close(got.out, want.out)
        assert_close(got.lse, want.lse)

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

    @pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]], ids=["tokens", "blocks"])
    def test_everything_equals_dense(self, implementation, shape):
        shape = shape_for(implementation, shape)
        q, k, v, lengths = draw_attention(10, shape)
        mask = jnp.ones((shape.batch, shape.kv_heads, -(-shape.slots // shape.block_size)), bool)
        plan = kernels.compact_blocks(mask, block_size=shape.block_size)
        sparse = jitted(kernels.sparse_decode_attention, return_lse=True, implementation=implementation)
        dense = jitted(kernels.decode_attention, return_lse=True, implementation=implementation)
        got, want = sparse(q, k, v, plan, lengths), dense(q, k, v, lengths)
        assert_close(got.out, want.out, 1e-6)
        assert_close(got.lse, want.lse, 1e-6)

    @pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[5]], ids=["mask", "gather"])
    def test_nothing_equals_the_new_tokens_alone(self, implementation, shape):
        shape = shape_for(implementation, shape)
        q, k, v, lengths = draw_attention(11, shape, least=shape.tokens)
        plan = draw_plan(11, shape, lengths, "empty")
        got = jitted(kernels.sparse_decode_attention, implementation=implementation)(q, k, v, plan, lengths)
        for b, length in enumerate(np.asarray(lengths)):
            new = slice(length - shape.tokens, length)
            row = slice(b, b + 1)
            count = jnp.asarray([shape.tokens], jnp.int32)
            alone = jitted(reference.decode_attention)(q[row], k[row, :, new], v[row, :, new], count)
            assert_close(got.out[row], alone.out)

    @pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[5]], ids=["mask", "gather"])
    def test_one_plan_for_all_layers(self, implementation, shape):
        shape = shape_for(implementation, shape)
        q, k, v, lengths = draw_attention(13, shape)
        plans = [draw_plan(seed, shape, lengths, "random") for seed in (1, 2)]
        both = jax.tree.map(lambda *layers: jnp.stack(layers, axis=1), *plans)
        op = jitted(kernels.sparse_decode_attention, implementation=implementation)
        for layer, plan in enumerate(plans):
            got = op(q, k, v, both.at_layer(layer), lengths)
            want = jitted(reference.sparse_decode_attention)(q, k, v, plan, lengths)
            assert_close(got.out, want.out)

    def test_merging_past_and_new_equals_dense(self, implementation):
        shape = shape_for(implementation, SHAPES[3])
        q, k, v, lengths = draw_attention(12, shape, least=shape.tokens)
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
        assert_close(out, whole.out)
        assert_close(lse, whole.lse)


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
class TestScoreCache:
    @examples(max_examples=20)
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

    def test_low_precision_in_and_out(self, implementation):
        q, k, v, lengths = draw_attention(15, shape_for(implementation, SHAPES[2]), dtype=jnp.bfloat16)
        lse = jitted(reference.decode_attention)(q, k, v, lengths).lse
        op = jitted(kernels.score_cache, dtype=jnp.bfloat16, implementation=implementation)
        got = op(q, k, lse, lengths)
        assert got.dtype == jnp.bfloat16
        assert_close(got, jitted(reference.score_cache)(q, k, lse, lengths), 1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestTopPThreshold:
    @examples(max_examples=60)
    @given(
        padded=st.sampled_from([1, 37, 600, 4096]),
        part=st.floats(0, 1),
        kinds=st.lists(st.sampled_from(ROW_KINDS), min_size=3, max_size=3),
        p=PS,
        seed=SEEDS,
    )
    def test_exact_is_the_minimal_set(self, implementation, padded, part, kinds, p, seed):
        rng = np.random.default_rng(seed)
        size = max(1, round(part * padded))
        scores = np.stack([draw_row(rng, kind, size, padded) for kind in kinds])
        op = jitted(kernels.top_p_threshold, implementation=implementation)
        for row, threshold in zip(scores[:, :size], op(scores, p, lengths=size), strict=True):
            kept = row[row >= threshold]
            if p == 1:
                assert threshold == 0
                continue
            # The sums are float32, so p may be off by 1e-6 of itself. Kept is enough, and without its smallest is not.
            assert nucleus_size(row, p * (1 - 1e-6)) <= kept.size
            assert (kept > kept.min()).sum() < nucleus_size(row, p * (1 + 1e-6))
            assert threshold == kept.min()

    def test_long_rows(self, implementation):
        rng = np.random.default_rng(1)
        for size in (32768, 131072):
            scores = np.stack([draw_row(rng, kind, size, size) for kind in ("peaked", "flat", "equal")])
            thresholds = kernels.top_p_threshold(scores, 0.95, implementation=implementation)
            for row, threshold in zip(scores, thresholds, strict=True):
                kept = row[row >= threshold]
                assert nucleus_size(row, 0.95 * (1 - 2e-6)) <= kept.size
                assert (kept > kept.min()).sum() < nucleus_size(row, 0.95 * (1 + 2e-6))

    def test_ignores_scale(self, implementation):
        row = draw_row(np.random.default_rng(2), "peaked", 600, 600)
        op = jitted(kernels.top_p_threshold, implementation=implementation)
        assert float(op(row * 2.0**40, 0.95)) == float(op(row, 0.95)) * 2.0**40

    def test_odd_rows(self, implementation):
        rows = np.zeros((5, 37), np.float32)
        rows[1] = 1.0  # empty: its length is 0
        rows[2, :3] = np.nan, 2.0, 1.0
        rows[3, :3] = np.inf, np.inf, 1e30
        rows[4, :3] = -5.0, 1e-42, 1.0
        lengths = np.array([37, 0, 37, 37, 37])
        thresholds = np.asarray(kernels.top_p_threshold(rows, 0.6, lengths=lengths, implementation=implementation))
        assert thresholds[[0, 1, 2, 4]].tolist() == [0.0, 0.0, 2.0, 1.0]
        assert np.isfinite(thresholds[3])
        assert (rows[3] >= thresholds[3]).sum() == 2

    def test_p_per_row_traced(self, implementation):
        row = np.array([8, 4, 2, 1, 1], np.float32)
        op = jitted(kernels.top_p_threshold, implementation=implementation)
        got = op(np.stack([row] * 4), jnp.asarray([0.5, 0.7, 0.99, 1.5]))
        assert got.tolist() == [8, 4, 1, 0]
        assert kernels.top_p_threshold(row, 0.5, implementation=implementation).shape == ()

    def test_deterministic(self, implementation):
        row = draw_row(np.random.default_rng(4), "peaked", 4096, 4096)
        op = jitted(kernels.top_p_threshold, implementation=implementation)
        assert op(row, 0.95) == op(row, 0.95)


@pytest.mark.parametrize("implementation", LINEAR_IMPLEMENTATIONS)
class TestLinearThreshold:
    @examples(max_examples=25)
    @given(kind=st.sampled_from(ROW_KINDS), p=st.sampled_from([1e-6, 0.5, 0.95]), seed=SEEDS)
    def test_linear_is_the_published_bisection(self, implementation, kind, p, seed):
        row = draw_row(np.random.default_rng(seed), kind, 600, 600)
        got = float(jitted(kernels.top_p_threshold, method="linear", implementation=implementation)(row, p))
        wanted = [linear_threshold(row, p * wiggle) for wiggle in (1 - 1e-6, 1, 1 + 1e-6)]
        assert any(np.isclose(got, want, rtol=1e-6, atol=0) for want in wanted)

    def test_linear_keeps_too_much_of_a_peaked_row(self, implementation):
        row = np.exp(np.random.default_rng(0).normal(size=8192) * 2.5)
        row[0] = row[1:].sum()
        row = (row / row.sum()).astype(np.float32)
        exact = kernels.top_p_threshold(row, 0.95, implementation=implementation)
        linear = kernels.top_p_threshold(row, 0.95, method="linear", implementation=implementation)
        assert (row >= exact).sum() == nucleus_size(row, 0.95)
        assert (row >= linear).sum() > 4 * (row >= exact).sum()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestSelectBlocks:
    @examples(max_examples=40)
    @given(
        options=st.sampled_from(
            [(1, 4, 16, "exact"), (4, 0, 3, "exact"), (7, 0, 0, "exact"), (64, 5, 0, "exact"), (1, 0, 0, "linear")]
        ),
        kinds=st.lists(st.sampled_from(ROW_KINDS), min_size=4, max_size=4),
        p=PS,
        seed=SEEDS,
    )
    def test_matches_reference(self, implementation, options, kinds, p, seed):
        block_size, num_sink, num_recent, method = options
        if method == "linear" and implementation not in LINEAR_IMPLEMENTATIONS:
            method = "exact"
        rng = np.random.default_rng(seed)
        lengths = np.array([rng.choice([0, 1, 50]), rng.integers(1, 51)], np.int32)
        # Exact sums: blocks that tie in one order of summation tie in any other.
        rows = [rounded(draw_row(rng, kind, max(1, lengths[i // 2]), 50)) for i, kind in enumerate(kinds)]
        scores = np.stack(rows).reshape(2, 2, 50)
        # A p between two blocks' sums for certain: float32 sums of different order may disagree at exact ties.
        p = p if p in (1.0, 1e-6) else p + 1e-3
        static = {"block_size": block_size, "num_sink": num_sink, "num_recent": num_recent, "method": method}
        got = jitted(kernels.select_blocks, implementation=implementation, **static)(scores, p, lengths)
        want = jitted(reference.select_blocks, **static)(scores, p, lengths)
        assert got.block_size == block_size
        assert got.block_ids.shape == (2, 2, -(-50 // block_size))
        assert got.block_ids.dtype == got.counts.dtype == jnp.int32
        assert selected(got) == selected(want)

    def test_p_one_selects_all_that_is_valid(self, implementation):
        scores = np.zeros((2, 1, 50), np.float32)
        op = jitted(kernels.select_blocks, block_size=4, implementation=implementation)
        plan = op(scores, 1.0, np.array([50, 9]))
        assert selected(plan) == [list(range(13)), [0, 1, 2]]

    def test_ids_are_valid_ascending_and_distinct(self, implementation):
        scores = np.random.default_rng(0).random((2, 3, 50), np.float32)
        op = jitted(kernels.select_blocks, block_size=4, implementation=implementation)
        plan = op(scores, 0.5, np.array([50, 20]))
        for ids, blocks in zip(selected(plan), np.repeat([13, 5], 3), strict=True):
            assert ids == sorted(set(ids))
            assert set(ids) <= set(range(blocks))

    @examples(max_examples=15)
    @given(
        options=st.sampled_from(
            [
                (1, 4, 16, None),
                (1, 4, 16, 31),
                (1, 4, 16, 20),
                (1, 4, 16, 18),
                (1, 4, 16, 7),
                (4, 0, 3, 5),
                (7, 3, 0, 1),
            ]
        ),
        measure=st.sampled_from(["mass", "count"]),
        dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
        kinds=st.lists(st.sampled_from([*ROW_KINDS, "zero"]), min_size=4, max_size=4),
        p=PS,
        seed=SEEDS,
    )
    def test_counts_and_capacity_match_reference(self, implementation, options, measure, dtype, kinds, p, seed):
        block_size, num_sink, num_recent, capacity = options
        rng = np.random.default_rng(seed)
        lengths = np.array([rng.choice([0, 1, 17, 50]), rng.integers(1, 51)], np.int32)
        rows = []
        for i, kind in enumerate(kinds):
            size = max(1, lengths[i // 2])
            rows.append(rounded(draw_row(rng, "equal" if kind == "zero" else kind, size, 50)) * (kind != "zero"))
        # Bfloat16 and blocks: sums of few bits are exact in any order.
        scores = jnp.asarray(np.stack(rows).reshape(2, 2, 50), dtype)
        p = p if p in (1.0, 1e-6) else p + 1e-3
        static = {"block_size": block_size, "num_sink": num_sink, "num_recent": num_recent}
        static |= {"measure": measure, "capacity": capacity}
        got = jitted(kernels.select_blocks, implementation=implementation, **static)(scores, p, lengths)
        want = jitted(reference.select_blocks, **static)(scores, p, lengths)
        assert got.block_ids.shape == want.block_ids.shape
        assert selected(got) == selected(want)

    def test_count_is_of_valid_blocks_with_ties_and_without_zeros(self, implementation):
        scores = jnp.asarray([[[3, 0, 2, 2, 1, 0, 9, 9], [0] * 8, [0, 0, 0, 1, 0, 0, 9, 9]]], jnp.float32)
        select = jitted(kernels.select_blocks, measure="count", implementation=implementation)
        lengths = jnp.asarray([6])
        # 2 of 6 are wanted, and the second largest ties with the third.
        assert selected(select(scores, 0.33, lengths)) == [[0, 2, 3], [], [3]]
        assert selected(select(scores, 1e-9, lengths)) == [[0], [], [3]]
        assert selected(select(scores, 1.0, lengths)) == [list(range(6))] * 3

    def test_without_room_the_nucleus_gives_way(self, implementation):
        scores = jnp.ones((1, 1, 50))
        lengths = jnp.asarray([40])
        for capacity, wanted in ((12, [*range(7), *range(35, 40)]), (6, [0, *range(35, 40)]), (3, [37, 38, 39])):
            select = jitted(
                kernels.select_blocks, num_sink=2, num_recent=5, capacity=capacity, implementation=implementation
            )
            plan = select(scores, 0.9, lengths)
            assert plan.block_ids.shape == (1, 1, capacity)
            assert selected(plan) == [wanted]

    def test_p_per_kv_head_inside_a_traced_loop(self, implementation):
        scores = jnp.asarray([[[8, 4, 2, 1, 1]] * 2], jnp.float32)

        @jax.jit
        def count(lengths):
            def body(carry, p):
                plan = kernels.select_blocks(scores, p, lengths, implementation=implementation)
                return carry, plan.counts

            return jax.lax.scan(body, 0, jnp.asarray([[0.5, 0.7], [1.0, 0.99]]))[1]

        assert count(jnp.asarray([5])).tolist() == [[[1, 2]], [[5, 5]]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_compact_blocks(implementation, density):
    mask = np.random.default_rng(0).random((2, 3, 129)) < density
    plan = jitted(kernels.compact_blocks, block_size=8, implementation=implementation)(mask)
    assert selected(plan) == [np.flatnonzero(mask[b, h]).tolist() for b, h in np.ndindex(2, 3)]
    assert plan.block_size == 8
    assert plan.block_ids.shape == mask.shape


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
