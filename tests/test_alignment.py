"""Alignment: the layer map, the mixture, budgets, and the saved artifact."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_alignment, tiny_config, tiny_model

from specattn_jax.calibration import calibrate as calibration
from specattn_jax.calibration.calibrate import (
    attention_at,
    calibrate,
    capture,
    output_gradients,
    price_layer,
)
from specattn_jax.calibration.passages import CalibrationSettings
from specattn_jax.errors import UserError
from specattn_jax.models import forward
from specattn_jax.models.forward import read_sequence
from specattn_jax.selection.alignment import (
    Alignment,
    NucleusMass,
    Steering,
    attention_kl,
    fit_mixture,
    join_alignments,
    layer_similarity,
    load_alignment,
    mixture_kl,
    monotone_map,
    reduce_heads,
    save_alignment,
)
from specattn_jax.selection.budgets import fit_budgets
from specattn_jax.selection.policy import load_policy


def random_rows(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.dirichlet(np.full(shape[-1], 0.2), shape[:-1]).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
def test_monotone_map_is_the_best_of_all_monotone_maps(seed):
    similarity = -np.random.default_rng(seed).random((4, 5))
    chosen = monotone_map(similarity)
    totals = {
        candidate: sum(similarity[source, layer] for layer, source in enumerate(candidate))
        for candidate in itertools.combinations_with_replacement(range(4), 5)
    }
    assert list(chosen) == sorted(chosen)
    assert totals[chosen] == pytest.approx(max(totals.values()))


def test_layer_similarity_is_the_negative_kl():
    rng = np.random.default_rng(0)
    target, draft = random_rows(rng, 3, 6, 20), random_rows(rng, 2, 6, 20)
    exact = np.array(
        [
            [
                -np.mean(np.sum(t.astype(np.float64) * np.log(np.maximum(t, 1e-12) / np.maximum(d, 1e-12)), -1))
                for t in target
            ]
            for d in draft
        ]
    )
    np.testing.assert_allclose(layer_similarity(jnp.asarray(target), jnp.asarray(draft)), exact, rtol=1e-4)


def test_mixture_recovers_the_weights_that_made_the_target():
    rng = np.random.default_rng(1)
    sources = random_rows(rng, 6, 200, 40)
    true = rng.dirichlet(np.ones(6), 3).astype(np.float32)
    target = jnp.asarray(np.einsum("ar,rns->ans", true, sources))
    fitted = fit_mixture(target, jnp.asarray(sources), 400)
    np.testing.assert_allclose(fitted, true, atol=5e-3)
    np.testing.assert_allclose(fitted.sum(axis=1), 1.0, rtol=1e-5)


def test_a_mixture_is_fitted_part_by_part():
    rng = np.random.default_rng(4)
    sources, target = jnp.asarray(random_rows(rng, 5, 60, 30)), jnp.asarray(random_rows(rng, 4, 60, 30))
    whole = fit_mixture(target, sources, 20)
    kl = attention_kl(target, jnp.einsum("ar,rns->ans", whole, sources))
    np.testing.assert_allclose(mixture_kl(target, sources, whole), kl, rtol=1e-5)
    for part in (1, 12, 60):
        np.testing.assert_allclose(fit_mixture(target, sources, 20, part), whole, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(mixture_kl(target, sources, whole, part), kl, rtol=1e-4)
    with pytest.raises(ValueError, match="part is 7; expected a divisor of the 60 positions"):
        fit_mixture(target, sources, 20, 7)


def test_mixture_never_predicts_worse_than_any_single_source():
    rng = np.random.default_rng(2)
    sources, target = jnp.asarray(random_rows(rng, 5, 50, 30)), jnp.asarray(random_rows(rng, 4, 50, 30))
    weights = fit_mixture(target, sources, 100)
    mixed = attention_kl(target, jnp.einsum("ar,rns->ans", weights, sources))
    singles = jnp.stack([attention_kl(target, jnp.broadcast_to(source, target.shape)) for source in sources])
    assert (mixed <= singles.min(axis=0) + 1e-5).all()


@pytest.mark.parametrize(("granularity", "rows"), [("head", 6), ("kv_head", 2), ("layer", 1)])
def test_sources_are_means_of_heads(granularity, rows):
    scores = np.random.default_rng(3).random((2, 6, 9)).astype(np.float32)
    expected = scores.reshape(2, rows, 6 // rows, 9).mean(axis=2)
    np.testing.assert_allclose(reduce_heads(jnp.asarray(scores), granularity, 2), expected, rtol=1e-6)


def test_budgets_meet_the_wanted_savings_and_spend_where_it_costs_most():
    rng = np.random.default_rng(4)
    grid = np.geomspace(0.9, 1e-3, 16)
    spread = rng.uniform(0.3, 2.0, (4, 1, 1))
    starts = np.linspace(100, 2000, 30).astype(int)
    densities = np.clip(-np.log(grid)[None, :, None] * 0.08 * spread * (2000 / starts) ** 0.2, 0, 1)
    price = np.array([1.0, 1.0, 1.0, 100.0])
    costs = price[:, None] * grid[None] ** 2
    budgets = fit_budgets(costs, densities, starts, grid, (0.6, 0.9))
    for row, (masses, scales) in enumerate(zip(budgets.left_out, budgets.length_scale, strict=True)):
        assert masses[3] == masses.min()
        mass = NucleusMass(
            jnp.asarray(masses), jnp.asarray([250.0, 500, 1000, 2000]), jnp.asarray(scales), jnp.zeros(())
        )
        left_out = 1 - np.asarray(mass.p(jnp.asarray(starts)))
        reached = [
            np.mean(
                [
                    np.interp(np.log(left_out[n, layer]), np.log(grid[::-1]), densities[layer, ::-1, n])
                    for layer in range(4)
                ]
            )
            for n in range(len(starts))
        ]
        assert np.mean(reached) == pytest.approx(1 - (0.6, 0.9)[row], abs=0.02)


def test_nucleus_mass_of_one_reads_everything():
    np.testing.assert_array_equal(NucleusMass.uniform(1.0, 3).p(jnp.array([1, 100, 10_000])), np.ones((3, 3)))


def test_alignment_survives_saving(tmp_path):
    alignment = random_alignment(tiny_config(num_layers=3), tiny_config())
    save_alignment(alignment, tmp_path)
    loaded = load_alignment(tmp_path)
    assert loaded.layer_map == alignment.layer_map
    assert loaded.granularity == alignment.granularity
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(loaded), jax.tree.leaves(alignment))


def of_length(length: int, seed: int) -> Alignment:
    """A random alignment that was calibrated on caches of so many entries."""
    one = random_alignment(tiny_config(), tiny_config(), seed)
    return dataclasses.replace(one, length_knots=jnp.asarray([length / 4, length], jnp.float32))


def test_alignments_of_several_lengths_are_one_that_lies_between(tmp_path):
    short, long = of_length(100, 1), of_length(1600, 2)
    # A budget for every kv head beside one for every layer.
    long = dataclasses.replace(long, left_out=jnp.repeat(long.left_out, 2, axis=1))
    save_alignment(join_alignments([long, short]), tmp_path)
    joined = load_alignment(tmp_path)
    assert [one.length for one in joined.every] == [100, 1600]
    assert joined.longest == 1600
    past = jnp.asarray([1, 100, 400, 1600, 9000])
    share = np.array([0.0, 0.0, 0.5, 1.0, 1.0])[:, None, None]
    wanted = (1 - share) * np.asarray(short.weights) + share * np.asarray(long.weights)
    np.testing.assert_allclose(joined.weights_at(past), wanted, rtol=1e-5)
    masses = [np.asarray(one.mass_for_saving(0.7).left_out) for one in (short, long)]
    masses[0] = np.repeat(masses[0], 2)
    wanted = np.exp((1 - share[..., 0]) * np.log(masses[0]) + share[..., 0] * np.log(masses[1]))
    np.testing.assert_allclose(1 - np.asarray(joined.mass_for_saving(0.7).p(past)), wanted, rtol=1e-4)
    with pytest.raises(UserError, match="expected different lengths"):
        join_alignments([joined, of_length(1600, 3)])


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": jnp.full((4, 4), jnp.nan)},
        {"left_out": jnp.zeros((2, 3))},
        {"length_scale": jnp.ones((1, 2))},
        {"layer_map": (9, 9)},
        {"granularity": "token"},
    ],
)
def test_an_alignment_that_cannot_be_is_refused(tmp_path, monkeypatch, changes):
    def fail(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    sound = random_alignment(tiny_config(), tiny_config())
    save_alignment(sound, tmp_path)
    assert load_alignment(tmp_path).layer_map == sound.layer_map
    # A full device is no damage.
    with monkeypatch.context() as patch:
        patch.setattr(jnp, "asarray", fail)
        with pytest.raises(RuntimeError, match="RESOURCE"):
            load_alignment(tmp_path)
    save_alignment(dataclasses.replace(sound, **changes), tmp_path)
    with pytest.raises(UserError, match=f"alignment: {tmp_path}: is damaged .*; make one with `specattn calibrate`"):
        load_alignment(tmp_path)


def test_damaged_alignment_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_alignment(tmp_path)
    save_alignment(random_alignment(tiny_config(), tiny_config()), tmp_path)
    whole = (tmp_path / "alignment.npz").read_bytes()
    (tmp_path / "alignment.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        load_alignment(tmp_path)


@pytest.mark.parametrize("saving", [0.2, 0.95, float("nan")])
def test_saving_outside_the_calibrated_range_is_refused(saving):
    with pytest.raises(UserError, match="kv_reduction is"):
        random_alignment(tiny_config(), tiny_config()).mass_for_saving(saving)


def test_captured_attention_is_the_models_attention():
    model = tiny_model(0, scale=4.0)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 8, 24), jnp.int32)
    rows = jnp.array([0, 3, 20])
    outs = {}

    def attend(layer, q, k, v):
        outs[layer] = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return outs[layer]

    read_sequence(model, tokens[None], attend)
    for layer, captured in enumerate(capture(model, tokens, rows)):
        weights = attention_at(captured, rows).reshape(2, 2, 3, 24)
        out = jnp.einsum("kgqt,kth->qkgh", weights, captured.v).reshape(3, 4, 8)
        np.testing.assert_allclose(out, outs[layer][0, rows], atol=1e-5)


def test_second_order_price_matches_the_true_kl():
    """Averaged over draws, (g . d)^2 / 2 is the KL divergence that a small move d of one layer's output causes."""
    model = tiny_model(3, scale=6.0)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 8, 16), jnp.int32)
    rows = jnp.arange(16)
    move = 0.02 * jax.random.normal(jax.random.key(9), (16, 4, 8))

    def log_probs(nudge):
        def attend(layer, q, k, v):
            out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            return out + nudge if layer == 0 else out

        return jax.nn.log_softmax(model.logits(read_sequence(model, tokens[None], attend)[0]))

    before, after = log_probs(jnp.zeros_like(move)), log_probs(move)
    true = float(jnp.sum(jnp.exp(before) * (before - after)))
    keys = jax.random.split(jax.random.key(5), 3000)
    gradients = jax.lax.map(lambda key: output_gradients(model, tokens, rows, key)[0], keys, batch_size=100)
    estimate = float(0.5 * jnp.mean(jnp.sum(gradients * move, axis=(1, 2, 3)) ** 2))
    assert estimate == pytest.approx(true, rel=0.15)


def test_reading_everything_costs_nothing_and_heads_make_up_their_layer():
    model = tiny_model(0, scale=4.0)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 8, 48), jnp.int32)
    starts = np.array([12, 30])
    rows = jnp.asarray((starts[:, None] + np.arange(3)).reshape(-1))
    layer = capture(model, tokens, rows)[1]
    gradients = jax.random.normal(jax.random.key(0), (1, 6, 4, 8))
    predicted = jnp.asarray(random_rows(np.random.default_rng(0), 2, 2, 48))
    masses = jnp.array([0.3, 0.8, 1.0])
    policy = load_policy("default")
    policy = dataclasses.replace(policy, num_recent=0, num_sink=0)
    costs, densities = {}, {}
    for units in (1, 2):
        costs[units], densities[units] = price_layer(
            layer, predicted, gradients, jnp.asarray(starts), masses, policy=policy, units=units
        )
        assert costs[units].shape == (units, 3)
        np.testing.assert_allclose(densities[units][:, 2], 1.0)
        np.testing.assert_allclose(costs[units][:, 2], 0.0, atol=1e-9)
        assert (costs[units][:, 0] > 0).all()
        assert (np.diff(densities[units], axis=1) > 0).all()
    # A layer reads what its kv heads read on average.
    np.testing.assert_allclose(densities[1][0], densities[2].mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize(("budgets", "units"), [("layer", 3), ("kv_head", 6)])
def test_calibration_of_a_tiny_pair(tmp_path, budgets, units):
    target, draft = tiny_model(0, scale=4.0, num_layers=3), tiny_model(1, scale=4.0)
    documents = [np.random.default_rng(0).integers(0, 8, 400).tolist()]
    settings = CalibrationSettings(context=96, window=3, passages=2, windows=4, iterations=20, budgets=budgets)
    told = []
    alignment, similarity = calibrate(
        target, draft, documents, load_policy("default"), settings=settings, progress=lambda *step: told.append(step)
    )
    again, _ = calibrate(target, draft, documents, load_policy("default"), settings=settings)
    jax.tree.map(np.testing.assert_array_equal, alignment, again)
    assert alignment.weights.shape == (6, 4)
    assert similarity.shape == (2, 3)
    assert alignment.left_out.shape == (len(alignment.savings), units)
    save_alignment(alignment, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, load_alignment(tmp_path), alignment)
    np.testing.assert_allclose(alignment.weights.sum(axis=1), 1.0, rtol=1e-5)
    assert told[-1][1] == told[-1][2]
    with pytest.raises(UserError, match="all texts have 400 tokens"):
        calibrate(target, draft, documents, load_policy("default"), settings=dataclasses.replace(settings, context=500))


@pytest.mark.parametrize("error", [0.7, 0.85, 1.4])
@pytest.mark.parametrize("wanted", [0.1, 0.25])
def test_steering_meets_the_saving_on_texts_that_read_more_or_less_than_expected(error, wanted):
    """A text whose density is off by a factor, and goes as the inverse square root of the mass left out."""
    one = jnp.ones((1,))
    mass = NucleusMass(jnp.full((1,), 0.02), one, one, jnp.asarray(wanted))
    rng, steering = np.random.default_rng(0), Steering.start(1, 1)
    left_out = jax.jit(lambda steering: 1.0 - mass.p(jnp.array([500]), steering)[0, 0])
    for _ in range(60):
        read = wanted * error * (0.02 / float(left_out(steering))) ** 0.5 * rng.uniform(0.8, 1.2)
        steering = steering.add(jnp.full((1, 1), read, jnp.float32), jnp.array([True]))
    assert int(steering.windows[0]) == 60
    assert abs(float(steering.read[0, 0]) / 60 - wanted) < 0.02


def test_windows_after_the_end_steer_nothing():
    steering = Steering.start(2, 3).add(jnp.full((2, 3), 0.5), jnp.array([True, False]))
    np.testing.assert_array_equal(steering.windows, [1, 0])
    np.testing.assert_array_equal(steering.read, [[0.5] * 3, [0.0] * 3])


def test_attention_in_blocks_is_attention_at_once(monkeypatch):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (2, 37, heads, 8)) for key, heads in zip(keys, (4, 2, 2), strict=False))
    wanted = jax.random.normal(keys[3], q.shape)

    def both():
        return jax.value_and_grad(lambda *x: jnp.vdot(wanted, forward.causal_attention(*x)), argnums=(0, 1, 2))(q, k, v)

    whole = both()
    monkeypatch.setattr(forward, "_WHOLE_TOKENS", 8)
    monkeypatch.setattr(forward, "_BLOCK_TOKENS", 16)
    for got, right in zip(jax.tree.leaves(both()), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, right, atol=2e-5)


@pytest.mark.slow
def test_gradients_of_likelihoods_in_parts(monkeypatch):
    """Part by part the same tokens are drawn and the same gradients found as from all logits at once."""
    model = tiny_model(0, num_layers=2)
    tokens, rows, key = jnp.arange(3, 23, dtype=jnp.int32), jnp.array([4, 5, 19]), jax.random.key(1)
    size, parts = 8, 3

    def likelihood(nudges):
        hidden = forward.read_sequence(
            model, tokens[None], lambda layer, q, k, v: forward.causal_attention(q, k, v) + nudges[layer]
        )
        padded = jnp.pad(hidden[0], ((0, parts * size - 20), (0, 0)))
        log_probs = jax.nn.log_softmax(model.logits(padded)).reshape(parts, size, -1)
        drawn = jax.vmap(jax.random.categorical)(jax.random.split(key, parts), jax.lax.stop_gradient(log_probs))
        return jnp.sum(jnp.take_along_axis(log_probs, drawn[..., None], axis=-1).reshape(-1)[:20])

    config = model.config
    nudges = tuple(jnp.zeros((1, 20, config.num_heads, config.head_dim)) for _ in range(2))
    right = jax.grad(likelihood)(nudges)
    monkeypatch.setattr(calibration, "_LOGITS_AT_ONCE", size)
    for got, wanted in zip(calibration.output_gradients(model, tokens, rows, key), right, strict=True):
        np.testing.assert_allclose(got, wanted[0, rows], atol=1e-5)


def test_doubt_of_texts_far_longer_than_those_of_the_calibration():
    alignment = random_alignment(tiny_config(), tiny_config())  # made for up to 64 tokens
    assert alignment.longest == 64
    assert alignment.doubt(256) is None
    assert "texts of up to 64 tokens, and this one has 257" in alignment.doubt(257)
