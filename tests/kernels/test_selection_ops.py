"""One suite for every backend's selection: each op against the float32 reference, and what it promises beyond it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import specattn_kernels as kernels
from cases import IMPLEMENTATIONS, PS, ROW_KINDS, SEEDS, draw_row, examples, jitted, rounded, selected
from hypothesis import given
from hypothesis import strategies as st
from numpy_oracles import linear_threshold, nucleus_size
from specattn_kernels import reference

# Those with the published bisection.
LINEAR_IMPLEMENTATIONS = ["xla", "pallas_tpu"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestTopPThreshold:
    @pytest.mark.optimised
    @examples(max_examples=30)
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
    @pytest.mark.optimised
    @examples(max_examples=12)
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
    @pytest.mark.optimised
    @examples(max_examples=20)
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

    @pytest.mark.parametrize(
        ("measure", "block_size", "capacity"),
        [
            ("mass", 1, None),
            ("count", 4, 5),
            *(
                pytest.param(*one, marks=pytest.mark.slow)
                for one in (
                    ("mass", 4, 5),
                    ("count", 1, None),
                    *((measure, *rest) for measure in ("mass", "count") for rest in ((1, 5), (4, None))),
                )
            ),
        ],
    )
    def test_many_layers_are_selected_as_each_alone(self, implementation, measure, block_size, capacity):
        rng = np.random.default_rng(5)
        scores, lengths = rng.random((2, 3, 2, 50), np.float32) ** 8, np.array([50, 17], np.int32)
        p = rng.uniform(0.2, 1.1, (2, 3, 2)).astype(np.float32)
        static = {"num_sink": 1, "num_recent": 3}
        static |= {"measure": measure, "block_size": block_size, "capacity": capacity}
        op = jitted(kernels.select_blocks, implementation=implementation, **static)
        plan = op(scores, p, lengths)
        assert plan.counts.shape == (2, 3, 2)
        for layer in range(3):
            one = plan.at_layer(layer)
            assert one.block_ids is plan.block_ids
            assert selected(one.take_layer()) == selected(op(scores[:, layer], p[:, layer], lengths))

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

    @pytest.mark.optimised
    @examples(max_examples=15)
    @given(
        # Few, because each is compiled.
        options=st.sampled_from(
            [
                (1, 4, 16, None, "count", jnp.float32),
                (1, 4, 16, 31, "count", jnp.bfloat16),
                (1, 4, 16, 20, "mass", jnp.float32),
                (1, 4, 16, 18, "count", jnp.float32),
                (1, 4, 16, 7, "mass", jnp.bfloat16),
                (4, 0, 3, 5, "mass", jnp.float32),
                (7, 3, 0, 1, "count", jnp.bfloat16),
            ]
        ),
        kinds=st.lists(st.sampled_from([*ROW_KINDS, "zero"]), min_size=4, max_size=4),
        p=PS,
        seed=SEEDS,
    )
    def test_counts_and_capacity_match_reference(self, implementation, options, kinds, p, seed):
        block_size, num_sink, num_recent, capacity, measure, dtype = options
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
    layers = jitted(kernels.compact_blocks, block_size=8, implementation=implementation)(mask[:, None])
    assert layers.block_ids.shape == (2, 1, 3, 129)
    assert selected(layers.at_layer(0).take_layer()) == selected(plan)
