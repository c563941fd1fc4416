"""The float32 reference against float64 numpy."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import PS, ROW_KINDS, SEEDS, SHAPES, draw_attention, draw_plan, draw_row, examples, jitted
from hypothesis import given
from hypothesis import strategies as st
from numpy_oracles import attend, linear_threshold, nucleus_size, visible_slots
from specattn_kernels import reference


@examples(max_examples=12)
@given(shape=st.sampled_from(SHAPES), seed=SEEDS)
def test_decode_attention(shape, seed):
    q, k, v, lengths = draw_attention(seed, shape)
    out, lse, scores, _ = jitted(reference.decode_attention)(q, k, v, lengths)
    expected = attend(q, k, v, visible_slots(q, k, lengths))
    for got, want in zip((out, lse, scores), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


@examples(max_examples=12)
@given(shape=st.sampled_from(SHAPES), seed=SEEDS, kind=st.sampled_from(["random", "empty", "single", "full"]))
def test_sparse_decode_attention(shape, seed, kind):
    q, k, v, lengths = draw_attention(seed, shape)
    plan = draw_plan(seed, shape, lengths, kind)
    out, lse, scores, _ = jitted(reference.sparse_decode_attention)(q, k, v, plan, lengths)
    expected = attend(q, k, v, visible_slots(q, k, lengths, plan))
    for got, want in zip((out, lse, scores), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


@examples(max_examples=30)
@given(size=st.integers(1, 300), kind=st.sampled_from(ROW_KINDS), p=PS, seed=SEEDS)
def test_top_p_threshold(size, kind, p, seed):
    row = draw_row(np.random.default_rng(seed), kind, size, 300)
    threshold = float(jitted(reference.top_p_threshold)(jnp.asarray(row), p, lengths=jnp.int32(size)))
    kept = row[:size][row[:size] >= threshold].astype(np.float64)
    if p == 1:
        assert threshold == 0
    else:
        fewest, most = nucleus_size(row[:size], p * (1 - 2e-6)), nucleus_size(row[:size], p * (1 + 2e-6))
        assert fewest <= kept.size
        assert (kept > kept.min()).sum() < most
    linear = float(jitted(reference.top_p_threshold, method="linear")(jnp.asarray(row), p, lengths=jnp.int32(size)))
    wanted = [linear_threshold(row[:size], p * wiggle) for wiggle in (1 - 2e-6, 1, 1 + 2e-6)]
    assert p == 1 or any(np.isclose(linear, want, rtol=1e-5, atol=0) for want in wanted)


def test_select_blocks_by_hand():
    scores = jnp.asarray([[[0.05, 0.1, 0.2, 0.3, 0.05, 0.0, 0.3, jnp.nan]]])
    plan = jitted(reference.select_blocks, block_size=2)(scores, 0.5, jnp.asarray([7]))
    # Blocks hold 0.15, 0.5, 0.05 and 0.3.
    assert plan.block_ids[0, 0, : plan.counts[0, 0]].tolist() == [1]
    op = jitted(reference.select_blocks, block_size=2, num_sink=1, num_recent=2)
    plan = op(scores, 0.5, jnp.asarray([7]))
    assert plan.block_ids[0, 0, : plan.counts[0, 0]].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("cut", [0, 7, 20])
def test_merge_states(cut):
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(1, 2, 1, 4)), rng.normal(size=(1, 1, 20, 4)), rng.normal(size=(1, 1, 20, 4))
    everything = np.ones((1, 1, 2, 20), bool)
    first = everything & (np.arange(20) < cut)
    (out_a, lse_a, _), (out_b, lse_b, _) = attend(q, k, v, first), attend(q, k, v, ~first)
    out, lse = reference.merge_states(*(jnp.asarray(x, jnp.float32) for x in (out_a, lse_a, out_b, lse_b)))
    expected = attend(q, k, v, everything)
    np.testing.assert_allclose(out, expected[0], atol=1e-6)
    np.testing.assert_allclose(lse, expected[1], atol=1e-6)
