"""The Mosaic GPU kernel beyond what the suite of all backends looks at: interpreted, and lowered for a Hopper GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import specattn_kernels as kernels
from cases import Shape, draw_attention, draw_plan, jitted
from specattn_kernels import Device, SelectionPlan, backends, reference
from specattn_kernels.mosaic_gpu import attention

# Several tiles for every consumer of every split, and lengths that are no multiple of anything.
SHAPES = [
    Shape(2, 5, 2, 1, 1208, 32, 37, head_dim=64),
    Shape(1, 3, 8, 1, 584, 64, 9, head_dim=128),
    Shape(2, 16, 8, 2, 600, 16, 37, head_dim=64),
]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    monkeypatch.setattr(attention, "WANTED_PROGRAMS", 4)


def assert_right(shape, seed, kind, dtype=jnp.float16, change=lambda plan: plan, tolerance=4e-3):
    q, k, v, lengths = draw_attention(seed, shape, dtype=dtype)
    plan = change(draw_plan(seed, shape, lengths, kind))
    op = jitted(kernels.sparse_decode_attention, return_lse=True, implementation="pallas_mosaic_gpu")
    got, want = op(q, k, v, plan, lengths), reference.sparse_decode_attention(q, k, v, plan, lengths)
    for x, y in ((got.out, want.out), (got.lse, want.lse)):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=tolerance, atol=tolerance)
    return got


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=["32", "64", "16"])
def test_matches_reference(shape):
    for seed, kind in enumerate(["random", "full", "single", "empty"]):
        assert_right(shape, seed + 10, kind)


@pytest.mark.slow
def test_bfloat16_and_same_bits_twice():
    first, second = (assert_right(SHAPES[1], 3, "full", jnp.bfloat16, tolerance=3e-2) for _ in range(2))
    assert (first.out == second.out).all()
    assert (first.lse == second.lse).all()


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_ids_outside_the_cache_are_not_read(wrong):
    def change(plan):
        third = jnp.arange(plan.block_ids.shape[2]) % 3 == 1
        return SelectionPlan(jnp.where(third, wrong, plan.block_ids), plan.counts, plan.block_size)

    shape = SHAPES[1]
    q, k, v, lengths = draw_attention(12, shape, dtype=jnp.float16)
    plan = draw_plan(12, shape, lengths, "full")
    changed = change(plan)
    ids = [i for i in np.asarray(changed.block_ids).reshape(-1) if i != wrong]
    without = SelectionPlan(jnp.asarray(ids, jnp.int32)[None, None], jnp.asarray([[len(ids)]], jnp.int32), 64)
    op = jitted(kernels.sparse_decode_attention, implementation="pallas_mosaic_gpu")
    want = reference.sparse_decode_attention(q, k, v, without, lengths)
    np.testing.assert_allclose(
        np.asarray(op(q, k, v, changed, lengths).out, np.float32), np.asarray(want.out, np.float32), atol=4e-3
    )


@pytest.mark.slow
def test_dense():
    arguments = draw_attention(5, SHAPES[0], dtype=jnp.float16)
    op = jitted(kernels.decode_attention, return_lse=True, implementation="pallas_mosaic_gpu")
    got, want = op(*arguments), reference.decode_attention(*arguments)
    np.testing.assert_allclose(np.asarray(got.out, np.float32), np.asarray(want.out, np.float32), atol=4e-3)
    np.testing.assert_allclose(got.lse, want.lse, atol=1e-4)
    with pytest.raises(NotImplementedError, match="returns no scores"):
        kernels.decode_attention(*arguments, return_scores=True, implementation="pallas_mosaic_gpu")


@pytest.mark.parametrize(
    ("shape", "dtype", "said"),
    [
        (SHAPES[0]._replace(block_size=8), jnp.float16, "block_size at least 16"),
        (SHAPES[0]._replace(head_dim=96), jnp.float16, "head dim 96; expected 64 or 128"),
        (SHAPES[0], jnp.float32, "dtype float32; expected bfloat16 or float16"),
        (SHAPES[0]._replace(slots=1201), jnp.float16, "1201 cache slots; expected a multiple of 8"),
        (SHAPES[0]._replace(tokens=33), jnp.float16, "66 query rows"),
    ],
)
def test_what_it_cannot_do(shape, dtype, said):
    q, k, v, lengths = draw_attention(31, shape, dtype=dtype)
    plan = draw_plan(31, shape, lengths, "empty")
    with pytest.raises(NotImplementedError, match=f"pallas_mosaic_gpu: .*{said}.*; use implementation='xla'"):
        kernels.sparse_decode_attention(q, k, v, plan, lengths, implementation="pallas_mosaic_gpu")


def test_queries_in_another_dtype():
    q, k, v, lengths = draw_attention(31, SHAPES[0], dtype=jnp.float16)
    with pytest.raises(NotImplementedError, match="queries in float32 over a cache in float16"):
        kernels.decode_attention(q.astype(jnp.float32), k, v, lengths, implementation="pallas_mosaic_gpu")


def test_other_gpus_are_refused(monkeypatch):
    q, k, v, lengths = draw_attention(31, SHAPES[0], dtype=jnp.float16)
    for device, said in (
        (Device("gpu", (8, 0), (0, 11)), "this is one of 8.0"),
        (Device("gpu", None, (0, 11)), "this is another"),
    ):
        monkeypatch.setattr(backends, "current_device", lambda device=device: device)
        with pytest.raises(NotImplementedError, match=f"compute capability 9.0 .*{said}"):
            kernels.decode_attention(q, k, v, lengths, implementation="pallas_mosaic_gpu")


# By default every block size once, and every head dim with several.
@pytest.mark.parametrize(
    ("block_size", "head_dim", "dtype"),
    [
        pytest.param(block_size, head_dim, dtype, marks=[] if (place + half) % 2 else pytest.mark.slow)
        for place, block_size in enumerate([None, 16, 32, 64, 128])
        for half, (head_dim, dtype) in enumerate([(64, jnp.float16), (128, jnp.bfloat16)])
    ],
)
def test_lowers_for_a_gpu(monkeypatch, block_size, head_dim, dtype):
    """Through Pallas and the inference of layouts; what the GPU makes of it is not known here."""
    monkeypatch.setattr(attention, "interpreted", lambda: False)
    q = jax.ShapeDtypeStruct((2, 6, 8, head_dim), dtype)
    cache = jax.ShapeDtypeStruct((2, 2, 1000, head_dim), dtype)
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    options = {"return_lse": True, "implementation": "pallas_mosaic_gpu"}
    arguments: tuple[object, ...]
    if block_size is None:
        function = jax.jit(lambda q, k, v, lengths: kernels.decode_attention(q, k, v, lengths, **options))
        arguments, name = (q, cache, cache, lengths), "mosaic_dense_decode"
    else:
        # Of five layers, whose plans are read where they lie.
        ids, counts = jax.ShapeDtypeStruct((2, 5, 2, 7), jnp.int32), jax.ShapeDtypeStruct((2, 5, 2), jnp.int32)
        plan = SelectionPlan(ids, counts, block_size, jax.ShapeDtypeStruct((), jnp.int32))
        function = jax.jit(
            lambda q, k, v, plan, lengths: kernels.sparse_decode_attention(q, k, v, plan, lengths, **options)
        )
        arguments, name = (q, cache, cache, plan, lengths), "mosaic_sparse_decode"
    text = function.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert name in text
    assert "2x2x7xi32" not in text
