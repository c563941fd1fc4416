"""Selection policies against float64 re-implementations."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from specattn_kernels import Device, select_blocks
from tiny import random_alignment, selection_for, start, tiny_config, tiny_model

from specattn_jax.decoding.protocol import Models
from specattn_jax.decoding.speculative import SpecAttn
from specattn_jax.errors import UserError
from specattn_jax.evaluation.attention import attention_read
from specattn_jax.models.cache import KVCache, Look
from specattn_jax.models.forward import Read
from specattn_jax.runtime.session import Session
from specattn_jax.selection import mixture
from specattn_jax.selection.alignment import Steering
from specattn_jax.selection.make import DraftedSelection
from specattn_jax.selection.mixture import Mixture, MixtureState
from specattn_jax.selection.policy import load_policy
from specattn_jax.selection.protocol import Opening, Remembered
from specattn_jax.selection.reads import past_mask, plan_share

# How selections are computed is changed below.
pytestmark = pytest.mark.usefixtures("own_programs")

SLOTS, STEPS, BATCH = 50, 4, 2
PAST = np.array([41, 9])
# One channel for every step and query head of a group: keys can be made to give any attention (see `attending`).
TARGET, DRAFT = tiny_config(num_layers=4), tiny_config(num_layers=3, head_dim=2 * STEPS)


def draft_attention(seed: int) -> np.ndarray:
    """Softmax rows `[step, layer, B, N, S]` over the slots each step may see."""
    rng = np.random.default_rng(seed)
    scores = rng.gamma(0.3, size=(STEPS, 3, BATCH, 4, SLOTS)) + 1e-9
    for step in range(STEPS):
        for row in range(BATCH):
            scores[step, :, row, :, PAST[row] + step + 1 :] = 0
    return (scores / scores.sum(-1, keepdims=True)).astype(np.float32)


def attending(attention: np.ndarray) -> tuple[np.ndarray, KVCache]:
    """Queries `[step, layer, B, N, H]`, and a cache of keys, that look at each other as `attention` says.

    The query of a step is a unit vector for each head of a group, and the keys hold the logarithms.
    """
    size = DRAFT.head_dim
    grouped = attention.astype(np.float64).reshape(STEPS, 3, BATCH, 2, 2, SLOTS)
    logits = np.log(grouped, out=np.zeros_like(grouped), where=grouped > 0)
    keys = np.moveaxis(logits, (1, 2, 3, 5), (0, 1, 2, 3)).reshape(3, BATCH, 2, SLOTS, size)
    queries = np.zeros((STEPS, 3, BATCH, 2, 2, size))
    for step in range(STEPS):
        for member in range(2):
            queries[step, ..., member, 2 * step + member] = size**0.5
    k = tuple(jnp.asarray(layer, jnp.float32) for layer in keys)
    return queries.reshape(STEPS, 3, BATCH, 4, size).astype(np.float32), KVCache(k, k, jnp.asarray(PAST, jnp.int32))


def selection(policy: str, p: float, *, granularity: str = "kv_head", **changes) -> DraftedSelection:
    alignment = random_alignment(TARGET, DRAFT, seed=2, granularity=granularity)
    return selection_for(TARGET, DRAFT, policy, p, alignment=alignment, **{"draft_reads": 1.0, **changes})


def selected(chooser: DraftedSelection, attention: np.ndarray, **opened: Any) -> list[list[list[set[int]]] | None]:
    """Lets a selection watch the window; the slots per layer, sequence and kv head.

    Args:
        chooser: the selection.
        attention: of the draft.
        opened: what the target saw when decoding began, in the place of what it would have read.
    """
    queries, cache = attending(attention)
    past = jnp.asarray(PAST, jnp.int32)

    def reading(step):
        """One forward pass of the draft, as far as a selection knows."""

        def read(attend):
            grown = cache.at(past + step)
            found = [attend(layer, jnp.asarray(queries[step, layer])[:, None], grown) for layer in range(3)]
            return Read(jnp.zeros((BATCH, 1, 16)), cache.at(past + step + 1), tuple(note for _, note in found))

        return read

    forgetful = dataclasses.replace(chooser.policy, opening_weight=0.0, memory_weight=0.0)
    opening = Opening(TARGET, past, SLOTS, STEPS, jnp.float32, cache, reading(0), None, None)
    state, draft_cache, _ = dataclasses.replace(chooser, policy=forgetful).init(opening)
    state = dataclasses.replace(state, **opened) if opened else state
    for step in range(STEPS):
        _, state = chooser.observe(state, reading(step), jnp.int32(step))
    choices, _ = chooser.plan(state, draft_cache, past)
    result: list[Any] = []
    for choice in choices:
        plan = choice.plan if isinstance(choice, Remembered) else choice
        share = np.asarray(plan_share(plan, past, 2))
        if plan is None:
            np.testing.assert_array_equal(share, 1.0)
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
        read = [[len(head) / PAST[row] for head in heads] for row, heads in enumerate(slots)]
        np.testing.assert_allclose(share, read, rtol=1e-6)
        result.append(slots)
    return result


def nucleus(row: np.ndarray, p: float) -> set[int]:
    order = np.argsort(-row, kind="stable")
    mass = np.cumsum(row[order])
    return {int(slot) for slot in order[: int(np.searchsorted(mass, p * mass[-1] * (1 - 1e-9))) + 1]}


@pytest.mark.parametrize("granularity", ["head", "kv_head", "layer"])
@pytest.mark.parametrize("p", [0.3, 0.8, 0.97, "its own for each kv head"])
def test_default_is_one_nucleus_of_the_mixture_of_the_maximum(p, granularity):
    masses = np.linspace(0.3, 0.97, 8) if isinstance(p, str) else np.full(8, p)
    attention, chooser = (
        draft_attention(0),
        selection("default", masses[0], granularity=granularity, num_sink=2, num_recent=3),
    )
    if isinstance(p, str):
        left_out = jnp.asarray(1 - masses, jnp.float32)
        chooser = dataclasses.replace(chooser, mass=dataclasses.replace(chooser.mass, left_out=left_out))
    got = selected(chooser, attention)
    weights = np.asarray(chooser.alignment.weights, np.float64)
    rows = {"head": 4, "kv_head": 2, "layer": 1}[granularity]
    sources = attention.astype(np.float64).reshape(STEPS, 3, BATCH, rows, 4 // rows, SLOTS).mean(4)
    sources = np.moveaxis(sources, 2, 1).reshape(STEPS, BATCH, 3 * rows, SLOTS)
    predicted = np.einsum("ar,brs->bas", weights, sources.max(0))
    for layer in range(4):
        for row in range(BATCH):
            for head in range(2):
                past = PAST[row]
                best = nucleus(predicted[row, layer * 2 + head, :past], masses[layer * 2 + head])
                wanted = best | {0, 1} | set(range(past - 3, past))
                assert got[layer][row][head] == wanted


@pytest.mark.parametrize("windows", [0, 4])
def test_what_the_target_looked_at_in_the_beginning_counts_beside_the_mixture(windows):
    policy = {"opening_weight": 0.5, "opening_life": 4.0, "memory_weight": 0.0}
    attention, chooser = draft_attention(0), selection("default", 0.8, num_sink=2, num_recent=3)
    target = np.random.default_rng(5).dirichlet(np.full(SLOTS, 0.2), (BATCH, 4, 2)).astype(np.float32)
    steering = dataclasses.replace(
        Steering.start(BATCH, TARGET.num_layers), windows=jnp.full((BATCH,), windows, jnp.int32)
    )
    chooser = dataclasses.replace(chooser, policy=dataclasses.replace(chooser.policy, **policy))
    got = selected(chooser, attention, memory=tuple(jnp.moveaxis(jnp.asarray(target), 1, 0)), steering=steering)
    sources = attention.astype(np.float64).reshape(STEPS, 3, BATCH, 2, 2, SLOTS).mean(4)
    sources = np.moveaxis(sources, 2, 1).reshape(STEPS, BATCH, 6, SLOTS)
    predicted = np.einsum("ar,brs->bas", np.asarray(chooser.alignment.weights, np.float64), sources.max(0))
    predicted = predicted.reshape(target.shape) + (0.25 if windows else 0.5) * target
    for layer, row, head in itertools.product(range(4), range(BATCH), range(2)):
        past = PAST[row]
        best = nucleus(predicted[row, layer, head, :past], 0.8)
        assert got[layer][row][head] == best | {0, 1} | set(range(past - 3, past))


@pytest.mark.parametrize(("windows", "weight"), [(0, 0.5), (4, 0.25), (40, 0.2)])
def test_what_is_remembered_weighs_no_less_than_the_policy_says(windows, weight):
    policy = {"opening_weight": 0.5, "opening_life": 4.0}
    chooser, attention = selection("default", 0.8, num_sink=2, num_recent=3), draft_attention(0)
    steering = dataclasses.replace(
        Steering.start(BATCH, TARGET.num_layers), windows=jnp.full((BATCH,), windows, jnp.int32)
    )
    memory = tuple(jnp.asarray(np.random.default_rng(5).dirichlet(np.full(SLOTS, 0.2), (4, BATCH, 2)), jnp.float32))

    def seen(**changes):
        changed = dataclasses.replace(chooser, policy=dataclasses.replace(chooser.policy, **changes))
        return selected(changed, attention, memory=memory, steering=steering)

    got = seen(**policy, memory_weight=0.2)
    assert got == seen(opening_weight=weight, opening_life=1e9, memory_weight=0.0)


@pytest.mark.parametrize("opening_weight", [0.0, 0.5])
def test_verification_notes_what_its_first_token_gave_to_what_it_read(opening_weight):
    models = Models(tiny_model(0, num_layers=3, scale=8.0), tiny_model(1, num_layers=2, scale=8.0))
    changes = {"opening_weight": opening_weight, "memory_weight": 0.5, "dense_layers": 1, "num_recent": 1}
    chooser = selection_for(models.target, models.draft, "default", 0.5, **changes)
    strategy = SpecAttn(chooser, window=3)
    state = start(strategy, Session(models), [[1, 2, 3, 4, 5, 6, 7, 1] * 3, [2, 2, 7, 1, 1, 3, 6] * 2], 12)
    for _ in range(2):
        before = state.own.memory
        state, record = strategy.step(models, state)
        cache, slots = record.seen.cache, np.arange(record.seen.cache.num_slots)
        np.testing.assert_array_equal(state.own.memory[0], before[0], "nothing is noted where everything is read")
        for layer in (1, 2):
            one = record.seen.layers[layer]
            read = np.asarray(past_mask(one.plan, record.seen.past, cache))
            assert 0 < read.sum() < (slots < np.asarray(record.seen.past)[:, None, None]).sum() * 2
            wanted = np.where(read, attention_read(layer, one.q, cache, one.plan, 1), before[layer])
            np.testing.assert_allclose(state.own.memory[layer], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threshold", ["exact", "linear"])
def test_paper_is_the_union_of_the_steps_nuclei_of_the_mapped_layer(threshold):
    p = 0.9
    attention, chooser = draft_attention(1), selection("paper", p, threshold=threshold)
    got = selected(chooser, attention)
    assert got[0] is None
    assert got[1] is None
    means = attention.astype(np.float64).mean(3)
    for layer in (2, 3):
        for row in range(BATCH):
            union: set[int] = set()
            for step in range(STEPS):
                scores = means[step, chooser.alignment.layer_map[layer], row, : PAST[row] + step + 1]
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
    got = selected(selection("default", 0.5, block_size=8, num_sink=0, num_recent=0), draft_attention(2))
    for layer in got:
        for row, heads in enumerate(layer):
            for slots in heads:
                blocks = {slot // 8 for slot in slots}
                assert slots == {
                    slot for block in blocks for slot in range(block * 8, block * 8 + 8) if slot < PAST[row]
                }


@pytest.mark.parametrize("policy", ["paper", "default"])
def test_p_of_one_reads_everything(policy):
    for layer in selected(selection(policy, 1.0, dense_layers=0), draft_attention(3)):
        for row, heads in enumerate(layer):
            assert all(slots == set(range(PAST[row])) for slots in heads)


@pytest.mark.parametrize("granularity", ["head", "kv_head"])
def test_how_many_layers_are_selected_at_a_time_does_not_matter(monkeypatch, granularity):
    results = []
    for layers in (1, 2, 8):
        monkeypatch.setattr(mixture, "_LAYERS_AT_ONCE", layers)
        chooser = selection("default", 0.8, granularity=granularity, num_sink=0, num_recent=0)
        results.append(selected(chooser, draft_attention(4)))
    assert results[0] == results[1] == results[2]
    assert results[0][0] != results[0][3]


def test_a_window_is_scored_by_the_largest_attention_of_each_draft_kv_head():
    """From queries and keys, against softmax by hand."""
    rng = np.random.default_rng(5)
    queries = rng.normal(size=(3, BATCH, STEPS, 4, 8)).astype(np.float32)
    keys = rng.normal(size=(3, BATCH, 2, SLOTS, 8)).astype(np.float32)
    valid = np.arange(SLOTS) < PAST[:, None]
    grouped = queries.reshape(3, BATCH, STEPS, 2, 2, 8)
    logits = np.einsum("mbtkgh,mbksh->mbtkgs", grouped, keys) * 8**-0.5
    logits = np.where(valid[None, :, None, None, None], logits, -np.inf)
    lse = np.log(np.exp(logits).sum(-1))
    expected = np.exp(logits - lse[..., None]).mean(4).max(2)
    past = jnp.asarray(PAST, jnp.int32)
    cache = KVCache(tuple(map(jnp.asarray, keys)), tuple(map(jnp.asarray, keys)), past)
    for layer in range(3):
        look = Look(jnp.asarray(queries[layer]), jnp.asarray(lse[layer].reshape(BATCH, STEPS, 4)))
        np.testing.assert_allclose(cache.score(layer, look, past), expected[layer], rtol=1e-4)


@pytest.mark.parametrize(("threshold", "layers"), [("exact", 4), ("linear", 1)])
def test_only_kernels_select_for_all_layers_at_once(monkeypatch, threshold, layers):
    seen = []

    def record(scores, *arguments, **options):
        seen.append(scores.shape[1:3])
        return select_blocks(scores, *arguments, **options)

    monkeypatch.setattr(mixture, "_LAYERS_AT_ONCE", 1)
    monkeypatch.setattr(mixture, "select_blocks", record)
    # Its kernels find exact nuclei alone.
    monkeypatch.setattr(mixture, "current_device", lambda: Device("gpu", (9, 0), (0, 11), 132))
    selected(selection("default", 0.8, threshold=threshold), draft_attention(1))
    assert set(seen) == {(layers, 2)}


def draft_plan(chooser: Mixture, attention: np.ndarray):
    """What the draft is to read after a window in which it looked so."""
    queries, cache = attending(attention)
    looks = Look(jnp.asarray(queries), jnp.zeros(queries.shape[:-1], jnp.float32))
    state = MixtureState(looks, None, Steering.start(BATCH, TARGET.num_layers), None)
    return chooser.plan(state, cache, jnp.asarray(PAST, jnp.int32))[1].draft_plan


@pytest.mark.parametrize("block_size", [1, 8])
def test_a_sparse_draft_reads_what_the_last_window_looked_at_most(monkeypatch, block_size):
    monkeypatch.setattr(mixture, "LEAST_DRAFT_ENTRIES", 4)
    changes = {"draft_reads": 0.25, "num_sink": 1, "num_recent": 2, "block_size": block_size}
    attention = draft_attention(6)
    plan = draft_plan(selection("default", 0.8, **changes), attention)
    scores = np.moveaxis(attention.reshape(STEPS, 3, BATCH, 2, 2, SLOTS).mean(4).max(0), 1, 0)
    ids, counts = np.asarray(plan.block_ids), np.asarray(plan.counts)
    assert counts.shape == (BATCH, 3, 2), "a plan of every layer"
    scores = scores.reshape(BATCH, 6, SLOTS) * (np.arange(SLOTS) < PAST[:, None, None])
    for row in range(BATCH):
        length = min(PAST[row] + 10, SLOTS)
        blocks = -(-length // block_size)
        padded = np.zeros((6, blocks * block_size))
        padded[:, :length] = scores[row, :, :length]
        by_block = padded.reshape(6, blocks, block_size).sum(-1)
        for head in range(6):
            place = row, head // 2, head % 2
            best = np.argsort(-by_block[head])[: int(np.ceil(np.float32(0.25) * blocks))]
            recent = {slot // block_size for slot in range(length - 12, length)}
            assert set(ids[place][: counts[place]].tolist()) == set(best.tolist()) | {0} | recent


def test_a_sparse_draft_reads_some_entries_however_short_the_text():
    plan = draft_plan(selection("default", 0.8, draft_reads=0.05), draft_attention(7))
    assert (np.asarray(plan.counts) == np.minimum(PAST + 10, SLOTS)[:, None, None]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft_reads": 0.0}, "expected a share"),
        ({"opening_weight": -0.1}, "expected a number of at least 0"),
        ({"opening_weight": float("nan")}, "expected a number of at least 0"),
        ({"memory_weight": -0.1}, "memory_weight is -0.1; expected a number of at least 0"),
        ({"memory_weight": float("inf")}, "expected a number of at least 0"),
        (
            {
                "prediction": "layer_map",
                "opening_weight": 0.0,
                "memory_weight": 0.5,
                "draft_reads": 1.0,
                "fits_draft_reads": False,
            },
            "prediction 'layer_map' has nothing that they could be weighed against",
        ),
        ({"opening_life": 0.0}, "expected a number of windows above 0"),
        ({"draft_reads": 0.5, "prediction": "layer_map"}, "needs the attention of a draft that reads everything"),
    ],
)
def test_impossible_policies_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(load_policy("default"), **changes)


def test_a_draft_reads_sparsely_only_where_it_is_scored_once_a_window():
    whole = selection("default", 0.8, granularity="head", draft_reads=0.5)
    assert whole.policy.draft_reads == 1.0
    with pytest.raises(UserError, match="only kv heads can be scored once a window"):
        dataclasses.replace(whole, policy=load_policy("default"))


def test_unknown_policy_is_refused():
    with pytest.raises(UserError, match="policy is 'best'; expected one of default, paper"):
        load_policy("best")


def test_more_dense_layers_than_there_are():
    assert selected(selection("default", 0.8, dense_layers=9), draft_attention(2)) == [None] * 4


def test_nothing_is_noted_where_there_is_no_plan():
    _, cache = attending(draft_attention(3))
    q, memory = jnp.zeros((BATCH, 1, 4, DRAFT.head_dim)), jnp.zeros((BATCH, 2, SLOTS))
    with pytest.raises(ValueError, match="memory is given without a plan"):
        cache.attend(0, q, memory=memory)
