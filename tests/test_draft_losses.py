"""What it costs that a draft leaves out a part of its own cache is measured at calibration, and kept."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_alignment, selection_for, tiny_config, tiny_model

from specattn_jax.calibration.calibrate import calibrate
from specattn_jax.calibration.draft_reads import SAVING, SHARES, measured_shares
from specattn_jax.calibration.passages import CalibrationSettings
from specattn_jax.errors import UserError
from specattn_jax.evaluation.forced import read_documents
from specattn_jax.selection.alignment import load_alignment, save_alignment
from specattn_jax.selection.policy import load_policy

DEFAULT = load_policy("default")
SETTINGS = CalibrationSettings(context=500, window=3, passages=2, windows=4, iterations=20, draft_windows=5)


class TestMeasuring:
    def test_shares_that_a_draft_can_read(self):
        assert measured_shares(100) == measured_shares(256) == (1.0,)
        assert measured_shares(512) == (1.0, 0.5)
        assert measured_shares(2048) == (1.0, 0.25, 0.125)
        assert measured_shares(100_000) == SHARES

    @pytest.mark.slow
    def test_calibration_reads_with_each(self):
        target, draft = tiny_model(0, scale=4.0, num_layers=3), tiny_model(1, scale=4.0)
        documents = [np.random.default_rng(0).integers(0, 8, 900).tolist()]
        alignment, _ = calibrate(target, draft, documents, DEFAULT, settings=SETTINGS)
        first = SETTINGS.context - SETTINGS.draft_windows * SETTINGS.window - 1
        np.testing.assert_allclose(alignment.draft_shares, measured_shares(first), rtol=1e-6)
        assert (np.asarray(alignment.draft_kl) > 0).all()
        again, _ = calibrate(target, draft, documents, DEFAULT, settings=SETTINGS)
        jax.tree.map(np.testing.assert_array_equal, alignment, again)
        unmeasured, _ = calibrate(
            target, draft, documents, DEFAULT, settings=dataclasses.replace(SETTINGS, draft_windows=0)
        )
        assert unmeasured.draft_losses == {}
        np.testing.assert_array_equal(unmeasured.left_out, alignment.left_out)

    def test_it_is_the_kl_of_forced_reading(self):
        """As evaluation finds it for the held-out passage."""
        target, draft = tiny_model(0, scale=4.0, num_layers=3), tiny_model(1, scale=4.0)
        document = np.random.default_rng(0).integers(0, 8, SETTINGS.context).tolist()
        alignment, _ = calibrate(target, draft, [document], DEFAULT, settings=SETTINGS)
        prompt = SETTINGS.context - SETTINGS.draft_windows * SETTINGS.window - 1
        how = {"prefill_share": prompt / SETTINGS.context, "window": SETTINGS.window}
        full = read_documents(target, draft, None, [document], **how)
        assert full.tokens == SETTINGS.draft_windows * SETTINGS.window
        for share, found in zip(measured_shares(prompt), np.asarray(alignment.draft_kl), strict=True):
            policy = DEFAULT.with_draft_reads(share)
            selection = dataclasses.replace(
                selection_for(target, draft, "default", 0.5, alignment=alignment),
                mass=alignment.mass_for_saving(SAVING),
                policy=policy,
            )
            reading = read_documents(target, draft, selection, [document], reference=full.hidden, **how)
            np.testing.assert_allclose(found, reading.kl[0], rtol=1e-3)

    @pytest.mark.parametrize("changes", [{"granularity": "layer"}, {"context": 96}])
    def test_nothing_is_measured_where_the_draft_reads_everything(self, changes):
        target, draft = tiny_model(0, scale=4.0, num_layers=3), tiny_model(1, scale=4.0)
        documents = [np.random.default_rng(0).integers(0, 8, 900).tolist()]
        settings = dataclasses.replace(SETTINGS, **changes)
        assert calibrate(target, draft, documents, DEFAULT, settings=settings)[0].draft_shares is None

    def test_fewer_windows_than_none_are_refused(self):
        with pytest.raises(UserError, match="draft_windows is -1; expected at least 0"):
            CalibrationSettings(draft_windows=-1)


class TestArtifact:
    ALIGNMENT = random_alignment(tiny_config(), tiny_config())

    def test_what_was_measured_is_kept(self, tmp_path):
        kept = dataclasses.replace(self.ALIGNMENT, draft_shares=jnp.array([1.0, 0.1]), draft_kl=jnp.array([0.01, 0.02]))
        save_alignment(kept, tmp_path)
        found = load_alignment(tmp_path)
        jax.tree.map(np.testing.assert_array_equal, found, kept)
        assert found.draft_losses == pytest.approx({1.0: 0.01, 0.1: 0.02})

    def test_artifacts_of_before_have_nothing(self, tmp_path):
        save_alignment(self.ALIGNMENT, tmp_path)
        assert {"draft_shares", "draft_kl"}.isdisjoint(np.load(tmp_path / "alignment.npz"))
        found = load_alignment(tmp_path)
        assert found.draft_shares is found.draft_kl is None
        assert found.draft_losses == {}

    @pytest.mark.parametrize(
        ("shares", "kl", "says"),
        [
            ([1.0, 0.1], [0.1], "not of one length"),
            ([], [], "not of one length"),
            ([0.5, 0.1], [0.1, 0.2], "does not fall from 1"),
            ([1.0, 1.0], [0.1, 0.2], "does not fall from 1"),
            ([1.0, 0.0], [0.1, 0.2], "does not fall from 1"),
            ([1.0, 0.1], [0.1, -0.2], "negative"),
            ([1.0, 0.1], [0.1, np.nan], "draft_kl holds NaN"),
        ],
    )
    def test_what_cannot_have_been_measured_is_refused(self, tmp_path, shares, kl, says):
        broken = dataclasses.replace(self.ALIGNMENT, draft_shares=jnp.array(shares), draft_kl=jnp.array(kl))
        save_alignment(broken, tmp_path)
        with pytest.raises(UserError, match=says):
            load_alignment(tmp_path)
