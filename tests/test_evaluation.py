"""Teacher-forced evaluation and its baselines, against NumPy and against masked dense passes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_alignment, tiny_config, tiny_model

from specattn_jax.decoding.forced import Forced
from specattn_jax.decoding.protocol import Models
from specattn_jax.errors import UserError
from specattn_jax.evaluation.baselines import Oracle, Quest, Streaming, Vegas
from specattn_jax.evaluation.forced import read_documents, read_together
from specattn_jax.models.cache import KVCache
from specattn_jax.models.forward import read_sequence
from specattn_jax.runtime.session import Session
from specattn_jax.selection.alignment import NucleusMass
from specattn_jax.selection.make import make_selection
from specattn_jax.selection.policy import load_policy
from specattn_jax.selection.protocol import LayerSeen, Opening, Seen

LAYERS, WINDOW, LENGTH, PROMPT = 3, 3, 30, 6
CONFIG = tiny_config(num_layers=LAYERS)


# 20 % of 30 tokens are PROMPT.
read_text = functools.partial(read_documents, window=WINDOW, prefill_share=0.2)


def saving(share: float) -> jax.Array:
    return jnp.asarray(share, jnp.float32)


BASELINES: dict[str, Any] = {
    "streaming": Streaming(saving(0.6), CONFIG, num_sink=2, dense_layers=1),
    "quest": Quest(saving(0.6), CONFIG, page=4, dense_layers=1),
    "oracle": Oracle(NucleusMass.uniform(0.8, LAYERS), CONFIG, num_sink=1, num_recent=2),
    "vegas": Vegas(NucleusMass.uniform(0.8, LAYERS), CONFIG, decay=0.5, num_sink=1, num_recent=2),
    "oracle per layer": Oracle(NucleusMass.uniform(0.8, LAYERS), CONFIG, per="layer", num_sink=0, num_recent=0),
}


@pytest.fixture(scope="module")
def target():
    return tiny_model(0, num_layers=LAYERS, scale=8.0)


@pytest.fixture(scope="module")
def draft():
    return tiny_model(1, scale=8.0)


@pytest.fixture(scope="module")
def documents():
    return np.random.default_rng(0).integers(0, 8, (2, LENGTH))


# One program instead of hundreds of small ones.
step = jax.jit(lambda strategy, models, state: strategy.step(models, state))


def drafted_selection(target, draft, name, p, **changes):
    """A policy preset with one nucleus mass for all layers, and some ingredients changed."""
    policy = dataclasses.replace(load_policy(name), **changes)
    alignment = random_alignment(target.config, draft.config)
    mass = NucleusMass.uniform(p, target.config.num_layers)
    return make_selection(policy, alignment, mass, target.config, draft.config)


def selections(target, draft):
    drafted = {name: drafted_selection(target, draft, name, 0.7) for name in ("default", "paper")}
    return {**BASELINES, **drafted}


def masks(plans, past, slots):
    """Slots of the past that each plan reads, `[B, K, S]` per layer."""
    out = []
    for plan in plans:
        if plan is None:
            out.append(np.broadcast_to(np.arange(slots) < past[:, None, None], (2, 2, slots)))
            continue
        plan = plan.take_layer()
        mask = np.zeros((*plan.counts.shape, slots), bool)
        ids, counts = np.asarray(plan.block_ids), np.asarray(plan.counts)
        for b, h in np.ndindex(*counts.shape):
            for block in ids[b, h, : counts[b, h]]:
                mask[b, h, block * plan.block_size : (block + 1) * plan.block_size] = True
        out.append(mask & (np.arange(slots) < past[:, None, None]))
    return out


@pytest.mark.parametrize(
    "name",
    [
        "default",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("paper", *BASELINES)),
    ],
)
def test_the_cached_sparse_path_is_a_masked_dense_pass(target, draft, documents, name):
    """The logits of all windows at once, from one dense pass with the plans' slots as its mask."""
    tokens = jnp.asarray(documents, jnp.int32)
    session = Session(Models(target, draft))
    strategy = Forced(tokens[:, PROMPT:], selections(target, draft)[name], WINDOW)
    state = session.prefill(documents[:, :PROMPT].tolist(), LENGTH - PROMPT, window=WINDOW)
    state = strategy.start(session.models, state)
    slots = state.target_cache.num_slots
    visible = np.broadcast_to(np.tril(np.ones((LENGTH, LENGTH), bool)), (LAYERS, 2, 2, LENGTH, LENGTH)).copy()
    hidden, count = [], (LENGTH - PROMPT - 1) // WINDOW
    for index in range(count):
        past = PROMPT + index * WINDOW
        state, record = step(strategy, session.models, state)
        plans = [seen.plan for seen in record.seen.layers]
        for layer, mask in enumerate(masks(plans, np.full(2, past), slots)):
            # The window's last token is read again, with the next window's plan.
            visible[layer, :, :, past : past + WINDOW, :past] = mask[:, :, None, :past]
        hidden.append(record.hidden[:, :WINDOW])

    def attend(layer, q, k, v):
        grouped = q.reshape(*q.shape[:2], 2, 2, -1)
        logits = jnp.einsum("btkgh,bskh->bkgts", grouped, k) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(visible[layer][:, :, None], logits, -jnp.inf), axis=-1)
        return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)

    whole = read_sequence(target, tokens, attend)[:, PROMPT : PROMPT + count * WINDOW]
    got, want = target.logits(jnp.concatenate(hidden, axis=1)), target.logits(whole)
    np.testing.assert_allclose(got, want, atol=1e-4)
    dense = read_dense(target, tokens)[:, PROMPT : PROMPT + count * WINDOW]
    assert not np.allclose(want, target.logits(dense), atol=0.01)


def read_dense(target, tokens):
    return read_sequence(target, tokens, lambda _, q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.slow
def test_numbers_are_those_of_full_distributions(target, draft, documents):
    dense = read_text(target, draft, None, documents)
    log_probs = np.asarray(jax.nn.log_softmax(target.logits(read_dense(target, jnp.asarray(documents)))), np.float64)
    at = np.arange(PROMPT, PROMPT + dense.tokens)
    picked = np.stack([log_probs[b, at, documents[b, at + 1]] for b in range(2)])
    np.testing.assert_allclose(dense.nll, -picked.mean(1), rtol=1e-4)
    assert dense.perplexity == pytest.approx(np.exp(-picked.mean()), rel=1e-4)
    assert (dense.kl, dense.top1, dense.mass, dense.kv_reduction) == (None, None, None, 0.0)

    sparse = read_text(target, draft, BASELINES["oracle"], documents, reference=dense.hidden, measure_mass=True)
    own = np.asarray(jax.nn.log_softmax(target.logits(jnp.moveaxis(sparse.hidden, 0, 1))), np.float64)
    own = own.reshape(2, -1, 8)
    full = log_probs[:, at]
    np.testing.assert_allclose(sparse.kl, (np.exp(full) * (full - own)).sum(-1).mean(1), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(sparse.top1, (full.argmax(-1) == own.argmax(-1)).mean(1), atol=1e-6)
    assert 0.1 < sparse.kv_reduction < 0.8
    # The oracle keeps 0.8 of the largest attention of the window; of single tokens' attention it holds about that.
    assert ((sparse.mass > 0.7) & (sparse.mass <= 1 + 1e-5)).all()


@pytest.mark.slow
def test_documents_do_not_depend_on_each_other(target, draft, documents):
    both = read_text(target, draft, BASELINES["quest"], documents)
    for index in range(2):
        alone = read_text(target, draft, BASELINES["quest"], documents[index : index + 1])
        np.testing.assert_allclose(alone.nll[0], both.nll[index], rtol=1e-5)
        np.testing.assert_allclose(alone.read[0], both.read[index], rtol=1e-5)
        np.testing.assert_allclose(alone.head_read[0], both.head_read[index], rtol=1e-5)
        np.testing.assert_allclose(alone.head_read[0].mean(-1), alone.read[0], rtol=1e-5)


@pytest.mark.parametrize("length", [7, 9, 600])
def test_documents_of_impossible_length_are_refused(target, draft, length):
    with pytest.raises(UserError, match=f"context is {length}; expected at least"):
        read_documents(target, draft, None, np.zeros((1, length), int), window=8)


PAST = np.array([37, 9])


@pytest.mark.slow
def test_readings_together_are_the_readings_alone(target, draft, documents):
    dense = read_text(target, draft, None, documents)
    chosen = [Streaming(saving(share), CONFIG, dense_layers=1) for share in (0.4, 0.7)]
    both = read_together(target, draft, chosen, documents, reference=dense.hidden, window=WINDOW, prefill_share=0.2)
    for one, got in zip(chosen, both, strict=True):
        want = read_text(target, draft, one, documents, reference=dense.hidden)
        assert got.tokens == want.tokens
        for name in ("nll", "kl", "top1", "read"):
            np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def inputs():
    """Queries `[B, T, N, H]` and keys `[B, K, S, H]` of one layer."""
    rng = np.random.default_rng(5)
    q, keys = rng.normal(size=(2, 4, 4, 8)) * 2, rng.normal(size=(2, 2, 48, 8))
    for b, past in enumerate(PAST):
        keys[b, :, past + 4 :] = np.nan
    return q, keys


def one_layer(inputs):
    """A cache of one layer that holds the inputs; the values are the keys."""
    keys = jnp.asarray(inputs[1], jnp.float32)
    return KVCache((keys,), (keys,), jnp.asarray(PAST, jnp.int32))


def begin(baseline):
    """The state before the first window."""
    return baseline.init(
        Opening(CONFIG, jnp.asarray(PAST, jnp.int32), 48, 3, jnp.float32, None, None, None, None)
    ).state


def nucleus(row, p):
    """The fewest entries that hold share p of the row's total."""
    order = np.argsort(-row)
    size = int(np.searchsorted(np.cumsum(row[order]), p * row.sum())) + 1
    return np.isin(np.arange(len(row)), order[:size])


class TestMasks:
    """What the baselines choose in one layer, against NumPy in float64."""

    def chosen(self, baseline, inputs):
        cache = one_layer(inputs)
        choice = baseline.plan(begin(baseline), None, cache.lengths)[0][-1]
        return masks([choice(0, jnp.asarray(inputs[0], jnp.float32), cache).plan], PAST, 48)[0]

    def attention(self, inputs, mask=None):
        """`[B, K, T, S]`, averaged over the group; softmax over the slots of `mask` alone."""
        q, keys = inputs
        mask = np.ones((2, 2, 48), bool) if mask is None else mask
        out = np.zeros((2, 2, 4, 48))
        for b, k, t, g in np.ndindex(2, 2, 4, 2):
            logits = keys[b, k, : PAST[b] + t + 1] @ q[b, t, 2 * k + g] / np.sqrt(8)
            logits = np.where(mask[b, k, : PAST[b] + t + 1], logits, -np.inf)
            weights = np.exp(logits - logits.max())
            out[b, k, t, : len(weights)] += weights / weights.sum() / 2
        return out

    def test_streaming(self, inputs):
        got = self.chosen(BASELINES["streaming"], inputs)
        for b, past in enumerate(PAST):
            kept = round((LAYERS * 0.4 - 1) / (LAYERS - 1) * past)
            slots = np.arange(48)
            want = (slots < min(2, kept)) | ((slots >= past - max(kept - 2, 0)) & (slots < past))
            assert (got[b] == want).all()
            assert got[b].sum() == 2 * kept

    def test_quest(self, inputs):
        got = self.chosen(BASELINES["quest"], inputs)
        q, keys = inputs
        for b, k in np.ndindex(2, 2):
            past = PAST[b]
            pages = [keys[b, k, at : min(at + 4, past)] for at in range(0, past, 4)]
            chance = np.zeros((4, 2, len(pages)))
            for t, g in np.ndindex(4, 2):
                query = q[b, t, 2 * k + g]
                bounds = [np.maximum(query * p.min(0), query * p.max(0)).sum() / np.sqrt(8) for p in pages]
                chance[t, g] = np.exp(bounds - np.max(bounds)) / np.exp(bounds - np.max(bounds)).sum()
            score = chance.mean(1).max(0)
            count = round((LAYERS * 0.4 - 1) / (LAYERS - 1) * len(pages))
            best = set(np.argsort(-score)[:count])
            want = [at // 4 in best and at < past for at in range(48)]
            assert (got[b, k] == want).all()

    def test_vegas(self, inputs):
        """Reads everything, remembers it, reads the nucleus of that, and keeps what it then did not see, decayed."""
        vegas, cache = BASELINES["vegas"], one_layer((inputs[0], np.nan_to_num(inputs[1])))
        cache = dataclasses.replace(cache, k=cache.k * LAYERS, v=cache.v * LAYERS)
        q, state = jnp.asarray(inputs[0], jnp.float32), begin(vegas)
        assert all((mask == (np.arange(48) < PAST[:, None, None])).all() for mask in self.planned(vegas, state))
        seen = self.attention(inputs).max(2)
        known = None
        for _ in range(2):
            plans, state = vegas.plan(state, None, cache.lengths)
            if known is None:
                known = seen
            else:
                mask = masks(plans, PAST, 48)[0] | (np.arange(48) >= PAST[:, None, None])
                known = np.where(mask, self.attention(inputs, mask).max(2), 0.5 * known)
            layers = tuple(LayerSeen(q, plan, jnp.ones((2, 2))) for plan in plans)
            state = vegas.learn(state, Seen(cache.lengths, jnp.ones(2, bool), layers, cache))
            np.testing.assert_allclose(state.attention[0], known, atol=1e-5)
            for got in self.planned(vegas, state):
                for b, k in np.ndindex(2, 2):
                    want = nucleus(known[b, k, : PAST[b]], 0.8)
                    want[:1], want[-2:] = True, True
                    assert (got[b, k, : PAST[b]] == want).all()

    def planned(self, baseline, state):
        return masks(baseline.plan(state, None, jnp.asarray(PAST, jnp.int32))[0], PAST, 48)

    @pytest.mark.parametrize("name", ["oracle", "oracle per layer"])
    def test_oracle(self, inputs, name):
        got, baseline = self.chosen(BASELINES[name], inputs), BASELINES[name]
        seen = self.attention(inputs)
        if baseline.per == "layer":
            seen = np.broadcast_to(seen.mean(1, keepdims=True), seen.shape)
        score = seen.max(2)
        for b, k in np.ndindex(2, 2):
            past = PAST[b]
            row = score[b, k, :past]
            want = np.pad(nucleus(row, 0.8), (0, 48 - past))
            want[: baseline.num_sink] = True
            want[past - baseline.num_recent : past] = True
            assert (got[b, k] == want).all()
