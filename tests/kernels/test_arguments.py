"""Bad arguments: one sentence that names the argument, what it was and what was expected."""

import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
import specattn_kernels as kernels
from specattn_kernels import SelectionPlan

Q = jnp.zeros((2, 3, 4, 8))
K = jnp.zeros((2, 2, 10, 8))
LENGTHS = jnp.full((2,), 10, jnp.int32)
IDS = jnp.zeros((2, 2, 5), jnp.int32)
PLAN = SelectionPlan(IDS, jnp.zeros((2, 2), jnp.int32), 2)
LAYERS = SelectionPlan(IDS[:, None], PLAN.counts[:, None], 2)
SCORES = jnp.ones((2, 2, 10))


def attention(q=Q, k=K, v=K, lengths=LENGTHS, **options):
    return kernels.decode_attention(q, k, v, lengths, **options)


def prefill(starts=LENGTHS - 3, **options):
    return kernels.prefill_attention(Q, K, K, starts, **options)


def sparse(plan, **options):
    return kernels.sparse_decode_attention(Q, K, K, plan, LENGTHS, **options)


def plan(ids=IDS, counts=PLAN.counts, block_size=2):
    return SelectionPlan(ids, counts, block_size)


BAD = {
    "q rank": (lambda: attention(q=Q[0]), r"decode_attention: `q` is of shape \[3, 4, 8\], but must be \[B, T, N, H\]"),
    "k rank": (lambda: attention(k=K[0]), r"`k` is of shape \[2, 10, 8\], but must be \[B, K, S, H\]"),
    "k head dim": (lambda: attention(k=K[..., :4]), r"`k` is of shape \[2, 2, 10, 4\].*\[2, 2, 10, 8\]"),
    "v shape": (lambda: attention(v=K[:, :1]), r"`v` is of shape \[2, 1, 10, 8\].*\[2, 2, 10, 8\]"),
    "v dtype": (lambda: attention(v=K.astype(jnp.bfloat16)), "`v` is of dtype bfloat16.*`k`, float32"),
    "q dtype": (lambda: attention(q=Q.astype(jnp.int32)), "`q` is of dtype int32, but must be floating point"),
    "empty": (lambda: attention(q=Q[:, :0]), "`q` is of shape .* without an empty axis"),
    "heads": (lambda: attention(q=Q[:, :, :3]), "`q` is for 3 query heads, but must be for a multiple of the 2 kv"),
    "tokens": (lambda: attention(q=jnp.zeros((2, 11, 4, 8))), "`q` is for 11 new tokens.* at most the 10 slots"),
    "lengths shape": (lambda: attention(lengths=LENGTHS[:1]), r"`lengths` is of shape \[1\].*\[2\] \(\[B\]\)"),
    "lengths dtype": (lambda: attention(lengths=LENGTHS * 1.0), "`lengths` is of dtype float32.*integer"),
    "scale": (lambda: attention(scale=-1.0), "`scale` is -1.0, but must be above 0"),
    "scale shape": (lambda: attention(scale=jnp.ones(2)), r"`scale` is of shape \[2\]"),
    "plan type": (lambda: sparse(IDS), "`plan` is a ArrayImpl, but must be a SelectionPlan"),
    "plan ids": (lambda: sparse(plan(ids=IDS[:1])), r"`plan.block_ids` is of shape \[1, 2, 5\].*\[2, 2, 5\]"),
    "plan ids rank": (lambda: sparse(plan(ids=IDS[0])), r"`plan.block_ids` is of shape \[2, 5\].*\[B, K, P\]"),
    "plan layer axis": (lambda: sparse(plan(IDS[:, None], PLAN.counts[:, None])), "`plan.layer` is None.*layer axis"),
    "plan layer": (lambda: sparse(dataclasses.replace(PLAN, layer=jnp.int32(0))), "`plan.layer` is given.*be None"),
    "plan layer shape": (lambda: sparse(dataclasses.replace(LAYERS, layer=jnp.zeros(1, int))), r"`plan.layer`.*\[1\]"),
    "layer of none": (lambda: PLAN.at_layer(0), "at_layer: `block_ids` is without a layer axis"),
    "layer beyond": (lambda: LAYERS.at_layer(1), "at_layer: `index` is 1, but must be from 0 to 0"),
    "plan ids dtype": (lambda: sparse(plan(ids=IDS * 1.0)), "`plan.block_ids` is of dtype float32"),
    "plan counts": (lambda: sparse(plan(counts=IDS)), r"`plan.counts` is of shape \[2, 2, 5\].*\[2, 2\]"),
    "plan block": (lambda: sparse(plan(block_size=0)), "`plan.block_size` is 0, but must be a positive integer"),
    "plan capacity": (lambda: sparse(plan(block_size=3)), "`plan.block_ids` is for 5 blocks.* at most the 4"),
    "p": (lambda: kernels.top_p_threshold(SCORES, 0.0), "top_p_threshold: `p` is 0.0, but must be above 0"),
    "p shape": (lambda: kernels.top_p_threshold(SCORES, jnp.ones(3)), r"`p` is of shape \[3\].*\[2, 2\]"),
    "scores": (lambda: kernels.top_p_threshold(SCORES > 0, 0.5), "`scores` is of dtype bool"),
    "no slots": (lambda: kernels.top_p_threshold(SCORES[..., :0], 0.5), r"`scores` is of shape \[2, 2, 0\]"),
    "row lengths": (lambda: kernels.top_p_threshold(SCORES, 0.5, lengths=jnp.ones(3, int)), "`lengths` is of shape"),
    "method": (lambda: kernels.top_p_threshold(SCORES, 0.5, method="log"), "`method` is 'log', but must be 'exact' or"),
    "steps": (
        lambda: kernels.top_p_threshold(SCORES, 0.5, steps=0),
        "`steps` is 0, but must be an integer of at least 1",
    ),
    "select scores": (
        lambda: kernels.select_blocks(SCORES[0], 0.5, LENGTHS),
        r"select_blocks: `scores`.*\[B, K, S\] or \[B, L, K, S\]",
    ),
    "select lengths": (lambda: kernels.select_blocks(SCORES, 0.5, LENGTHS[:1]), "`lengths` is of shape"),
    "measure": (lambda: kernels.select_blocks(SCORES, 0.5, LENGTHS, measure="n"), "`measure` is .n..*.count."),
    "linear count": (
        lambda: kernels.select_blocks(SCORES, 0.5, LENGTHS, measure="count", method="linear"),
        "`method` is 'linear'.*'exact'",
    ),
    "no room": (lambda: kernels.select_blocks(SCORES, 0.5, LENGTHS, capacity=0), "`capacity` is 0.*at least 1"),
    "too much room": (lambda: kernels.select_blocks(SCORES, 0.5, LENGTHS, capacity=10**6), "`capacity` is 1000000"),
    "block size": (lambda: kernels.select_blocks(SCORES, 0.5, LENGTHS, block_size=2.0), "`block_size` is 2.0"),
    "sink": (lambda: kernels.select_blocks(SCORES, 0.5, LENGTHS, num_sink=-1), "`num_sink` is -1.*at least 0"),
    "recent": (lambda: kernels.select_blocks(SCORES, 0.5, LENGTHS, num_recent=-1), "`num_recent` is -1.*at least 0"),
    "mask dtype": (lambda: kernels.compact_blocks(SCORES, block_size=1), "`mask` is of dtype float32.*boolean"),
    "starts shape": (
        lambda: prefill(LENGTHS[:1]),
        r"prefill_attention: `starts` is of shape \[1\], but must be of shape \[2\]",
    ),
    "starts dtype": (lambda: prefill(jnp.zeros(2)), "prefill_attention: `starts` is of dtype float32"),
    "prefill lengths": (lambda: prefill(lengths=LENGTHS[:1]), r"prefill_attention: `lengths` is of shape \[1\]"),
    "prefill lengths dtype": (lambda: prefill(lengths=jnp.zeros(2)), "`lengths` is of dtype float32"),
    "prefill scale": (lambda: prefill(scale=-1.0), "`scale` is -1.0, but must be above 0"),
    "mask rank": (lambda: kernels.compact_blocks(SCORES[0] > 0, block_size=1), r"`mask` is of shape \[2, 10\]"),
    "merge out": (
        lambda: kernels.merge_states(Q, Q[..., 0], Q[:1], Q[..., 0]),
        "merge_states: `out_b`.*that of `out_a`",
    ),
    "merge lse": (lambda: kernels.merge_states(Q, Q, Q, Q[..., 0]), "`lse_a` is of shape"),
}


@pytest.fixture(autouse=True)
def only_our_own_checks():
    """What users have: annotations are not checked."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_errors_come_up_while_tracing():
    with pytest.raises(ValueError, match="`lengths`"):
        jax.jit(kernels.decode_attention)(Q, K, K, LENGTHS[:1])


OPS = {
    "decode_attention": attention,
    "prefill_attention": prefill,
    "sparse_decode_attention": lambda **options: sparse(PLAN, **options),
    "top_p_threshold": lambda **options: kernels.top_p_threshold(SCORES, 0.5, **options),
    "select_blocks": lambda **options: kernels.select_blocks(SCORES, 0.5, LENGTHS, **options),
    "compact_blocks": lambda **options: kernels.compact_blocks(SCORES > 0, block_size=1, **options),
}


@pytest.mark.parametrize("op", OPS)
def test_backends(op):
    """None and "xla" run; a backend that lacks the op or cannot serve refuses; an unknown name is an argument error."""
    with pytest.raises(ValueError, match=f"{op}: `implementation` is 'cuda', but must be None or one of 'xla', "):
        OPS[op](implementation="cuda")
    lacks = "" if "attention" in op else "it does not have this op; "
    with pytest.raises(NotImplementedError, match=f"{op}: pallas_mosaic_gpu: {lacks}.*expected.*use implementation="):
        OPS[op](implementation="pallas_mosaic_gpu")
    for chosen, named in zip(
        jax.tree.leaves(jax.jit(OPS[op])()),
        jax.tree.leaves(jax.jit(lambda: OPS[op](implementation="xla"))()),
        strict=True,
    ):
        assert (chosen == named).all()
