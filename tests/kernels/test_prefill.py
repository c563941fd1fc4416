"""Prefill attention by every backend, against dense attention in float64."""

import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_prefill as tpu_program
from cases import SEEDS, Shape, examples, jitted
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from specattn_kernels import (
    AttentionCall,
    Device,
    backends,
    choose_implementation,
    prefill_attention,
    reference,
    xla_prefill,
)
from specattn_kernels.mosaic_gpu import prefill as mosaic_prefill
from specattn_kernels.tpu import prefill as tpu_prefill
from specattn_kernels.triton import prefill as triton_prefill

IMPLEMENTATIONS = ["xla", "pallas_triton", "pallas_tpu"]
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 5e-3, jnp.float16: 1e-3}


def shape_of(batch, tokens, heads, kv_heads, slots, head_dim):
    return Shape(batch, tokens, heads, kv_heads, slots, block_size=1, capacity=0, head_dim=head_dim)


# GQA 1, 2, 3, 4, 8; tokens and slots that are no multiple of anything, and a prompt that fills the cache.
SHAPES = [
    shape_of(2, 64, 3, 3, 300, 16),
    shape_of(1, 200, 9, 3, 700, 64),
    shape_of(3, 65, 8, 1, 129, 48),
    shape_of(2, 129, 8, 2, 333, 96),
    shape_of(1, 70, 2, 1, 70, 256),
]
TPU_SHAPES = [shape_of(2, 150, 2, 1, 408, 64), shape_of(1, 64, 3, 1, 136, 128)]
TOPOLOGIES = ["v5e:2x2", "v6e:2x2"]
MOSAIC_SHAPES = [shape_of(2, 150, 2, 1, 408, 64), shape_of(1, 64, 3, 1, 136, 128)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """As many steps as can be."""
    monkeypatch.setattr(xla_prefill, "CPU_TILE", xla_prefill.Tile(48, 64))
    monkeypatch.setattr(tpu_prefill, "ROWS", 128)
    monkeypatch.setattr(tpu_prefill, "SLOTS", 128)


def draw(seed, shape, dtype=jnp.float32, dead=np.nan):
    """q, k, v, starts; slots that are not in use hold `dead`."""
    rng = np.random.default_rng(seed)
    most = shape.slots - shape.tokens
    starts = rng.integers(0, most + 1, shape.batch)
    starts[rng.integers(shape.batch)] = rng.choice([0, most])
    q = rng.normal(size=(shape.batch, shape.tokens, shape.heads, shape.head_dim)) * rng.choice([0.3, 3.0])
    k, v = rng.normal(size=(2, shape.batch, shape.kv_heads, shape.slots, shape.head_dim))
    for b, end in enumerate(starts + shape.tokens):
        k[b, :, end:] = dead
        v[b, :, end:] = -dead
    return jnp.asarray(q, dtype), jnp.asarray(k, dtype), jnp.asarray(v, dtype), jnp.asarray(starts, jnp.int32)


def attend_in_float64(q, k, v, starts):
    """Output and lse, one sequence and head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, lse = np.zeros(q.shape), np.zeros(q.shape[:3])
    group = q.shape[2] // k.shape[1]
    for b, start in enumerate(np.asarray(starts)):
        end = start + q.shape[1]
        hidden = np.arange(end) > start + np.arange(q.shape[1])[:, None]
        for n in range(q.shape[2]):
            logits = q[b, :, n] @ k[b, n // group, :end].T * q.shape[-1] ** -0.5
            logits[hidden] = -np.inf
            top = logits.max(axis=1, keepdims=True)
            weights = np.exp(logits - top)
            total = weights.sum(axis=1, keepdims=True)
            out[b, :, n] = weights / total @ v[b, n // group, :end]
            lse[b, :, n] = (top + np.log(total))[:, 0]
    return out, lse


def relative_error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


def assert_right(op, seed, shape, dtype=jnp.float32, dead=np.nan):
    arguments = draw(seed, shape, dtype, dead)
    got, (out, lse) = op(*arguments), attend_in_float64(*arguments)
    assert got.out.dtype == dtype
    assert got.lse.dtype == jnp.float32
    assert got.scores is None
    assert relative_error(got.out, out) < TOLERANCE[dtype]
    assert np.abs(got.lse - lse).max() < 1e-4


def op_of(implementation):
    return jitted(prefill_attention, return_lse=True, implementation=implementation)


def shapes_of(implementation):
    return TPU_SHAPES if implementation == "pallas_tpu" else SHAPES


def test_the_reference():
    arguments = draw(0, SHAPES[3])
    got, (out, lse) = jitted(reference.prefill_attention)(*arguments), attend_in_float64(*arguments)
    assert relative_error(got.out, out) < 1e-6
    assert relative_error(got.lse, lse) < 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestEveryBackend:
    def test_alignment(self, implementation):
        # Values tell their slot, and queries see all slots alike: the mean is that of the slots seen.
        shape = shapes_of(implementation)[1]
        q, k, v, starts = draw(1, shape, dead=0.0)
        v = jnp.broadcast_to(jnp.arange(shape.slots, dtype=jnp.float32)[:, None], v.shape)
        out = op_of(implementation)(jnp.zeros_like(q), k, v, starts).out
        seen = np.asarray(starts)[:, None] + np.arange(shape.tokens)
        np.testing.assert_allclose(out, np.broadcast_to(seen[..., None, None] / 2, out.shape), rtol=1e-5)

    @examples(max_examples=12)
    @given(number=st.integers(0, 4), seed=SEEDS, dead=st.sampled_from([np.nan, np.inf]))
    def test_matches_float64(self, implementation, number, seed, dead):
        shapes = shapes_of(implementation)
        assert_right(op_of(implementation), seed, shapes[number % len(shapes)], dead=dead)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_low_precision(self, implementation, dtype):
        if implementation == "pallas_tpu" and dtype == jnp.float16:
            pytest.skip("TPUs know no float16")
        shape = shapes_of(implementation)[0]
        assert_right(op_of(implementation), 3, shape._replace(slots=400), dtype)

    @examples(max_examples=4)
    @given(seed=SEEDS)
    def test_chunks_give_what_the_whole_prompt_does(self, implementation, seed):
        shape = shapes_of(implementation)[0]
        shape = shape._replace(slots=max(shape.slots, 144) // 8 * 8, tokens=144)
        q, k, v, starts = draw(seed, shape)
        op, cut = op_of(implementation), int(np.random.default_rng(seed).choice([16, 128]))
        whole = op(q, k, v, starts)
        parts = [op(q[:, :cut], k, v, starts), op(q[:, cut:], k, v, starts + cut)]
        for name in ("out", "lse"):
            together = np.concatenate([getattr(part, name) for part in parts], axis=1)
            assert relative_error(together, np.asarray(getattr(whole, name))) < 1e-6

    @examples(max_examples=4)
    @given(seed=SEEDS)
    def test_padding_is_finite_and_changes_nothing(self, implementation, seed):
        shape = shapes_of(implementation)[0]._replace(batch=2)
        q, k, v, starts = draw(seed, shape)
        new = np.random.default_rng(seed).integers(-3, shape.tokens + 1, 2)
        lengths = jnp.maximum(starts + new, 0)
        dead = (jnp.arange(shape.slots) >= lengths[:, None])[:, None, :, None]
        got = op_of(implementation)(
            q, jnp.where(dead, jnp.nan, k), jnp.where(dead, jnp.nan, v), starts, lengths=lengths
        )
        want = attend_in_float64(q, k, v, starts)
        assert np.isfinite(got.out).all()
        for b, count in enumerate(new):
            if count > 0:
                assert relative_error(got.out[b, :count], want[0][b, :count]) < 1e-5
                assert np.abs(got.lse[b, :count] - want[1][b, :count]).max() < 1e-4

    def test_batched_equals_single_and_vmap(self, implementation):
        shape = shapes_of(implementation)[0]._replace(batch=2)
        arguments = draw(7, shape)
        op = op_of(implementation)
        together = op(*arguments).out
        for b in range(2):
            row = [x[b : b + 1] for x in arguments]
            np.testing.assert_allclose(op(*row).out, together[b : b + 1], rtol=1e-5, atol=1e-5)
        if implementation != "pallas_tpu":
            mapped = jax.vmap(lambda *row: op(*(x[None] for x in row)).out[0])(*arguments)
            np.testing.assert_allclose(mapped, together, rtol=1e-5, atol=1e-5)

    def test_float32_queries_over_a_bfloat16_cache_and_scale(self, implementation):
        q, k, v, starts = draw(4, shapes_of(implementation)[0]._replace(slots=400))
        k, v = k.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
        got = op_of(implementation)(q, k, v, starts, scale=0.7)
        want = jitted(reference.prefill_attention)(q, k, v, starts, scale=0.7)
        assert got.out.dtype == jnp.float32
        np.testing.assert_allclose(got.out, want.out, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got.lse, want.lse, rtol=1e-4, atol=1e-4)

    def test_derivative(self, implementation):
        if implementation == "pallas_tpu":
            pytest.skip("derivatives are those of xla")
        q, k, v, starts = draw(5, SHAPES[0], dead=0.0)

        def along(q, step):
            return jax.jvp(
                lambda q: prefill_attention(q, k, v, starts, implementation=implementation).out, (q,), (step,)
            )

        def exact(q, step):
            return jax.jvp(lambda q: reference.prefill_attention(q, k, v, starts).out, (q,), (step,))

        step = jnp.ones_like(q)
        np.testing.assert_allclose(jax.jit(along)(q, step)[1], jax.jit(exact)(q, step)[1], rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("tpu_interpreter")
def test_the_tpu_kernel_has_no_races(capsys):
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        op = jax.jit(lambda *args: prefill_attention(*args, return_lse=True, implementation="pallas_tpu"))
        assert_right(op, 6, TPU_SHAPES[0])
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, which compiles for TPUs, is not here")
def test_compiles_for_tpus():
    command = [sys.executable, tpu_program.__file__, *TOPOLOGIES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    for sizes in json.loads(done.stdout.splitlines()[-1]).values():
        for (heads, *_), size in zip(tpu_program.SHAPES, sizes, strict=True):
            # No array has both axes.
            assert size < tpu_program.BATCH * heads * tpu_program.TOKENS * tpu_program.SLOTS


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("shape", MOSAIC_SHAPES)
def test_the_mosaic_kernel(shape, dtype):
    assert_right(op_of("pallas_mosaic_gpu"), 8, shape, dtype)


def test_no_array_has_both_axes():
    shape = shape_of(1, 1024, 2, 1, 4096, 16)
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in draw(0, shape)]
    compiled = jax.jit(lambda *args: prefill_attention(*args, implementation="xla").out).lower(*arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1024 * 4096


def test_slots_beyond_the_prompt_cost_nothing():
    """The loops end with the slots in use: their number, not the cache's size, decides the steps."""
    q, k, v, starts = draw(9, shape_of(1, 64, 2, 1, 64, 16))
    room = ((0, 0), (0, 0), (0, 64 * 50), (0, 0))
    op = jitted(prefill_attention, return_lse=True, implementation="xla")
    got = op(q, jnp.pad(k, room, constant_values=jnp.nan), jnp.pad(v, room, constant_values=jnp.nan), starts)
    np.testing.assert_allclose(got.out, op(q, k, v, starts).out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("name", "module"), [("pallas_mosaic_gpu", mosaic_prefill), ("pallas_triton", triton_prefill)])
def test_lowers_for_a_gpu(monkeypatch, name, module, head_dim):
    """Through Pallas and the inference of layouts; what the GPU makes of it is not known here."""
    monkeypatch.setattr(module, "interpreted", lambda: False)
    q = jax.ShapeDtypeStruct((2, 200, 8, head_dim), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((2, 2, 1000, head_dim), jnp.bfloat16)
    starts = jax.ShapeDtypeStruct((2,), jnp.int32)
    op = jax.jit(lambda *args: prefill_attention(*args, return_lse=True, implementation=name))
    assert "prefill" in op.trace(q, cache, cache, starts).lower(lowering_platforms=("cuda",)).as_text()


HOPPER, AMPERE = Device("gpu", (9, 0), (0, 11)), Device("gpu", (8, 6), (0, 11))


@pytest.mark.parametrize(
    ("device", "head_dim", "dtype", "name"),
    [
        (HOPPER, 128, "bfloat16", "pallas_mosaic_gpu"),
        (HOPPER, 96, "bfloat16", "pallas_triton"),
        (HOPPER, 128, "float32", "xla"),
        (HOPPER, 24, "bfloat16", "xla"),
        (AMPERE, 128, "bfloat16", "pallas_triton"),
        (Device("gpu", None, (0, 11)), 128, "bfloat16", "xla"),
        (Device("gpu", (7, 5), (0, 11)), 128, "float16", "xla"),
        (Device("tpu", None, (0, 11)), 128, "bfloat16", "xla"),
        (Device("cpu", None, (0, 11)), 64, "float32", "xla"),
    ],
)
def test_who_serves(device, head_dim, dtype, name):
    call = AttentionCall("prefill_attention", (1, 8, 4096, head_dim), 512, 4, dtype, dtype)
    choice = choose_implementation(call, device)
    assert choice.name == name
    assert choice.reason


@pytest.mark.parametrize(
    ("implementation", "change", "dtype", "said"),
    [
        ("pallas_triton", {"head_dim": 24}, jnp.float32, "head dim 24; expected a multiple of 16"),
        ("pallas_mosaic_gpu", {"head_dim": 96}, jnp.float16, "head dim 96"),
        ("pallas_mosaic_gpu", {}, jnp.float32, "dtype float32; expected bfloat16 or float16"),
        ("pallas_mosaic_gpu", {"slots": 401}, jnp.float16, "401 cache slots; expected a multiple of 8"),
        ("pallas_tpu", {"head_dim": 96}, jnp.float32, "head dim 96"),
        ("pallas_tpu", {"slots": 401}, jnp.float32, "401 cache slots; expected a multiple of 8"),
        ("pallas_tpu", {}, jnp.float16, "dtypes float16 and float16; expected float32 or bfloat16"),
    ],
)
def test_what_backends_cannot_do(implementation, change, dtype, said):
    arguments = draw(0, shape_of(1, 64, 2, 1, 400, 64)._replace(**change), dtype)
    with pytest.raises(NotImplementedError, match=f"{implementation}: .*{said}.*; use implementation='xla'"):
        prefill_attention(*arguments, implementation=implementation)


def test_backends_of_other_devices_are_refused(monkeypatch):
    monkeypatch.setattr(backends, "current_device", lambda: AMPERE)
    with pytest.raises(NotImplementedError, match=r"compute capability 9.0 .*this is one of 8.6"):
        prefill_attention(*draw(0, SHAPES[1], jnp.float16), implementation="pallas_mosaic_gpu")
