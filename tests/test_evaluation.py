"""Teacher-forced evaluation and its baselines, against NumPy and against masked dense passes."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_speculative import selector_for
from tiny import tiny_config, tiny_model

from specattn_jax.alignment import NucleusMass
from specattn_jax.errors import UserError
from specattn_jax.evaluation.baselines import Oracle, Quest, Streaming, Vegas
from specattn_jax.evaluation.forced import _reader, read_documents, read_together, start_reading
from specattn_jax.evaluation.learning import Learner
from specattn_jax.model import read_sequence
from specattn_jax.speculative import DecodeSettings, WindowRead, read_window

LAYERS, WINDOW, LENGTH, PROMPT = 4, 3, 30, 6
CONFIG = tiny_config(num_layers=LAYERS)


# 20 % of 30 tokens are PROMPT.
read_text = functools.partial(read_documents, window=WINDOW, prefill_share=0.2)


def saving(share: float) -> jax.Array:
    return jnp.asarray(share, jnp.float32)


BASELINES = {
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


def selections(target, draft):
    drafted = {name: selector_for(target, draft, name, 0.7) for name in ("default", "paper")}
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


@dataclasses.dataclass
class Recorder:
    """A selection that keeps the plans that were used; only outside jit."""

    inner: object

    def __post_init__(self):
        self.plans = []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def plan(self, *arguments):
        def record(choice):
            def resolve(q, keys, past):
                plan = choice(q, keys, past) if callable(choice) else choice
                self.plans.append(plan)
                return plan

            return resolve

        return tuple(record(choice) for choice in self.inner.plan(*arguments))


@pytest.mark.parametrize("name", [*BASELINES, "default", "paper"])
def test_the_cached_sparse_path_is_a_masked_dense_pass(target, draft, documents, name):
    """The logits of all windows at once, from one dense pass with the plans' slots as its mask."""
    tokens = jnp.asarray(documents, jnp.int32)
    chosen = selections(target, draft)[name]
    state = start_reading(target, draft, tokens[:, :PROMPT], LENGTH, DecodeSettings("specattn", WINDOW))
    slots = state.target_cache.num_slots
    visible = np.broadcast_to(np.tril(np.ones((LENGTH, LENGTH), bool)), (LAYERS, 2, 2, LENGTH, LENGTH)).copy()
    hidden, settings = [], DecodeSettings("specattn", WINDOW)
    chosen = chosen.prepare(2, slots) if isinstance(chosen, Learner) else chosen
    count = (LENGTH - PROMPT - 1) // WINDOW
    for index in range(count):
        past = PROMPT + index * WINDOW
        here = tokens[:, past - 1 : past + 1 + WINDOW]
        recorder = Recorder(chosen)
        state = dataclasses.replace(state, last=here[:, :2])
        reader = _reader(chosen, False)
        seen = read_window(target, draft, recorder, state, state.keys, settings, forced=here[:, 2:], reader=reader)
        if isinstance(chosen, Learner):
            learnt = seen._replace(kept=tuple(kept for _, kept in seen.kept))
            chosen, _ = chosen.learn(learnt, state.target_cache.lengths)
        for layer, mask in enumerate(masks(recorder.plans, np.full(2, past), slots)):
            # The window's last token is read again, with the next window's plan.
            visible[layer, :, :, past : past + WINDOW, :past] = mask[:, :, None, :past]
        hidden.append(seen.hidden[:, :WINDOW])
        state = dataclasses.replace(
            state, target_cache=seen.cache.at_lengths(seen.cache.lengths + WINDOW), draft_cache=seen.drafted.cache
        )

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


def nucleus(row, p):
    """The fewest entries that hold share p of the row's total."""
    order = np.argsort(-row)
    size = int(np.searchsorted(np.cumsum(row[order]), p * row.sum())) + 1
    return np.isin(np.arange(len(row)), order[:size])


class TestMasks:
    """What the baselines choose in one layer, against NumPy in float64."""

    def chosen(self, baseline, inputs):
        past = jnp.asarray(PAST, jnp.int32)
        choice = baseline.plan(baseline.start(2, 48), past)[-1]
        plan = choice(jnp.asarray(inputs[0], jnp.float32), jnp.asarray(inputs[1], jnp.float32), past)
        return masks([plan], PAST, 48)[0]

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
        vegas, past = BASELINES["vegas"].prepare(2, 48), jnp.asarray(PAST, jnp.int32)
        q, keys = (jnp.asarray(x, jnp.float32) for x in inputs)
        keys = jnp.nan_to_num(keys)
        assert all((mask == (np.arange(48) < PAST[:, None, None])).all() for mask in self.planned(vegas, past))
        seen = self.attention(inputs).max(2)
        known = None
        for _ in range(2):
            plans = vegas.plan(vegas.start(2, 48), past)
            kept = tuple(vegas.attend(q, keys, keys, plan, past + 4)[1] for plan in plans)
            if known is None:
                known = seen
            else:
                mask = masks(plans, PAST, 48)[0] | (np.arange(48) >= PAST[:, None, None])
                known = np.where(mask, self.attention(inputs, mask).max(2), 0.5 * known)
            vegas, _ = vegas.learn(WindowRead(None, None, None, None, plans, kept), past)
            np.testing.assert_allclose(vegas.attention[0], known, atol=1e-5)
            for got in self.planned(vegas, past):
                for b, k in np.ndindex(2, 2):
                    want = nucleus(known[b, k, : PAST[b]], 0.8)
                    want[:1], want[-2:] = True, True
                    assert (got[b, k, : PAST[b]] == want).all()

    def planned(self, baseline, past):
        return masks(baseline.plan(baseline.start(2, 48), past), PAST, 48)

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
