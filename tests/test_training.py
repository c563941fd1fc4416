"""Distillation on a tiny target: it learns, resumes exactly, and refuses what cannot work."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import causal_attention, outputs, run, selection_for, tiny_model

from specattn_jax.decoding.speculative import Speculative
from specattn_jax.errors import UserError
from specattn_jax.evaluation.forced import read_documents
from specattn_jax.models.forward import likeliest_next, read_sequence
from specattn_jax.selection.alignment import attention_kl, fit_mixture
from specattn_jax.training.data import make_data
from specattn_jax.training.objective import attention_loss, read, token_loss
from specattn_jax.training.settings import TrainSettings
from specattn_jax.training.trainer import accepted_per_window, assemble, init_state, initial_weights, train

SETTINGS = TrainSettings(
    num_layers=2,
    steps=50,
    rows=4,
    length=64,
    accumulate=2,
    peak_rate=1e-2,
    warmup=5,
    attention_rows=8,
    continuations=48,
    prompt=16,
    written=16,
)


@pytest.fixture(scope="module")
def target():
    return tiny_model(0, num_layers=4, scale=8.0)


@pytest.fixture(scope="module")
def data(target):
    documents = [np.random.default_rng(seed).integers(0, 8, 3000).tolist() for seed in range(2)]
    return make_data(target, documents, SETTINGS, held_out=16, batch=16)


def losses(folder) -> list[float]:
    return [json.loads(line)["losses"]["total"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(target, data, tmp_path_factory):
    """A run to the end: its folder, which stays as it is, and the weights."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(target, data, SETTINGS, folder, report_every=5, checkpoint_every=20)


def test_loss_decreases_and_a_killed_run_resumes_exactly(target, data, whole, tmp_path):
    folder, weights = whole
    curve = losses(folder)
    assert np.mean(curve[-3:]) < 0.6 * curve[0]

    def killed(report) -> None:
        if report.step == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(target, data, SETTINGS, tmp_path / "cut", report_every=5, checkpoint_every=20, on_report=killed)
    before = losses(tmp_path / "cut")
    resumed = train(target, data, SETTINGS, tmp_path / "cut", report_every=5, checkpoint_every=20)
    again = losses(tmp_path / "cut")[len(before) :]
    # From the checkpoint of step 20: reports 25, 30, ... once more, the same to the last bit.
    assert again == curve[4:]
    jax.tree.map(np.testing.assert_array_equal, resumed, weights)


def test_a_draft_of_all_layers_is_the_target(target):
    draft = assemble(initial_weights(target, 4), target)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 8, (2, 32)), jnp.int32)
    rows = jnp.array([5, 20])
    teacher, student = read(target, tokens, rows), read(draft, tokens, rows)
    np.testing.assert_allclose(teacher.hidden, student.hidden, rtol=1e-5)
    assert float(token_loss(target, draft, teacher.hidden, student.hidden)) == pytest.approx(0.0, abs=1e-6)


def test_the_token_loss_and_its_gradient_are_those_of_the_whole_softmax(target, monkeypatch):
    draft = assemble(initial_weights(target, 2), target)
    rng = np.random.default_rng(1)
    wanted, have = (jnp.asarray(rng.normal(size=(2, 12, target.config.embed_dim)), jnp.float32) for _ in range(2))

    def plain(states):
        teacher, student = (jax.nn.log_softmax(target.logits(x)) for x in (wanted, states))
        return jnp.mean(jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1))

    expected, slope = jax.value_and_grad(plain)(have)
    for chunk in (8, 4096):
        monkeypatch.setattr("specattn_jax.training.objective._LOGITS", chunk * target.config.vocab_size)
        loss, found = jax.value_and_grad(lambda states: 2 * token_loss(target, draft, wanted, states))(have)
        assert float(loss) == pytest.approx(2 * float(expected), rel=1e-5)
        np.testing.assert_allclose(found, 2 * slope, rtol=1e-4, atol=1e-7)


def test_attention_loss_and_its_mixture_step_agree_with_calibration():
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.dirichlet(np.full(12, 0.3), (4, 2, 5)), jnp.float32)
    sources = jnp.asarray(rng.dirichlet(np.full(12, 0.3), (3, 2, 5)), jnp.float32)
    weights = jnp.full((4, 3), 1 / 3)
    loss, improved = attention_loss(rows, sources, weights)
    flat, basis = rows.reshape(4, 10, 12), sources.reshape(3, 10, 12)
    mixed = jnp.einsum("ar,rns->ans", weights, basis)
    assert float(loss) == pytest.approx(float(attention_kl(flat, mixed).mean()), rel=1e-4)
    np.testing.assert_allclose(improved, fit_mixture(flat, basis, 1), rtol=1e-4)


def test_simulated_acceptance_is_that_of_the_real_loop(target, data):
    draft = assemble(initial_weights(target, 2), target)
    limit, prompt = 61, data.held_out[0, :16].tolist()
    state = run(Speculative(window=5), target, draft, [prompt], limit)
    text = jnp.asarray([prompt + outputs(state)[0]], jnp.int32)
    best = likeliest_next(draft, text)
    # The first new token is the target's own; windows begin after it.
    agrees = np.asarray(best[:, :-1] == text[:, 1:])[:, len(prompt) :]
    counts = state.statistics
    simulated = accepted_per_window(agrees)
    windows = int(counts.windows[0])
    assert simulated == pytest.approx(float(counts.accepted[0]) / windows, abs=5 / windows)


# Each policy compiles a program of its own.
@pytest.mark.slow
@pytest.mark.parametrize("policy", ["default", "paper"])
def test_teacher_forced_windows_score_like_one_dense_pass(target, policy):
    draft = assemble(initial_weights(target, 2), target)
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 8, (3, 80)), jnp.int32)
    logits = target.logits(read_sequence(target, tokens, causal_attention))
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    expected = float(nll[:, 8 : 8 + 69].mean())
    for selection in (None, selection_for(target, draft, policy, 1.0)):
        got = read_documents(target, draft, selection, np.asarray(tokens).tolist(), window=3)
        assert got.nll.mean() == pytest.approx(expected, abs=1e-4)
        assert got.kv_reduction == pytest.approx(0.0, abs=1e-6)
        assert got.tokens == 69
    sparse = read_documents(
        target, draft, selection_for(target, draft, policy, 0.5), np.asarray(tokens).tolist(), window=3
    )
    assert 0.1 < sparse.kv_reduction < 0.9


def test_a_diverging_run_stops_with_the_last_good_checkpoint(target, data, whole, tmp_path):
    run = shutil.copytree(whole[0], tmp_path / "run")
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, target.params)
    shutil.rmtree(run / "checkpoints" / "50")
    with pytest.raises(UserError, match=r"loss became nan at step 45; the last good checkpoint is of step 40"):
        train(dataclasses.replace(target, params=broken), data, SETTINGS, run, report_every=5, checkpoint_every=20)


def test_checkpoints_of_another_configuration_are_refused(target, data, whole, tmp_path):
    run, settings = shutil.copytree(whole[0], tmp_path / "run"), dataclasses.replace(SETTINGS, clip=0.5)
    with pytest.raises(UserError, match="another configuration \\(clip differ\\)"):
        train(target, data, settings, run)
    # A run that failed before its first checkpoint binds nobody.
    shutil.rmtree(run / "checkpoints")
    train(target, data, dataclasses.replace(settings, steps=5), run)


def test_bad_input_is_refused(target):
    with pytest.raises(UserError, match="the longest has 60 tokens"):
        make_data(target, [[1, 2, 3] * 20], SETTINGS)
    with pytest.raises(UserError, match="num_layers is 9; expected at most the target's 4"):
        init_state(target, dataclasses.replace(SETTINGS, num_layers=9))
    with pytest.raises(UserError, match="length is 65"):
        dataclasses.replace(SETTINGS, length=65)
