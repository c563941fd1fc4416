"""Prompts read in chunks: the same logits as in one pass, chunks by memory, and no work for slots not in use."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from specattn_kernels import xla_prefill
from tiny import causal_attention, tiny_config, tiny_model

from specattn_jax.decoding.protocol import Models
from specattn_jax.models.cache import KVCache, Reach
from specattn_jax.models.forward import forward, prefill, read_sequence
from specattn_jax.models.transformer import abstract_model
from specattn_jax.runtime import session as session_module
from specattn_jax.runtime.session import Session

# Tiles are changed below.
pytestmark = pytest.mark.usefixtures("own_programs")

VOCABULARY, PADDED = 64, 256
TOLERANCE = 1e-4
# Lengths at the borders of chunks as often as anywhere else.
PROMPT_LENGTHS = st.integers(1, PADDED) | st.sampled_from([63, 64, 65, 127, 128, 129, 191, 193, PADDED])
MODELS = {
    heads // kv_heads: {"num_heads": heads, "num_kv_heads": kv_heads} for heads, kv_heads in ((2, 2), (4, 2), (4, 1))
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Blocks and chunks of attention that are no multiples of those of prompts."""
    monkeypatch.setattr(xla_prefill, "CPU_TILE", xla_prefill.Tile(48, 40))


@functools.cache
def model_of(group):
    return tiny_model(group, scale=4.0, vocab_size=VOCABULARY, **MODELS[group])


@jax.jit
def read_in_one_pass(model, tokens):
    """Logits of every position, without a cache."""
    return model.logits(read_sequence(model, tokens, causal_attention))


def draw_prompts(seed, lengths):
    """Prompts on the left of rows of random padding."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, (len(lengths), PADDED)).astype(np.int32)


def read_in_chunks(model, tokens, lengths, chunk, slots=PADDED, fill=0.0):
    """Logits of each prompt's last token, and the cache, which held `fill` before."""
    cache = jax.tree.map(
        lambda leaf: jnp.full_like(leaf, fill) if leaf.ndim > 1 else leaf,
        KVCache.empty(model.config, len(lengths), slots, model.dtype),
    )
    hidden, cache = prefill(model, jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32), cache, chunk=chunk)
    return np.asarray(model.logits(hidden)), cache


@pytest.mark.parametrize("group", [2, *(pytest.param(other, marks=pytest.mark.slow) for other in (1, 4))])
@settings(deadline=None, derandomize=True, database=None, max_examples=12)
@given(seed=st.integers(0, 2**31 - 1), lengths=st.lists(PROMPT_LENGTHS, min_size=3, max_size=3))
def test_chunks_give_the_logits_of_one_pass(group, seed, lengths):
    model, tokens = model_of(group), draw_prompts(seed, lengths)
    one_pass = np.asarray(read_in_one_pass(model, tokens))
    want = one_pass[np.arange(3), np.asarray(lengths) - 1]
    assert want.std() > 0.1, "the logits must not be flat"
    for chunk in (64, 128, PADDED):
        got, cache = read_in_chunks(model, tokens, lengths, chunk, fill=np.nan)
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
        np.testing.assert_array_equal(cache.lengths, lengths)


def test_padding_may_hold_anything():
    model, lengths = model_of(2), [200, 65, 1]
    tokens = draw_prompts(0, lengths)
    others = np.where(np.arange(PADDED) < np.asarray(lengths)[:, None], tokens, draw_prompts(1, lengths))
    got = [read_in_chunks(model, padded, lengths, 64)[0] for padded in (tokens, others)]
    np.testing.assert_array_equal(*got)


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 2, 4])
def test_sessions_read_on_alike_after_any_chunk(group):
    """The next token's logits too, which read what the chunks have left in the cache."""
    model, lengths = model_of(group), [129, 64, 17]
    tokens = draw_prompts(group, lengths)
    prompts = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    next_tokens, logits = [], []
    for chunk in (64, 128, None):
        state = Session(Models(model)).prefill(prompts, 1, chunk=chunk)
        next_tokens.append(np.asarray(state.last[:, 1]))
        logits.append(np.asarray(model.logits(forward(model, state.last[:, 1:], state.target_cache).hidden[:, 0])))
    tokens[np.arange(3), lengths] = next_tokens[0]
    one_pass = np.asarray(read_in_one_pass(model, tokens))
    np.testing.assert_array_equal(next_tokens, 3 * [one_pass[np.arange(3), np.asarray(lengths) - 1].argmax(-1)])
    for got in logits:
        np.testing.assert_allclose(got, one_pass[np.arange(3), lengths], rtol=0, atol=TOLERANCE)


@functools.cache
def shapes_of_width(width):
    return abstract_model(tiny_config(embed_dim=width), jnp.float32)


@given(
    batch=st.integers(1, 16),
    longest=st.integers(1, 200_000),
    fits=st.integers(1, 300_000),
    draft_width=st.sampled_from([16, 64]),
)
@settings(deadline=None, derandomize=True, database=None)
def test_chunks_are_the_largest_equal_parts_that_fit(batch, longest, fits, draft_width):
    models = [shapes_of_width(width) for width in (32, draft_width)]
    per_token = max(model.config.activation_bytes(4) for model in models)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "_ACTIVATION_BYTES_ON_CPU", fits * batch * per_token)
        chunk = session_module._largest_chunk(models, batch, longest)
    assert chunk % 64 == 0
    # What is rounded up to a multiple may reach beyond by less than that.
    room = max(fits, 64)
    assert chunk < room + 64
    parts = -(-longest // chunk)
    # As few parts as can be, and none has more padding than rounding up asks for.
    assert parts <= -(-longest // room)
    assert parts * chunk - longest < 64 * -(-longest // room)
    if longest <= fits:
        assert chunk == -(-longest // 64) * 64


@pytest.mark.parametrize(
    ("fits", "positions"),
    [
        (1000, [0, 320]),
        (319, [0, 192, 384]),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in ((128, [0, 128, 256, 384]), (1, [0, 64, 128, 192, 256, 320]))
        ),
    ],
)
def test_sessions_read_prompts_by_memory(monkeypatch, fits, positions):
    model = model_of(1)
    room = 2 * fits * model.config.activation_bytes(4)
    monkeypatch.setattr(session_module, "_ACTIVATION_BYTES_ON_CPU", room)
    told = []
    prompts = [[1] * 320, [2] * 5]
    Session(Models(model)).prefill(prompts, 1, on_prefill=lambda *progress: told.append(progress))
    assert told == [(position, positions[-1]) for position in positions]


class TestSlotsThatAreNotInUse:
    """A cache of 8,192 slots for a prompt of 256 costs what one of 512 does, but for the memory that it takes."""

    SLOTS = (512, 8192)

    def test_what_they_hold_is_nothing_to_the_prompt(self):
        model, lengths = model_of(2), [256, 100]
        tokens = draw_prompts(3, lengths)
        small, large = (read_in_chunks(model, tokens, lengths, 128, slots, np.nan) for slots in self.SLOTS)
        np.testing.assert_array_equal(small[0], large[0])
        assert np.isfinite(small[0]).all()
        for few, many in zip(jax.tree.leaves(small[1]), jax.tree.leaves(large[1]), strict=True):
            np.testing.assert_array_equal(
                few[:, :, :256] if few.ndim > 1 else few, many[:, :, :256] if few.ndim > 1 else many
            )

    @pytest.mark.slow
    def test_no_step_reads_them(self, monkeypatch):
        steps = []
        update = xla_prefill._update

        def counted(*arguments):
            jax.debug.callback(lambda: steps.append(1))
            return update(*arguments)

        # What was traced before does not count.
        jax.clear_caches()
        monkeypatch.setattr(xla_prefill, "_update", counted)
        counts = []
        for slots in self.SLOTS:
            read_in_chunks(model_of(2), draw_prompts(3, [256, 100]), [256, 100], 128, slots)
            jax.effects_barrier()
            counts.append(len(steps))
            steps.clear()
        jax.clear_caches()
        # Blocks of 48 queries against chunks of 40 slots up to each block's own end, in both layers.
        ends = [
            min(start + block + 48, limit)
            for limit in (256, 100)
            for start in (0, 128)
            for block in (0, 48, 96)
            if start + block < limit
        ]
        assert counts[0] == counts[1] == 2 * sum(-(-end // 40) for end in ends)

    def test_neither_arithmetic_nor_memory_grows(self):
        config = tiny_config(vocab_size=VOCABULARY)
        model = model_of(2)
        assert model.config == config
        flops, temporaries = [], []
        for slots in self.SLOTS:
            cache = KVCache.empty(config, 2, slots, model.dtype)
            read = jax.jit(functools.partial(prefill, chunk=128), donate_argnums=3)
            compiled = read.lower(model, jnp.zeros((2, 256), jnp.int32), jnp.ones(2, jnp.int32), cache).compile()
            flops.append(compiled.cost_analysis()["flops"])
            memory = compiled.memory_analysis()
            temporaries.append(memory.temp_size_in_bytes)
            # Updated where it lies.
            assert memory.alias_size_in_bytes >= config.cache_bytes(2, slots, 4)
        assert flops[0] == flops[1] > 0
        assert temporaries[0] == temporaries[1] > 0


def visible_in_reach(begun, tokens, slots, reach):
    """Which slots each of the tokens sees, written out: [T, S]."""
    slot, place = np.arange(slots), begun + np.arange(tokens)[:, None]
    return (slot <= place) & ((slot < reach.sinks) | (slot >= begun - reach.recent))


@pytest.mark.parametrize("reach", [Reach(64, 0), Reach(64, 8), Reach(100, 64)], ids=str)
def test_what_is_in_reach_is_attended_and_nothing_else(reach):
    tokens, slots, begun = 64, 320, jnp.array([0, 64, 150, 250], jnp.int32)
    keys = jax.random.split(jax.random.key(3), 3)
    q = jax.random.normal(keys[0], (4, tokens, 4, 16))
    k, v = (jax.random.normal(key, (4, 2, slots, 16)) for key in keys[1:])
    unused = (jnp.arange(slots) >= begun[:, None] + tokens)[:, None, :, None]
    cache = KVCache((jnp.where(unused, jnp.nan, k),), (jnp.where(unused, jnp.nan, v),), begun)
    got = jax.jit(lambda cache, q: cache.attend_within(0, q, reach).out)(cache, q)
    for row in range(4):
        visible = visible_in_reach(int(begun[row]), tokens, slots, reach)
        logits = np.einsum("tkgh,ksh->kgts", np.asarray(q[row]).reshape(tokens, 2, 2, 16), k[row]) / 4.0
        weights = np.where(visible, np.exp(logits), 0.0)
        want = np.einsum("kgts,ksh->tkgh", weights / weights.sum(-1, keepdims=True), v[row])
        np.testing.assert_allclose(np.asarray(got[row]).reshape(want.shape), want, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_draft_within_reach_of_everything_is_what_it_was():
    model, prompts = model_of(2), [draw_prompts(5, [1])[0, :200].tolist(), draw_prompts(6, [1])[0, :90].tolist()]
    models = Models(model, model)
    whole = Session(models).prefill(prompts, 8)
    near = Session(models, draft_reach=Reach(192)).prefill(prompts, 8)
    short = Session(models, draft_reach=Reach(64, 4)).prefill(prompts, 8)
    for state in (near, short):
        np.testing.assert_array_equal(state.target_cache.k[1][0, :, :200], whole.target_cache.k[1][0, :, :200])
        np.testing.assert_array_equal(state.draft_cache.lengths, whole.draft_cache.lengths)
    for row, length in enumerate((200, 90)):
        want = whole.draft_cache.k[1][row, :, :length]
        np.testing.assert_allclose(near.draft_cache.k[1][row, :, :length], want, rtol=0, atol=TOLERANCE)
    assert np.abs(short.draft_cache.k[1][0, :, :200] - whole.draft_cache.k[1][0, :, :200]).max() > 0.01
