"""A batch goes on until its last sequence is done: for the others nothing is read any more."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import outputs, run, selection_for, start, tiny_model

from specattn_jax.decoding.autoregressive import Autoregressive
from specattn_jax.decoding.hierarchical import Hierarchical
from specattn_jax.decoding.hierarchical_lookup import HierarchicalLookup
from specattn_jax.decoding.itself import SelfSpeculative
from specattn_jax.decoding.lookup import PromptLookup
from specattn_jax.decoding.protocol import Models
from specattn_jax.decoding.speculative import SparselyDrafted, SpecAttn, Speculative
from specattn_jax.models.cache import KVCache, Look
from specattn_jax.runtime.session import Session
from specattn_jax.selection.own import OwnReads, SparseDraft

PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 1] * 8, [2, 2, 7, 1, 1, 3, 6] * 9]
LIMIT = 20
# Slots that a pass over few tokens may read for a sequence that waits.
READ = 16
SELDOM = "sparse draft", "paper", "lookup", "hierarchical lookup"
FEW = OwnReads(0.1, num_sink=1, num_recent=2, least=1)


@pytest.fixture(scope="module")
def models():
    return Models(tiny_model(0, num_layers=3), tiny_model(1, num_kv_heads=1))


def strategies(models):
    target, draft = models.target, models.draft
    forced = {"num_sink": 1, "num_recent": 2, "draft_reads": 0.3, "opening_weight": 0.5}
    return {
        "autoregressive": Autoregressive(),
        "speculative": Speculative(window=4),
        "sparse draft": SparselyDrafted(SparseDraft(FEW), window=4),
        "default": SpecAttn(selection_for(target, draft, "default", 0.7, **forced), window=4),
        "paper": SpecAttn(selection_for(target, draft, "paper", 0.7, dense_layers=1), window=4),
        "self": SelfSpeculative(window=4, reads=FEW, every=2),
        "lookup": PromptLookup(window=4),
        "hierarchical": Hierarchical(window=7, inner=2, reads=FEW),
        "hierarchical lookup": HierarchicalLookup(window=7, inner=2, reads=FEW),
    }


def spoil(cache: KVCache) -> KVCache:
    """Nobody may read the first sequence, but for its first slots."""
    gone = (jnp.arange(2) == 0)[:, None, None, None] & (jnp.arange(cache.num_slots) >= READ)[:, None]
    k, v = (tuple(jnp.where(gone, jnp.nan, layer) for layer in layers) for layers in (cache.k, cache.v))
    return dataclasses.replace(cache, k=k, v=v)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class KeepHidden:
    def __call__(self, record):
        return record.hidden


@pytest.mark.parametrize(
    "name",
    [
        "autoregressive", "speculative", "default", "self", "hierarchical",
        *(pytest.param(name, marks=pytest.mark.slow) for name in SELDOM),
    ],
)  # fmt: skip
def test_what_is_done_is_not_read(models, name):
    strategy = strategies(models)[name]
    session = Session(models)
    state = start(strategy, session, PROMPTS, LIMIT)
    before = np.asarray(state.target_cache.lengths)
    state = dataclasses.replace(
        state,
        limit=jnp.asarray([1, LIMIT]),
        done=jnp.asarray([True, False]),
        target_cache=spoil(state.target_cache),
        draft_cache=None if state.draft_cache is None else spoil(state.draft_cache),
    )
    state, hidden = session.watch(strategy, state, LIMIT, KeepHidden())
    assert np.isfinite(hidden).all()
    assert state.target_cache.waits is None
    assert state.target_cache.lengths[0] == before[0]
    assert (state.fault == 0).all()
    assert state.statistics.windows[0] == 0
    assert outputs(state)[1] == outputs(run(strategy, models.target, models.draft, PROMPTS[1:], LIMIT))[0]


def test_sequences_that_wait_lose_nothing_that_they_hold(models):
    target, draft = models.target, models.draft
    session, strategy = Session(models), Speculative(window=4)
    state = start(strategy, session, PROMPTS, LIMIT)
    state = dataclasses.replace(state, limit=jnp.asarray([6, LIMIT]))
    state = session.decode(strategy, state, LIMIT)
    alone = run(strategy, target, draft, PROMPTS[:1], 6)
    assert outputs(state)[0] == outputs(alone)[0]
    for found, wanted in ((state.target_cache, alone.target_cache), (state.draft_cache, alone.draft_cache)):
        held = int(wanted.lengths[0])
        assert found.lengths[0] == held
        for layer, other in zip((*found.k, *found.v), (*wanted.k, *wanted.v), strict=True):
            np.testing.assert_allclose(layer[0, :, :held], other[0, :, :held], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_others_are_read_as_if_none_waited(tokens):
    rng = np.random.default_rng(tokens)
    k, v = (jnp.asarray(rng.normal(size=(3, 2, 96, 8)), jnp.float32) for _ in range(2))
    q = jnp.asarray(rng.normal(size=(3, tokens, 4, 8)), jnp.float32)
    cache = KVCache((k,), (v,), jnp.asarray([40, 1, 50], jnp.int32))
    waits = jnp.asarray([True, True, False])
    whole, some = (one.attend(0, q).out for one in (cache, cache.waiting(waits)))
    np.testing.assert_array_equal(whole[2], some[2])
    assert np.isfinite(some).all()
    look = Look(q, jnp.zeros(q.shape[:3], jnp.float32))
    whole, some = (one.score(0, look, cache.lengths) for one in (cache, cache.waiting(waits)))
    np.testing.assert_array_equal(whole[2], some[2])
    assert (np.asarray(some)[0, :, 1:] == 0).all()
