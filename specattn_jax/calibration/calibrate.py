"""Calibration: fits an alignment and its budgets on text, without training either model.

Both models read the same passages. Attention is looked at in a few windows of W + 1 consecutive tokens, as in decoding:
the first W rows are what the draft would have said, all W + 1 are what verification asks.

- Mixture weights: expectation-maximisation on half of the passages (`alignment.fit_mixture`).
- Layer map: the published dynamic programme on the same rows.
- Budgets, on the other half: how much each layer's sparsity costs is estimated to second order. If sparse attention
  moves the attention output of a layer by d, then KL(full || sparse) is about E[(g . d)^2] / 2, where g is the gradient
  of log p(y) with y drawn from the model itself (the Fisher information). One backward pass prices every layer at
  every p.
- What it costs that the draft leaves out a part of its own cache, on these too (`draft_reads`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray
from specattn_kernels import top_p_threshold

from specattn_jax.calibration.draft_reads import measure_draft_reads
from specattn_jax.calibration.passages import CalibrationSettings, Passage, choose_passages, rows_of
from specattn_jax.errors import UserError
from specattn_jax.files import atomic_folder
from specattn_jax.models.forward import causal_attention, read_sequence
from specattn_jax.models.sharding import fetch
from specattn_jax.models.transformer import LanguageModel
from specattn_jax.reporting.plots import alignment_heatmap
from specattn_jax.selection.alignment import (
    Alignment,
    Granularity,
    fit_mixture,
    layer_similarity,
    mixture_kl,
    monotone_map,
    reduce_heads,
    save_alignment,
)
from specattn_jax.selection.budgets import fit_budgets, length_knots
from specattn_jax.selection.policy import SelectionPolicy
from specattn_jax.texts import Documents

# Nucleus masses at which layers are priced: the mass left out shrinks geometrically.
LEFT_OUT_GRID = np.geomspace(0.9, 5e-4, 16)
SAVINGS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
HEATMAP = "heatmap.png"
_LOGITS_AT_ONCE = 2048
# Passages, read together, of which is measured what a sparse draft costs.
_READ_SPARSELY = 4


class Captured(NamedTuple):
    """What one layer's attention at chosen rows is made of.

    Attributes:
        q: queries of the Q chosen tokens.
        k: keys of all T tokens.
        v: values of all T tokens.
    """

    q: Float[Array, "Q N H"]
    k: Float[Array, "K T H"]
    v: Float[Array, "K T H"]


@jax.jit
def capture(model: LanguageModel, tokens: Int32[Array, " T"], rows: Int32[Array, " Q"]) -> list[Captured]:
    """Queries at the given rows, and all keys and values, of every layer, in float32."""
    layers: list[Captured] = []

    def attend(
        _: int, q: Float[Array, "1 T N H"], k: Float[Array, "1 T K H"], v: Float[Array, "1 T K H"]
    ) -> Float[Array, "1 T N H"]:
        q32, k32, v32 = (x[0].astype(jnp.float32) for x in (q, k, v))
        layers.append(Captured(q32[rows], jnp.swapaxes(k32, 0, 1), jnp.swapaxes(v32, 0, 1)))
        return causal_attention(q, k, v)

    read_sequence(model, tokens[None], attend)
    return layers


def _weights(layer: Captured, keep: Array) -> Float[Array, "K G Q T"]:
    """Softmax weights of the captured rows over the slots that `keep` allows."""
    num_rows, _, width = layer.q.shape
    grouped = layer.q.reshape(num_rows, layer.k.shape[0], -1, width)
    logits = jnp.einsum("qkgh,kth->kgqt", grouped, layer.k) * width**-0.5
    return jax.nn.softmax(jnp.where(keep, logits, -jnp.inf), axis=-1)


@jax.jit
def attention_at(layer: Captured, rows: Int32[Array, " Q"]) -> Float[Array, "N Q T"]:
    """Causal attention of every head at the captured rows."""
    keep = jnp.arange(layer.k.shape[1]) <= rows[:, None]
    weights = _weights(layer, keep)
    return weights.reshape(-1, *weights.shape[2:])


@jax.jit
def output_gradients(
    model: LanguageModel, tokens: Int32[Array, " T"], rows: Int32[Array, " Q"], key: PRNGKeyArray
) -> tuple[Float[Array, "Q N H"], ...]:
    """Gradient of log p(y), y drawn from the model, for each layer's attention output at the given rows."""
    config, count = model.config, tokens.shape[0]
    shape = (1, count, config.num_heads, config.head_dim)

    @jax.checkpoint
    def drawn_log_likelihood(part: tuple[Float[Array, "t D"], Bool[Array, " t"], PRNGKeyArray]) -> Float[Array, ""]:
        hidden, real, key = part
        log_probs = jax.nn.log_softmax(model.logits(hidden))
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(log_probs))
        return jnp.sum(jnp.where(real, jnp.take_along_axis(log_probs, drawn[:, None], axis=-1)[:, 0], 0.0))

    def log_likelihood(nudges: tuple[Float[Array, "1 T N H"], ...]) -> Float[Array, ""]:
        def attend(layer: int, q: Array, k: Array, v: Array) -> Float[Array, "1 T N H"]:
            return causal_attention(q, k, v) + nudges[layer]

        hidden = read_sequence(model, tokens[None], attend, again=True)[0]
        # Part by part: the logits of all tokens at once would be the largest array of all.
        size = min(count, _LOGITS_AT_ONCE)
        parts = -(-count // size)
        hidden = jnp.pad(hidden, ((0, parts * size - count), (0, 0))).reshape(parts, size, -1)
        real = (jnp.arange(parts * size) < count).reshape(parts, size)
        keys = key[None] if parts == 1 else jax.random.split(key, parts)
        return jnp.sum(jax.lax.map(drawn_log_likelihood, (hidden, real, keys)))

    nudges = tuple(jnp.zeros(shape, model.dtype) for _ in range(config.num_layers))
    return tuple(gradient[0, rows].astype(jnp.float32) for gradient in jax.grad(log_likelihood)(nudges))


def _selected(
    predicted: Float[Array, "n K T"], p: Float[Array, ""], starts: Int32[Array, " n"], policy: SelectionPolicy
) -> Bool[Array, "n K T"]:
    """Slots that `select_blocks` would choose before each window, as a mask (a plan would only be undone again)."""
    slots, size = predicted.shape[-1], policy.block_size
    start = starts[:, None, None]
    past = jnp.where(jnp.arange(slots) < start, predicted, 0.0)
    blocks = jnp.pad(past, ((0, 0), (0, 0), (0, -slots % size))).reshape(*past.shape[:2], -1, size).sum(axis=-1)
    threshold = top_p_threshold(blocks, p, method=policy.threshold, steps=policy.steps)[..., None]
    chosen = jnp.repeat(blocks >= threshold, size, axis=-1)[..., :slots]
    slot = jnp.arange(slots)
    chosen |= (slot // size * size < policy.num_sink) | ((slot // size + 1) * size > start - policy.num_recent)
    return chosen & (slot < start)


@functools.partial(jax.jit, static_argnames=("policy", "units"))
def price_layer(
    layer: Captured,
    predicted: Float[Array, "n K T"],
    gradients: Float[Array, "samples Q N H"],
    starts: Int32[Array, " n"],
    masses: Float[Array, " C"],
    *,
    policy: SelectionPolicy,
    units: int = 1,
) -> tuple[Float[Array, "units C"], Float[Array, "units C n"]]:
    """Estimated KL per window and density of one layer, or of each of its kv heads, for every nucleus mass.

    Args:
        layer: the target layer at the rows of the windows (n windows of Q / n rows).
        predicted: the draft's prediction for each window, maximum over its steps.
        gradients: from `output_gradients`, several samples.
        starts: first slot of each window.
        masses: nucleus masses p.
        policy: how the prediction becomes a selection.
        units: into how many parts the layer's heads are priced: 1, or K for each kv head alone (the others dense).

    Returns:
        Mean over windows of the second-order KL (nats, summed over the window's rows), and the share of the past read.
    """
    num, _, slots = predicted.shape
    rows = (starts[:, None] + jnp.arange(layer.q.shape[0] // num)).reshape(-1)
    causal = jnp.arange(slots) <= rows[:, None]

    def attend(keep: Array) -> Float[Array, "Q N H"]:
        out = jnp.einsum("kgqt,kth->qkgh", _weights(layer, keep), layer.v)
        return out.reshape(layer.q.shape)

    dense = attend(causal)

    def price(p: Float[Array, ""]) -> tuple[Float[Array, " units"], Float[Array, "units n"]]:
        mask = _selected(predicted, p, starts, policy)
        fresh = jnp.arange(slots) >= starts[:, None, None]
        per_row = jnp.repeat(mask | fresh, rows.shape[0] // num, axis=0)
        moved = attend(jnp.swapaxes(per_row, 0, 1)[:, None] & causal) - dense
        felt = jnp.einsum("sqnh,qnh->sqn", gradients, moved)
        felt = jnp.sum(felt.reshape(*felt.shape[:2], units, -1), axis=-1)
        entries = jnp.sum(mask, axis=-1).reshape(num, units, -1)
        density = jnp.mean(entries, axis=-1).T / starts
        return 0.5 * jnp.sum(jnp.mean(felt**2, axis=0), axis=0) / num, density

    costs, densities = jax.lax.map(price, masses)
    return costs.T, jnp.swapaxes(densities, 0, 1)


def draft_sources(
    draft: LanguageModel, passage: Passage, granularity: Granularity, window: int
) -> Float[Array, "R Q T"]:
    """Attention of every source of the draft at the W draft rows of every window."""
    rows = rows_of(passage.starts, window)
    reduce = jax.jit(
        lambda layer, rows: reduce_heads(
            jnp.swapaxes(attention_at(layer, rows), 0, 1), granularity, draft.config.num_kv_heads
        )
    )
    per_layer = [reduce(layer, rows) for layer in capture(draft, passage.tokens, rows)]
    return _finite("draft", draft, jnp.swapaxes(jnp.concatenate(per_layer, axis=1), 0, 1))


def target_rows(target: LanguageModel, passage: Passage, window: int) -> Float[Array, "rows Q T"]:
    """Attention of every target kv head (mean over its group) at the W draft rows of every window."""
    rows, heads = rows_of(passage.starts, window), target.config.num_kv_heads
    average = jax.jit(
        lambda layer, rows: jnp.mean(
            attention_at(layer, rows).reshape(heads, -1, rows.shape[0], layer.k.shape[1]), axis=1
        )
    )
    return _finite(
        "target", target, jnp.concatenate([average(layer, rows) for layer in capture(target, passage.tokens, rows)])
    )


def _finite(role: str, model: LanguageModel, found: Array) -> Array:
    """What was found about a model, if it consists of numbers.

    Raises:
        UserError: it does not; names the model.
    """
    if not bool(jnp.all(jnp.isfinite(found))):
        raise UserError(
            f"{role}: what it computes of the texts is NaN or infinite, in {model.dtype.name}; check its files, or "
            "load it with dtype float32."
        )
    return found


def price_passage(
    target: LanguageModel,
    draft: LanguageModel,
    weights: Float[Array, "rows R"],
    passage: Passage,
    policy: SelectionPolicy,
    settings: CalibrationSettings,
    key: PRNGKeyArray,
) -> tuple[np.ndarray, np.ndarray]:
    """Estimated KL `[units, C]` and density `[units, C, n]` on one passage; units are layers, or kv heads of layers."""
    count, heads = settings.window + 1, target.config.num_kv_heads
    units = heads if settings.budgets == "kv_head" else 1
    rows = rows_of(passage.starts, count)
    sources = draft_sources(draft, passage, settings.granularity, settings.window)
    layers = capture(target, passage.tokens, rows)
    samples = [
        output_gradients(target, passage.tokens, rows, sample) for sample in jax.random.split(key, settings.gradients)
    ]
    starts, masses = jnp.asarray(passage.starts), jnp.asarray(1.0 - LEFT_OUT_GRID, jnp.float32)
    predict = jax.jit(
        lambda mix, sources: jnp.swapaxes(
            jnp.max(
                jnp.einsum("kr,rqt->kqt", mix, sources).reshape(heads, len(passage.starts), settings.window, -1), axis=2
            ),
            0,
            1,
        )
    )
    costs, densities = [], []
    for index, layer in enumerate(layers):
        predicted = predict(weights[index * heads : (index + 1) * heads], sources)
        gradients = jnp.stack([sample[index] for sample in samples])
        cost, density = price_layer(layer, predicted, gradients, starts, masses, policy=policy, units=units)
        cost, density = fetch((cost, density))
        costs.append(cost)
        densities.append(density)
    return np.concatenate(costs), np.concatenate(densities)


def calibrate(
    target: LanguageModel,
    draft: LanguageModel,
    documents: Documents,
    policy: SelectionPolicy,
    *,
    settings: CalibrationSettings | None = None,
    provenance: dict[str, object] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Alignment, np.ndarray]:
    """Fits everything that an `Alignment` holds.

    Args:
        target: the target; on a mesh where its weights lie on one.
        draft: the draft, likewise.
        documents: token ids of each text, or of each text of each kind.
        policy: the mixture policy for which budgets are fitted.
        settings: what to read.
        provenance: noted in the artifact: models and texts.
        progress: told the stage, steps done and steps in all.

    Returns:
        The alignment, and the similarity `[M, L]` of draft and target layers (for the heat-map).

    Raises:
        UserError: the texts are too short, the context exceeds a model's, or a model computes NaN or infinity.
    """
    settings = settings or CalibrationSettings()
    limit = min(target.config.max_context, draft.config.max_context)
    if settings.context > limit:
        raise UserError(f"context is {settings.context}; expected at most the models' {limit}.")
    rng = np.random.default_rng(settings.seed)
    passages = choose_passages(documents, settings, rng)
    half = len(passages) // 2
    tell = progress or (lambda stage, done, total: None)
    total = len(passages) + 3

    # On the host, until all are there: next to their parts the whole would need twice the memory.
    wanted, sources = list[np.ndarray](), list[np.ndarray]()
    for index, passage in enumerate(passages[:half]):
        tell("reading passages", index, total)
        wanted.append(fetch(target_rows(target, passage, settings.window)))
        sources.append(fetch(draft_sources(draft, passage, settings.granularity, settings.window)))
    tell("fitting the mixture", half, total)
    attention, basis = (jnp.asarray(np.concatenate(parts, axis=1)) for parts in (wanted, sources))
    part = wanted[0].shape[1]
    del wanted, sources
    weights = jax.jit(fit_mixture, static_argnums=(2, 3))(attention, basis, settings.iterations, part)
    misfit = jax.jit(mixture_kl, static_argnums=3)(attention, basis, weights, part)
    similarity = _similarity(attention, basis, target, draft)
    layer_map = monotone_map(similarity)

    costs, densities = [], []
    key = jax.random.key(settings.seed)
    for index, passage in enumerate(passages[half:]):
        tell("pricing layers", half + 1 + index, total)
        cost, density = price_passage(target, draft, weights, passage, policy, settings, jax.random.fold_in(key, index))
        _finite("target", target, jnp.asarray(cost))
        costs.append(cost)
        densities.append(density)
    tell("fitting budgets", total - 2, total)
    starts = np.concatenate([passage.starts for passage in passages[half:]])
    budgets = fit_budgets(np.mean(costs, axis=0), np.concatenate(densities, axis=2), starts, LEFT_OUT_GRID, SAVINGS)
    notes = {
        **(provenance or {}),
        "settings": dataclasses.asdict(settings),
        "policy": dataclasses.asdict(policy),
        "mixture_kl": float(fetch(jnp.mean(misfit))),
        "layer_map_kl": float(-np.mean([similarity[i, j] for j, i in enumerate(layer_map)])),
    }
    alignment = Alignment(
        weights=weights,
        savings=jnp.asarray(SAVINGS, jnp.float32),
        left_out=jnp.asarray(budgets.left_out, jnp.float32),
        length_knots=jnp.asarray(length_knots(int(starts.max())), jnp.float32),
        length_scale=jnp.asarray(budgets.length_scale, jnp.float32),
        layer_map=layer_map,
        granularity=settings.granularity,
        provenance=json.dumps(notes, sort_keys=True),
    )
    tell("reading with a sparse draft", total - 1, total)
    held_out = jnp.stack([passage.tokens for passage in passages[half:][:_READ_SPARSELY]])
    count = {"window": settings.window, "windows": settings.draft_windows}
    alignment = measure_draft_reads(target, draft, alignment, policy, held_out, **count)
    tell("done", total, total)
    return alignment, similarity


def save_calibration(out: Path, alignment: Alignment, similarity: Float[np.ndarray, "M L"]) -> None:
    """Writes what `calibrate` returned: alignment.json, alignment.npz and the heat-map heatmap.png.

    Args:
        out: a new or empty folder; it appears complete or not at all.
        alignment: from `calibrate`, with the names of target and draft in its provenance, for the title.
        similarity: likewise.

    Raises:
        UserError: the folder is taken or cannot be written.
    """
    names = json.loads(alignment.provenance)
    picture = alignment_heatmap(
        similarity, alignment, target=str(names.get("target", "?")), draft=str(names.get("draft", "?"))
    )
    with atomic_folder(out) as work:
        save_alignment(alignment, work)
        (work / HEATMAP).write_bytes(picture)


def _similarity(
    attention: Float[Array, "rows n S"], basis: Float[Array, "R n S"], target: LanguageModel, draft: LanguageModel
) -> np.ndarray:
    """Published similarity `[M, L]` from rows that are already averaged within groups (groups are of equal size)."""
    per_layer = attention.reshape(target.config.num_layers, -1, *attention.shape[1:]).mean(axis=1)
    drafts = basis.reshape(draft.config.num_layers, -1, *basis.shape[1:]).mean(axis=1)
    found: np.ndarray = fetch(jax.jit(layer_similarity)(per_layer, drafts))
    return found
