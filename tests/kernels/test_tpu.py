"""What only the TPU kernels decide; what they share with the others is in test_*_ops.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import specattn_kernels as kernels
from cases import SHAPES, assert_close, draw_attention, draw_plan, draw_row, jitted, selected, shape_for
from jax.experimental.pallas import tpu as pltpu
from specattn_kernels import SelectionPlan, reference
from specattn_kernels.tpu import attention

pytestmark = pytest.mark.usefixtures("tpu_interpreter")

SHAPE = shape_for("pallas_tpu", SHAPES[2])


@pytest.fixture
def no_races(tpu_interpreter, capsys):
    """Looks for races between copies and computation."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    assert "RACE DETECTED" not in capsys.readouterr().out


def attend(q, k, v, plan, lengths):
    return kernels.sparse_decode_attention(q, k, v, plan, lengths, implementation="pallas_tpu")


@pytest.mark.usefixtures("no_races")
def test_attention_without_races():
    q, k, v, lengths = draw_attention(40, SHAPE, least=100)
    plan = draw_plan(40, SHAPE, lengths, "full")
    want = jitted(reference.sparse_decode_attention)(q, k, v, plan, lengths)
    assert_close(jax.jit(attend)(q, k, v, plan, lengths).out, want.out)


@pytest.mark.usefixtures("no_races")
def test_selection_without_races():
    rng, lengths = np.random.default_rng(41), jnp.asarray([200])
    scores = jnp.asarray(np.stack([draw_row(rng, kind, 200, 200) for kind in ("peaked", "sink")])[None])
    options = {"block_size": 16, "num_sink": 1, "num_recent": 1}
    plan = jax.jit(lambda x: kernels.select_blocks(x, 0.9, lengths, implementation="pallas_tpu", **options))(scores)
    assert selected(plan) == selected(reference.select_blocks(scores, 0.9, lengths, **options))


def test_a_plan_without_room():
    q, k, v, lengths = draw_attention(44, SHAPE)
    ids = jnp.zeros((SHAPE.batch, SHAPE.kv_heads, 0), jnp.int32)
    plan = SelectionPlan(ids, jnp.zeros(ids.shape[:2], jnp.int32), SHAPE.block_size)
    want = reference.sparse_decode_attention(q, k, v, plan, lengths)
    assert_close(jax.jit(attend)(q, k, v, plan, lengths).out, want.out)


def test_as_many_calls_as_scalar_memory_wants(monkeypatch):
    q, k, v, lengths = draw_attention(42, SHAPE)
    plan = draw_plan(42, SHAPE, lengths, "random")
    monkeypatch.setattr(attention, "SCALAR_BYTES", 4 * SHAPE.capacity)
    op = jax.jit(lambda *arguments: attend(*arguments).out)
    assert op.trace(q, k, v, plan, lengths).jaxpr.pretty_print().count("name=sparse_decode") == 2
    want = jitted(reference.sparse_decode_attention)(q, k, v, plan, lengths)
    assert_close(op(q, k, v, plan, lengths), want.out)


@pytest.mark.parametrize(
    ("change", "dtype", "said"),
    [
        ({"block_size": 8}, jnp.float32, r"block size 8; expected one of \(16, 32, 64, 128\)"),
        ({"head_dim": 96}, jnp.float32, "head dim 96"),
        ({"slots": 200}, jnp.bfloat16, "200 cache slots; expected a multiple of 16"),
        ({"tokens": 129}, jnp.float32, "258 query rows per kv head"),
        ({}, jnp.float16, "dtypes float16 and float16; expected float32 or bfloat16"),
    ],
    ids=["block", "head", "slots", "rows", "dtype"],
)
def test_what_it_cannot_do(change, dtype, said):
    shape = SHAPE._replace(**change)
    q, k, v, lengths = draw_attention(43, shape, dtype=dtype)
    plan = draw_plan(43, shape, lengths, "empty")
    with pytest.raises(NotImplementedError, match=f"{said}.*; use implementation='xla'"):
        attend(q, k, v, plan, lengths)


@pytest.mark.parametrize(
    ("tokens", "slots", "said"),
    [
        (16, 1 << 19, "scores of 16 query rows over 524288 cache slots"),
        (8, 64, "64 cache slots; expected a multiple of 8 of at least 128"),
    ],
)
def test_dense_attention_that_does_not_fit(tokens, slots, said):
    q, cache = (jax.ShapeDtypeStruct((1, *shape, 128), jnp.float32) for shape in ((tokens, 1), (1, slots)))
    with pytest.raises(NotImplementedError, match=said):
        jax.eval_shape(
            lambda q, k, lengths: kernels.decode_attention(
                q, k, k, lengths, return_scores=True, implementation="pallas_tpu"
            ),
            q,
            cache,
            jax.ShapeDtypeStruct((1,), jnp.int32),
        )


def test_rows_that_do_not_fit():
    with pytest.raises(NotImplementedError, match="rows of 600000 scores"):
        jax.eval_shape(
            lambda scores: kernels.top_p_threshold(scores, 0.5, implementation="pallas_tpu"),
            jax.ShapeDtypeStruct((600_000,), jnp.float32),
        )
