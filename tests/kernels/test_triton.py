"""What only the Triton kernels decide: tiles, splits, passes over long rows, and that they lower for a GPU."""

import warnings

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
    TOLERANCE,
    Shape,
    draw_attention,
    draw_plan,
    draw_row,
    examples,
    jitted,
    selected,
)
from hypothesis import given
from hypothesis import strategies as st
from numpy_oracles import nucleus_size
from specattn_kernels import Device, SelectionPlan
from specattn_kernels.triton import attention, long_rows, merge, selection, short_rows

SMALL_TILES = (
    (selection, {"TILE_SLOTS": 1024}),
    (short_rows, {"ROW_SLOTS": 1024}),
    (long_rows, {"TILE_SLOTS": 1024, "KEPT_TOGETHER": 1024, "SAMPLED": 64}),
)


class TestAttention:
    def test_many_splits_agree_with_one(self, monkeypatch):
        shape = Shape(2, 5, 4, 2, 700, 4, 175)
        q, k, v, lengths = draw_attention(30, shape, least=400)
        plan = draw_plan(30, shape, lengths, "full")
        results = []
        for step_bytes, programs in ((1, 1 << 10), (1 << 20, 1)):
            monkeypatch.setattr(attention, "STEP_BYTES", step_bytes)
            monkeypatch.setattr(attention, "USUAL_CORES", programs)
            # Compiled anew: the settings are read while tracing.
            op = jax.jit(lambda *args: kernels.sparse_decode_attention(*args, implementation="pallas_triton").out)
            results.append(op(q, k, v, plan, lengths))
        np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("shape", "said"),
        [
            (Shape(1, 1, 2, 2, 20, 1, 4, head_dim=24), "head dim 24; expected a multiple of 16"),
            (Shape(1, 1, 2, 2, 20, 1, 4, head_dim=272), "head dim 272"),
            (Shape(1, 16, 16, 1, 20, 1, 4), "256 query rows per kv head"),
        ],
    )
    def test_what_it_cannot_do(self, shape, said):
        q, k, v, lengths = draw_attention(31, shape)
        with pytest.raises(NotImplementedError, match=said):
            kernels.decode_attention(q, k, v, lengths, implementation="pallas_triton")

    @pytest.mark.parametrize("head_dim", [16, 48, 80, 96, 128, 160, 256])
    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_steps_are_powers_of_two_and_fit(self, head_dim, dtype):
        cache = jax.ShapeDtypeStruct((2, 4, 4096, head_dim), dtype)
        tile = attention._choose_tile(cache, 20, None)
        assert tile.block & (tile.block - 1) == 0
        assert 2 * tile.block * head_dim * jnp.dtype(dtype).itemsize <= attention.STEP_BYTES
        assert sum(width for _, width in tile.parts) == head_dim

    def test_steps_are_smaller_where_shared_memory_is(self, monkeypatch):
        cache = jax.ShapeDtypeStruct((2, 4, 4096, 128), jnp.bfloat16)
        blocks = []
        for capability in ((9, 0), (8, 9)):
            device = Device("gpu", capability, (0, 11))
            monkeypatch.setattr(attention, "current_device", lambda device=device: device)
            blocks.append(attention._choose_tile(cache, 20, None).block)
        assert blocks[0] == 2 * blocks[1]

    @pytest.mark.parametrize("sparse", [False, True])
    def test_derivatives_are_those_of_xla(self, sparse):
        shape = SHAPES[2]
        q, k, v, lengths = draw_attention(32, shape, dead=0.0, least=shape.tokens)
        plan = draw_plan(32, shape, lengths, "random")

        def gradient(implementation):
            def loss(q, k, v):
                if sparse:
                    out = kernels.sparse_decode_attention(q, k, v, plan, lengths, implementation=implementation).out
                else:
                    out = kernels.decode_attention(q, k, v, lengths, implementation=implementation).out
                return (out**2).sum()

            return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

        for got, want in zip(gradient("pallas_triton"), gradient("xla"), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def small_tiles():
    """Rows above 1,024 slots take several programs, with functions compiled once for all examples."""
    with pytest.MonkeyPatch.context() as patch:
        for module, sizes in SMALL_TILES:
            for name, value in sizes.items():
                patch.setattr(module, name, value)
        threshold = jax.jit(lambda scores, p, lengths: selection.top_p_threshold(scores, p, lengths=lengths))
        select = jax.jit(
            lambda scores, p, lengths: kernels.select_blocks(
                scores, p, lengths, num_sink=4, num_recent=16, implementation="pallas_triton"
            )
        )
        yield threshold, select


def is_the_nucleus(row, threshold, p, error=1e-6):
    """Whether a threshold's set is the minimal one, up to the rounding of float32 sums."""
    kept = row[row >= threshold]
    enough = nucleus_size(row, p * (1 - error)) <= kept.size
    return enough and (kept > kept.min()).sum() < nucleus_size(row, p * (1 + error)) and threshold == kept.min()


class TestLongRows:
    """Several programs a row."""

    @examples(max_examples=20)
    @given(
        kinds=st.lists(st.sampled_from(ROW_KINDS), min_size=3, max_size=3),
        sizes=st.lists(st.integers(1, 5000), min_size=3, max_size=3),
        p=PS,
        seed=SEEDS,
    )
    def test_exact_is_the_minimal_set(self, small_tiles, kinds, sizes, p, seed):
        rng = np.random.default_rng(seed)
        scores = np.stack([draw_row(rng, kind, size, 5000) for kind, size in zip(kinds, sizes, strict=True)])
        thresholds = np.asarray(small_tiles[0](scores, jnp.full(3, p, jnp.float32), jnp.asarray(sizes)))
        for row, size, threshold in zip(scores, sizes, thresholds, strict=True):
            assert threshold == 0 if p == 1 else is_the_nucleus(row[:size], threshold, p)

    @examples(max_examples=10)
    @given(kinds=st.lists(st.sampled_from(ROW_KINDS), min_size=4, max_size=4), p=PS, seed=SEEDS)
    def test_selects_as_xla_does(self, small_tiles, kinds, p, seed):
        rng = np.random.default_rng(seed)
        lengths = np.array([rng.choice([0, 1, 5000]), rng.integers(1, 5001)], np.int32)
        rows = [draw_row(rng, kind, max(1, lengths[i // 2]), 5000) for i, kind in enumerate(kinds)]
        scores = np.stack(rows).reshape(2, 2, 5000)
        got = small_tiles[1](scores, p, lengths)
        thresholds = np.asarray(
            jitted(kernels.top_p_threshold, implementation="xla")(scores, p, lengths=lengths[:, None])
        )
        for b, h in np.ndindex(2, 2):
            row, length = scores[b, h, : lengths[b]], lengths[b]
            ids = np.asarray(got.block_ids[b, h, : got.counts[b, h]])
            forced = (np.arange(length) < 4) | (np.arange(length) >= length - 16)
            chosen = np.isin(np.arange(length), ids)
            assert (np.diff(ids) > 0).all()
            assert chosen[forced].all()
            if length and p < 1:
                near = np.isclose(row, thresholds[b, h], rtol=1e-3) & (row > 0)
                assert (chosen == (row >= thresholds[b, h]) | forced)[~near].all()
            assert p < 1 or chosen.all()

    @pytest.mark.parametrize(
        ("measure", "dtype"),
        [
            ("mass", jnp.float32),
            pytest.param("count", jnp.bfloat16, marks=pytest.mark.slow),
            pytest.param("mass", jnp.bfloat16, marks=pytest.mark.slow),
            pytest.param("count", jnp.float32, marks=pytest.mark.slow),
        ],
    )
    def test_the_same_as_one_program_a_row(self, monkeypatch, measure, dtype):
        rng = np.random.default_rng(11)
        scores = np.exp(rng.normal(size=(2, 2, 5000)) * 2.5).astype(np.float32)
        scores[0, 1] = rng.integers(0, 4, 5000)
        scores[1, 0, ::3], scores[1, 0, 1::7], scores[1, 0, 5] = np.nan, -1, np.inf
        scores[1, 1] = 0
        lengths = jnp.asarray([4567, 5000])
        plans = []
        for sizes in ({}, dict(SMALL_TILES)):
            for module, values in sizes.items():
                for name, value in values.items():
                    monkeypatch.setattr(module, name, value)
            # Compiled anew: the settings are read while tracing.
            select = jax.jit(
                lambda scores, p: kernels.select_blocks(
                    *(scores, p, lengths), measure=measure, capacity=2000, num_recent=9, implementation="pallas_triton"
                )
            )
            plans.append([selected(select(jnp.asarray(scores, dtype), p)) for p in (0.01, 0.501, 0.951, 1.0)])
        assert plans[0] == plans[1]

    @pytest.mark.parametrize("sampled", [0.0, 1e-6, 1.0])
    def test_a_sample_that_misleads(self, small_tiles, sampled):
        rng = np.random.default_rng(9)
        scores = np.exp(rng.normal(size=(3, 5000))).astype(np.float32)
        stride = -(-5000 // (long_rows.SAMPLED // long_rows.SAMPLED_TOGETHER))
        is_sampled = np.arange(5000) % stride < long_rows.SAMPLED_TOGETHER
        scores *= np.where(is_sampled, sampled, 1.0 if sampled < 1 else 1e-5)
        for p in (0.5, 0.95):
            thresholds = np.asarray(small_tiles[0](scores, jnp.full(3, p), jnp.full(3, 5000)))
            assert all(is_the_nucleus(row, threshold, p) for row, threshold in zip(scores, thresholds, strict=True))

    def test_ends_of_the_range(self, small_tiles):
        rows = np.zeros((6, 5000), np.float32)
        rows[1] = 1.0
        rows[2, :3] = np.nan, 2.0, 1.0
        rows[3, :3] = np.inf, np.inf, 1e30
        rows[4, ::1000] = -5.0, 1e-42, 1.0, 1.0, -np.inf
        rows[5] = np.arange(5000) % 7
        p = jnp.asarray([0.6, 0.6, 0.6, 0.6, 0.6, -1.0])
        lengths = jnp.asarray([5000, 0, 5000, 5000, 5000, 5000])
        halves = (slice(0, 3), slice(3, 6))
        thresholds = np.concatenate([small_tiles[0](rows[half], p[half], lengths[half]) for half in halves])
        assert thresholds[[0, 1, 2, 4, 5]].tolist() == [0.0, 0.0, 2.0, 1.0, 6.0]
        assert (rows[3] >= thresholds[3]).sum() == 2

    def test_same_bits_twice(self, small_tiles):
        rows = [draw_row(np.random.default_rng(seed), "peaked", 5000, 5000) for seed in range(4)]
        scores = np.stack(rows).reshape(2, 2, 5000)
        first, second = (small_tiles[1](scores, 0.95, np.array([4567, 5000], np.int32)) for _ in range(2))
        assert selected(first) == selected(second)
        assert (first.counts == second.counts).all()


@pytest.mark.parametrize(("block_size", "slots"), [(1, 300), (8, 301), (16, 4096)])
def test_selection_of_low_precision_scores(block_size, slots):
    rng = np.random.default_rng(6)
    scores = jnp.asarray(np.exp(rng.normal(size=(2, 2, slots)) * 2), jnp.bfloat16)
    lengths = jnp.asarray([slots, slots // 2])
    got, want = (
        jax.jit(
            lambda scores, lengths, name=name: kernels.select_blocks(
                scores, 0.9, lengths, block_size=block_size, num_recent=3, implementation=name
            )
        )(scores, lengths)
        for name in ("pallas_triton", "xla")
    )
    assert selected(got) == selected(want)


def test_selection_under_vmap():
    scores = np.random.default_rng(7).random((3, 2, 2, 1100), np.float32) ** 8
    lengths = np.array([[1100, 100], [5, 7], [0, 1099]], np.int32)
    got, want = (
        jax.jit(jax.vmap(lambda *row, name=name: kernels.select_blocks(row[0], 0.9, row[1], implementation=name)))(
            scores, lengths
        )
        for name in ("pallas_triton", "xla")
    )
    for row in range(3):
        assert selected(jax.tree.map(lambda x, i=row: x[i], got)) == selected(jax.tree.map(lambda x, i=row: x[i], want))


def test_what_selection_cannot_do():
    with pytest.raises(NotImplementedError, match="method 'linear'; expected 'exact'; use implementation='xla'"):
        kernels.top_p_threshold(jnp.ones(4), 0.5, method="linear", implementation="pallas_triton")
    with pytest.raises(NotImplementedError, match=r"fewer than 2 \*\* 31"):
        jax.eval_shape(
            lambda x: kernels.top_p_threshold(x, 0.5, implementation="pallas_triton"),
            jax.ShapeDtypeStruct((1 << 15, 1 << 16), jnp.float32),
        )


@pytest.fixture
def lower_for_a_gpu(monkeypatch):
    """Lowers a function as far as a machine without a GPU can: through Pallas to the text that XLA compiles."""
    for module in (attention, merge, selection, short_rows, long_rows):
        monkeypatch.setattr(module, "interpreted", lambda: False)

    def lower(function, *arguments):
        with warnings.catch_warnings():
            # Upstream wants Mosaic to be used in its place.
            warnings.filterwarnings("ignore", message=".*Triton.*", category=DeprecationWarning)
            return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()

    return lower


class TestLowering:
    """Every kernel gets through Pallas's lowering; what the GPU makes of it is not known here."""

    @pytest.mark.parametrize(
        ("dtype", "head_dim"), [(jnp.float32, 64), (jnp.float16, 96), (jnp.bfloat16, 128), (jnp.float32, 256)]
    )
    def test_attention(self, lower_for_a_gpu, dtype, head_dim):
        q = jax.ShapeDtypeStruct((2, 6, 8, head_dim), dtype)
        cache = jax.ShapeDtypeStruct((2, 2, 1000, head_dim), dtype)
        lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
        options = {"return_lse": True, "implementation": "pallas_triton"}
        text = lower_for_a_gpu(
            lambda *args: kernels.decode_attention(*args, return_scores=True, **options), q, cache, cache, lengths
        )
        assert "dense_decode" in text
        for block_size in (1, 64):
            plan = jax.eval_shape(
                lambda mask, size=block_size: kernels.compact_blocks(mask, block_size=size),
                jax.ShapeDtypeStruct((2, 2, -(-1000 // block_size)), jnp.bool_),
            )
            text = lower_for_a_gpu(
                lambda q, k, v, lengths, plan: kernels.sparse_decode_attention(q, k, v, plan, lengths, **options),
                *(q, cache, cache, lengths, plan),
            )
            assert "sparse_decode" in text

    def test_a_layers_plan_is_read_where_it_lies(self, lower_for_a_gpu):
        q = jax.ShapeDtypeStruct((2, 6, 8, 64), jnp.bfloat16)
        cache = jax.ShapeDtypeStruct((2, 2, 1000, 64), jnp.bfloat16)
        lengths, layer = jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
        ids, counts = jax.ShapeDtypeStruct((2, 7, 2, 90), jnp.int32), jax.ShapeDtypeStruct((2, 7, 2), jnp.int32)
        text = lower_for_a_gpu(
            lambda q, k, v, lengths, plan, layer: kernels.sparse_decode_attention(
                q, k, v, plan.at_layer(layer), lengths, implementation="pallas_triton"
            ),
            *(q, cache, cache, lengths, SelectionPlan(ids, counts, 1), layer),
        )
        assert "tensor<2x7x2x90xi32>" in text
        assert "tensor<2x2x90xi32>" not in text
        assert "tensor<2x1x2x90xi32>" not in text

    @pytest.mark.parametrize(
        ("slots", "block_size", "dtype", "measure", "capacity"),
        [
            (37, 1, jnp.float32, "mass", None),
            (300, 1, jnp.bfloat16, "count", 7),
            (8192, 16, jnp.bfloat16, "mass", 100),
            (32768, 1, jnp.float32, "count", None),
            (32768, 1, jnp.bfloat16, "mass", 8192),
            (65536, 1, jnp.bfloat16, "mass", None),
            (100_001, 1, jnp.bfloat16, "count", 8192),
            (131_072, 1, jnp.float32, "mass", None),
        ],
    )
    def test_selection(self, lower_for_a_gpu, slots, block_size, dtype, measure, capacity):
        text = lower_for_a_gpu(
            lambda scores, lengths: kernels.select_blocks(
                *(scores, 0.95, lengths),
                block_size=block_size,
                num_sink=4,
                num_recent=16,
                measure=measure,
                capacity=capacity,
                implementation="pallas_triton",
            ),
            jax.ShapeDtypeStruct((2, 8, slots), dtype),
            jax.ShapeDtypeStruct((2,), jnp.int32),
        )
        wanted = ["select_in_rows", "write_chosen"]
        if not short_rows.fits_one_program(slots // block_size):
            wanted = [
                "sum_tiles",
                "sample_bracket",
                "keep_bracket",
                "finish_threshold",
                "count_chosen",
                "write_chosen",
            ]
        assert all(name in text for name in wanted)
