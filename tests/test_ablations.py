"""The ablations: as the shipped policies where they should be, and as float64 NumPy where they differ."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from specattn_kernels import compact_blocks
from test_evaluation import LAYERS, drafted_selection, masks, nucleus, read_text
from tiny import tiny_config, tiny_model

from specattn_jax.evaluation.ablations import (
    TAIL,
    Ablation,
    Ingredients,
    StepScores,
    attend_with_centroids,
    head_weights,
    map_weights,
)
from specattn_jax.models.cache import KVCache
from specattn_jax.models.forward import Read
from specattn_jax.selection.protocol import LayerSeen, Opening, Seen

TARGET, DRAFT = tiny_config(num_layers=LAYERS), tiny_config()
ROWS, SLOTS, PAST = LAYERS * 2, 48, np.array([37, 23])


@pytest.fixture(scope="module")
def pair():
    return tiny_model(0, num_layers=LAYERS, scale=8.0), tiny_model(1, scale=8.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "paper"])
def test_the_shipped_policies_are_among_them(pair, name):
    documents = np.random.default_rng(0).integers(0, 8, (2, 30))
    # The table's draft reads everything.
    selection = drafted_selection(pair[0], pair[1], name, 0.7, draft_reads=1.0, opening_weight=0.0, memory_weight=0.0)
    if name == "default":
        weights, ingredients = head_weights(selection.alignment, DRAFT), Ingredients(mix_last=True)
    else:
        weights = map_weights(selection.alignment, TARGET, DRAFT)
        ingredients = Ingredients(union=True, linear=True, num_sink=0, num_recent=0)
    left_out = jnp.where(jnp.arange(ROWS) < 2 * selection.policy.dense_layers, 0.0, 0.3)
    ablation = Ablation.make(weights, left_out, 0.0, ingredients, TARGET, DRAFT)
    want, got = (read_text(pair[0], pair[1], one, documents) for one in (selection, ablation))
    np.testing.assert_allclose(got.read, want.read, atol=1e-6)
    np.testing.assert_allclose(got.nll, want.nll, rtol=1e-5)


def make(ingredients, **changes):
    """An ablation, and its state with some of it changed."""
    rng = np.random.default_rng(3)
    left_out = jnp.asarray(rng.uniform(0.1, 0.4, ROWS), jnp.float32)
    weights = jnp.asarray(rng.dirichlet(np.ones(8), ROWS), jnp.float32)
    ablation = Ablation.make(weights, left_out, 0.0, ingredients, TARGET, DRAFT)
    state = ablation.init(
        Opening(TARGET, jnp.asarray(PAST, jnp.int32), SLOTS, 5, jnp.float32, None, None, None, None)
    ).state
    return ablation, dataclasses.replace(state, **changes)


def a_cache(tokens):
    """A random cache with so many new tokens behind the past, and their queries."""
    rng = np.random.default_rng(0)
    q, keys = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, tokens, 4, 8), (2, 2, SLOTS, 8)))
    return q, KVCache((keys,) * LAYERS, (keys,) * LAYERS, jnp.asarray(PAST, jnp.int32))


def peaked(seed):
    """Scores like attention, `[B, rows, S]`."""
    return np.random.default_rng(seed).dirichlet(np.full(SLOTS, 0.3), (2, ROWS))


def block_nucleus(row, p, size, reduce):
    padded = np.pad(row, (0, -len(row) % size)).reshape(-1, size)
    return np.repeat(nucleus(reduce(padded, axis=1), p), size)[: len(row)]


BLOCKS = {"sum 4": (4, np.sum), "sum 8": (8, np.sum), "sum 16": (16, np.sum), "max 16": (16, np.max)}
CASES = {
    "default": (Ingredients(), 0),
    **{name: (Ingredients(grain=name, num_sink=1, num_recent=2), 0) for name in (*BLOCKS, "inside 16")},
    "blend": (Ingredients(blend=0.3), 5),
    "last verification, nothing seen": (Ingredients(blend=1.0), 0),
    "last verification": (Ingredients(blend=1.0), 1),
    "reused": (Ingredients(reuse=2, num_recent=1), 3),
    "made anew": (Ingredients(reuse=2, num_recent=1), 4),
    "everything now and then": (Ingredients(dense_every=3), 2),
    "sparse in between": (Ingredients(dense_every=3), 3),
    "union": (Ingredients(union=True), 0),
    "mixed last": (Ingredients(mix_last=True), 0),
}


@pytest.mark.parametrize("name", CASES)
def test_masks(name):
    ingredients, windows = CASES[name]
    new, old, seen = peaked(0), peaked(1), peaked(2)
    united = [np.random.default_rng(seed).random(new.shape) < 0.2 for seed in (0, 1)]

    sources = np.random.default_rng(3).dirichlet(np.full(SLOTS, 0.3), (2, DRAFT.num_layers * DRAFT.num_kv_heads))

    def steps(scores, union):
        floats = (jnp.asarray(x, jnp.float32) for x in (scores, sources))
        return StepScores(next(floats), jnp.asarray(union), next(floats), jnp.int32(5))

    before = PAST - 5
    ablation, state = make(
        ingredients,
        steps=steps(new, united[0]),
        attention=jnp.asarray(seen, jnp.float32),
        scores=steps(old, united[1]),
        past=jnp.asarray(before, jnp.int32),
        windows=jnp.int32(windows),
    )
    past = jnp.asarray(PAST, jnp.int32)
    q, cache = a_cache(3)
    choices, _ = ablation.plan(state, None, past)
    plans = [choice(layer, q, cache).plan for layer, choice in enumerate(choices)]
    got = np.concatenate(masks(plans, PAST, SLOTS), axis=1)

    stale = windows % ingredients.reuse != 0
    scores = (1 - ingredients.blend) * (old if stale else new) + ingredients.blend * seen
    if ingredients.mix_last:
        per_source = np.asarray(ablation.weights).reshape(ROWS, -1, DRAFT.group_size).sum(-1)
        scores = np.einsum("ar,brs->bas", per_source, sources)
    everything = name in ("everything now and then", "last verification, nothing seen")
    for b, row in np.ndindex(2, ROWS):
        length = PAST[b]
        p = 1 - float(ablation.left_out[row])
        if ingredients.union:
            want = united[0][b, row, :length].copy()
        elif ingredients.grain in BLOCKS:
            want = block_nucleus(scores[b, row, :length], p, *BLOCKS[ingredients.grain])
        else:
            want = nucleus(scores[b, row, :length], p)
        want[: ingredients.num_sink] = True
        want[length - ingredients.num_recent :] = True
        if stale:
            want[before[b] :] = True
        assert (got[b, row, :length] == (want | everything)).all()


def test_only_the_first_steps_count():
    rng = np.random.default_rng(0)
    observed = [rng.dirichlet(np.ones(SLOTS), (2, 8)) for _ in range(3)]
    for steps in (1, 2, 64):
        ablation, state = make(Ingredients(steps=steps, union=True))
        _, cache = a_cache(1)
        for heads in observed:
            noted = Read(None, cache.at(jnp.full((2,), SLOTS)), (jnp.asarray(heads, jnp.float32),))
            _, state = ablation.observe(state, lambda _, noted=noted: noted, jnp.int32(0))
        scores = state.steps
        rows = np.einsum("ar,tbrs->tbas", np.asarray(ablation.weights, np.float64), observed)[:steps]
        np.testing.assert_allclose(scores.maximum, rows.max(0), atol=1e-6)
        groups = np.reshape(observed, (3, 2, -1, DRAFT.group_size, SLOTS)).mean(3)[:steps]
        np.testing.assert_allclose(scores.sources, groups.max(0), atol=1e-6)
        for b, row in np.ndindex(2, ROWS):
            want = [nucleus(one[b, row], 1 - float(ablation.left_out[row])) for one in rows]
            assert (np.asarray(scores.union[b, row]) == np.any(want, axis=0)).all()


def test_whole_blocks_are_counted_where_slots_inside_are_read():
    ablation, state = make(Ingredients(grain="inside 16"))
    mask = np.zeros((2, 2, SLOTS), bool)
    mask[0, 0, [3, 17]], mask[0, 1, 36], mask[1, :, 20] = True, True, True
    q, cache = a_cache(3)
    read = ablation._read(0, q, cache, compact_blocks(jnp.asarray(mask), block_size=1))
    np.testing.assert_allclose(read.share, [[32 / 37, 5 / 37], [7 / 23, 7 / 23]], rtol=1e-6)
    layers = (LayerSeen(q, read.plan, read.share),) * LAYERS
    state = ablation.learn(state, Seen(cache.lengths, jnp.ones(2, bool), layers, cache))
    np.testing.assert_allclose(state.read, [(32 + 5) / 2 / 37, 7 / 23], rtol=1e-6)


@pytest.mark.slow
def test_centroids_stand_for_what_was_not_read():
    rng = np.random.default_rng(0)
    slots, past = TAIL + 200, np.array([TAIL + 100, 40])
    q, keys, values = (rng.normal(size=shape) for shape in ((2, 3, 4, 8), (2, 2, slots, 8), (2, 2, slots, 8)))
    mask = (rng.random((2, 2, slots)) < 0.3) & (np.arange(slots) < past[:, None, None])
    # Of the second sequence everything is read: no centroid is left.
    mask[1, :, :40] = True
    plan = compact_blocks(jnp.asarray(mask), block_size=1)
    k32, v32 = (jnp.asarray(x, jnp.float32) for x in (keys, values))
    cache = KVCache((k32,), (v32,), jnp.asarray(past, jnp.int32))
    got = attend_with_centroids(0, jnp.asarray(q, jnp.float32), cache, plan)
    for b, t, n in np.ndindex(2, 3, 4):
        k = n // 2
        read = mask[b, k].copy()
        read[past[b] : past[b] + t + 1] = True
        ks, vs, extra = [keys[b, k, read]], [values[b, k, read]], [np.zeros(read.sum())]
        for block in range(0, slots, TAIL):
            here = np.arange(slots)
            rest = (here >= block) & (here < block + TAIL) & (here < past[b]) & ~mask[b, k]
            if rest.any():
                ks.append(keys[b, k, rest].mean(0, keepdims=True))
                vs.append(values[b, k, rest].mean(0, keepdims=True))
                extra.append([np.log(rest.sum())])
        logits = np.concatenate(ks) @ q[b, t, n] / np.sqrt(8) + np.concatenate(extra)
        weights = np.exp(logits - logits.max())
        np.testing.assert_allclose(got[b, t, n], weights @ np.concatenate(vs) / weights.sum(), atol=1e-5)


def test_a_wanted_saving_is_met(pair):
    documents = np.random.default_rng(1).integers(0, 8, (2, 400))
    reading = functools.partial(read_text, *pair)
    ablation = Ablation.make(
        jnp.full((ROWS, 8), 1 / 8), jnp.full((ROWS,), 0.02), 0.3, Ingredients(num_sink=0, num_recent=0), TARGET, DRAFT
    )
    assert reading(ablation, documents).kv_reduction == pytest.approx(0.7, abs=0.01)
