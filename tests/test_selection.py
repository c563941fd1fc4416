"""Selection policies against float64 re-implementations."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from specattn_kernels import Device, select_blocks
from tiny import random_alignment, tiny_config

from specattn_jax import selection
from specattn_jax.alignment import NucleusMass
from specattn_jax.cache import KVCache
from specattn_jax.errors import UserError
from specattn_jax.model import Look
from specattn_jax.selection import DraftScores, Selector, load_policy, read_fraction

SLOTS, STEPS, BATCH = 50, 4, 2
PAST = np.array([41, 9])


def draft_attention(seed: int) -> np.ndarray:
    """Softmax rows `[step, layer, B, N, S]` over the slots each step may see."""
    rng = np.random.default_rng(seed)
    scores = rng.gamma(0.3, size=(STEPS, 3, BATCH, 4, SLOTS)) + 1e-9
    for step in range(STEPS):
        for row in range(BATCH):
            scores[step, :, row, :, PAST[row] + step + 1 :] = 0
    return (scores / scores.sum(-1, keepdims=True)).astype(np.float32)


def make_selector(policy: str, p: float, **changes) -> Selector:
    target, draft = tiny_config(num_layers=4), tiny_config(num_layers=3)
    return Selector(
        alignment=random_alignment(target, draft, seed=2),
        mass=NucleusMass.uniform(p, 4),
        policy=dataclasses.replace(load_policy(policy), **{"draft_reads": 1.0, **changes}),
        target=target,
        draft=draft,
    )


def selected(selector: Selector, attention: np.ndarray) -> list[list[list[set[int]]] | None]:
    """Runs the selector over the window; the slots per layer, sequence and kv head."""
    scores = selector.start(BATCH, SLOTS)
    if selector.scores_windows:
        # The largest attention over the steps, the mean of a kv head's group.
        sources = attention.reshape(STEPS, 3, BATCH, 2, 2, SLOTS).mean(4).max(0)
        scores = DraftScores(jnp.asarray(np.moveaxis(sources, 1, 0).reshape(BATCH, 6, SLOTS)), None)
    for step in range(0 if selector.scores_windows else STEPS):
        observed = [
            selector.observe(jnp.asarray(attention[step, layer])[:, None]) for layer in selector.observed_layers
        ]
        scores = selector.update(scores, observed, jnp.asarray(PAST + step + 1, jnp.int32))
    plans = selector.plan(scores, jnp.asarray(PAST, jnp.int32))
    fraction = np.asarray(read_fraction(plans, jnp.asarray(PAST, jnp.int32)))
    result = []
    for layer, plan in enumerate(plans):
        if plan is None:
            np.testing.assert_array_equal(fraction[:, layer], 1.0)
            result.append(None)
            continue
        own = plan.take_layer()
        ids, counts = np.asarray(own.block_ids), np.asarray(own.counts)
        slots = [
            [
                {
                    int(block) * plan.block_size + offset
                    for block in ids[row, head, : counts[row, head]]
                    for offset in range(plan.block_size)
                    if block * plan.block_size + offset < PAST[row]
                }
                for head in range(ids.shape[1])
            ]
            for row in range(BATCH)
        ]
        read = [np.mean([len(head) for head in heads]) / PAST[row] for row, heads in enumerate(slots)]
        np.testing.assert_allclose(fraction[:, layer], read, rtol=1e-6)
        result.append(slots)
    return result


def nucleus(row: np.ndarray, p: float) -> set[int]:
    order = np.argsort(-row, kind="stable")
    mass = np.cumsum(row[order])
    return {int(slot) for slot in order[: int(np.searchsorted(mass, p * mass[-1] * (1 - 1e-9))) + 1]}


@pytest.mark.parametrize("mixing", ["step", "window"])
@pytest.mark.parametrize("p", [0.3, 0.8, 0.97, "its own for each kv head"])
def test_default_is_one_nucleus_of_the_maximum_of_the_mixture(p, mixing):
    masses = np.linspace(0.3, 0.97, 8) if isinstance(p, str) else np.full(8, p)
    attention, selector = (
        draft_attention(0),
        make_selector("default", masses[0], mixing=mixing, num_sink=2, num_recent=3),
    )
    if isinstance(p, str):
        left_out = jnp.asarray(1 - masses, jnp.float32)
        selector = dataclasses.replace(selector, mass=dataclasses.replace(selector.mass, left_out=left_out))
    got = selected(selector, attention)
    weights = np.asarray(selector.alignment.weights, np.float64)
    sources = attention.astype(np.float64).reshape(STEPS, 3, BATCH, 2, 2, SLOTS).mean(4)
    sources = np.moveaxis(sources, 2, 1).reshape(STEPS, BATCH, 6, SLOTS)
    if mixing == "step":
        predicted = np.einsum("ar,wbrs->wbas", weights, sources).max(0)
    else:
        predicted = np.einsum("ar,brs->bas", weights, sources.max(0))
    for layer in range(4):
        for row in range(BATCH):
            for head in range(2):
                past = PAST[row]
                best = nucleus(predicted[row, layer * 2 + head, :past], masses[layer * 2 + head])
                wanted = best | {0, 1} | set(range(past - 3, past))
                assert got[layer][row][head] == wanted


@pytest.mark.parametrize("threshold", ["exact", "linear"])
def test_paper_is_the_union_of_the_steps_nuclei_of_the_mapped_layer(threshold):
    p = 0.9
    attention, selector = draft_attention(1), make_selector("paper", p, threshold=threshold)
    got = selected(selector, attention)
    assert got[0] is None
    assert got[1] is None
    means = attention.astype(np.float64).mean(3)
    for layer in (2, 3):
        for row in range(BATCH):
            union: set[int] = set()
            for step in range(STEPS):
                scores = means[step, selector.alignment.layer_map[layer], row, : PAST[row] + step + 1]
                if threshold == "exact":
                    union |= nucleus(scores, p)
                else:
                    low, high = 0.0, scores.max()
                    for _ in range(10):
                        middle = (low + high) / 2
                        low, high = (middle, high) if scores[scores >= middle].sum() >= p else (low, middle)
                    union |= set(np.flatnonzero(scores >= low).tolist())
            wanted = {slot for slot in union if slot < PAST[row]}
            assert got[layer][row][0] == wanted
            assert got[layer][row][1] == wanted


def test_blocks_are_read_whole():
    got = selected(make_selector("default", 0.5, block_size=8, num_sink=0, num_recent=0), draft_attention(2))
    for layer in got:
        for row, heads in enumerate(layer):
            for slots in heads:
                blocks = {slot // 8 for slot in slots}
                assert slots == {
                    slot for block in blocks for slot in range(block * 8, block * 8 + 8) if slot < PAST[row]
                }


@pytest.mark.parametrize("policy", ["paper", "default"])
def test_p_of_one_reads_everything(policy):
    for layer in selected(make_selector(policy, 1.0, dense_layers=0), draft_attention(3)):
        for row, heads in enumerate(layer):
            assert all(slots == set(range(PAST[row])) for slots in heads)


@pytest.mark.parametrize("changes", [{}, {"mixing": "step"}, {"prediction": "layer_map"}, {"combine": "union"}])
def test_how_many_layers_are_selected_at_a_time_does_not_matter(monkeypatch, changes):
    results = []
    for layers in (1, 2, 8):
        monkeypatch.setattr(selection, "_LAYERS_AT_ONCE", layers)
        results.append(selected(make_selector("default", 0.8, num_sink=0, num_recent=0, **changes), draft_attention(4)))
    assert results[0] == results[1] == results[2]
    assert results[0][0] != results[0][3]


def test_a_window_is_scored_by_the_largest_attention_of_each_draft_kv_head():
    """From queries and keys, against softmax by hand."""
    rng = np.random.default_rng(5)
    selector = make_selector("default", 0.8)
    queries = rng.normal(size=(3, BATCH, STEPS, 4, 8)).astype(np.float32)
    keys = rng.normal(size=(3, BATCH, 2, SLOTS, 8)).astype(np.float32)
    valid = np.arange(SLOTS) < PAST[:, None]
    grouped = queries.reshape(3, BATCH, STEPS, 2, 2, 8)
    logits = np.einsum("mbtkgh,mbksh->mbtkgs", grouped, keys) * 8**-0.5
    logits = np.where(valid[None, :, None, None, None], logits, -np.inf)
    lse = np.log(np.exp(logits).sum(-1))
    looks = [Look(jnp.asarray(q), jnp.asarray(x.reshape(BATCH, STEPS, 4))) for q, x in zip(queries, lse, strict=True)]
    cache = KVCache(tuple(map(jnp.asarray, keys)), tuple(map(jnp.asarray, keys)), jnp.asarray(PAST, jnp.int32))
    scores = selector.score(looks, cache, jnp.asarray(PAST, jnp.int32), None)
    expected = np.exp(logits - lse[..., None]).mean(4).max(2)
    np.testing.assert_allclose(scores.maximum, np.moveaxis(expected, 0, 1).reshape(BATCH, 6, SLOTS), rtol=1e-4)


@pytest.mark.parametrize(("threshold", "layers"), [("exact", 4), ("linear", 1)])
def test_only_kernels_select_for_all_layers_at_once(monkeypatch, threshold, layers):
    seen = []

    def record(scores, *arguments, **options):
        seen.append(scores.shape[1:3])
        return select_blocks(scores, *arguments, **options)

    monkeypatch.setattr(selection, "_LAYERS_AT_ONCE", 1)
    monkeypatch.setattr(selection, "select_blocks", record)
    # Its kernels find exact nuclei alone.
    monkeypatch.setattr(selection, "current_device", lambda: Device("gpu", (9, 0), (0, 11), 132))
    selected(make_selector("default", 0.8, threshold=threshold), draft_attention(1))
    assert set(seen) == {(layers, 2)}


@pytest.mark.parametrize("block_size", [1, 8])
def test_a_sparse_draft_reads_what_the_last_window_looked_at_most(monkeypatch, block_size):
    monkeypatch.setattr(selection, "LEAST_DRAFT_ENTRIES", 4)
    changes = {"draft_reads": 0.25, "num_sink": 1, "num_recent": 2, "block_size": block_size}
    selector = make_selector("default", 0.8, **changes)
    scores = np.random.default_rng(6).random((BATCH, 6, SLOTS)).astype(np.float32)
    scores *= np.arange(SLOTS) < PAST[:, None, None]
    plan = selector.draft_plan(DraftScores(jnp.asarray(scores), None), jnp.asarray(PAST, jnp.int32), 3)
    assert plan.counts.shape == (BATCH, 3, 2)
    all_ids, counts = np.asarray(plan.block_ids).reshape(BATCH, 6, -1), np.asarray(plan.counts).reshape(BATCH, 6)
    for row in range(BATCH):
        length = min(PAST[row] + 8, SLOTS)
        blocks = -(-length // block_size)
        padded = np.zeros((6, blocks * block_size))
        padded[:, :length] = scores[row, :, :length]
        by_block = padded.reshape(6, blocks, block_size).sum(-1)
        for head in range(6):
            ids = all_ids[row, head, : counts[row, head]]
            best = np.argsort(-by_block[head])[: int(np.ceil(np.float32(0.25) * blocks))]
            recent = {slot // block_size for slot in range(length - 10, length)}
            assert set(ids.tolist()) == set(best.tolist()) | {0} | recent


def test_a_sparse_draft_reads_some_entries_however_short_the_text():
    selector = make_selector("default", 0.8, draft_reads=0.05)
    scores = DraftScores(jnp.ones((BATCH, 6, SLOTS), jnp.float32), None)
    plan = selector.draft_plan(scores, jnp.asarray(PAST, jnp.int32), 3)
    assert (np.asarray(plan.counts) == np.minimum(PAST + 8, SLOTS)[:, None, None]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"draft_reads": 0.0}, "expected a share"), ({"draft_reads": 0.5, "combine": "union"}, "scored once a window")],
)
def test_impossible_sparse_drafts_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(load_policy("default"), **changes)


def test_unknown_policy_is_refused():
    with pytest.raises(UserError, match="policy is 'best'; expected one of default, paper"):
        load_policy("best")
