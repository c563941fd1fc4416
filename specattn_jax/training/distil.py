"""A draft for any target, from texts to a draft folder: the run behind `specattn train-draft`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from specattn_jax.errors import UserError
from specattn_jax.files import atomic_file
from specattn_jax.loading.draft import Storage, save_draft
from specattn_jax.models.transformer import LanguageModel
from specattn_jax.reporting.plots import training_curves
from specattn_jax.texts import Documents
from specattn_jax.training.data import load_or_make_data
from specattn_jax.training.settings import TrainSettings
from specattn_jax.training.trainer import METRICS, Report, assemble, read_metrics, train

DRAFT, ALIGNMENT, CURVES, SAMPLES = "draft", "alignment", "curves.png", "own_texts.npz"


def distil(
    target: LanguageModel,
    documents: Documents,
    settings: TrainSettings,
    out: Path,
    *,
    reference: str,
    texts: Sequence[str],
    storage: Storage = "int8",
    samples: Path | None = None,
    sample_batch: int = 256,
    report_every: int = 20,
    checkpoint_every: int = 400,
    progress: Callable[[str, int, int], None] | None = None,
    on_report: Callable[[Report], None] | None = None,
) -> list[Report]:
    """Trains a draft, or goes on with an interrupted run, and writes it as a draft folder.

    Args:
        target: the teacher.
        documents: token ids of each text, or of each text of each kind; kinds are learnt in equal shares.
        settings: the run.
        out: for `draft/` (complete or absent), `metrics.jsonl`, `curves.png`, `checkpoints/` and what the target wrote.
        reference: of the target, as `resolve` takes it; the draft borrows its embedding and output matrix from there.
        texts: names of the texts, noted in the draft.
        storage: of the draft's weights.
        samples: file with the target's own texts, if several runs share them.
        sample_batch: texts that the target writes at once.
        report_every: steps between reports.
        checkpoint_every: steps between checkpoints, where held-out acceptance is measured too.
        progress: told the stage, parts done and parts in all, until training begins.
        on_report: receives the reports of this run.

    Returns:
        All reports of the run, those before an interruption included.

    Raises:
        UserError: the texts are too short, the loss is not finite, `out` belongs to another run or is finished, or
            something cannot be written.
    """
    check_room(out)
    if settings.length > target.config.max_context:
        raise UserError(
            f"length is {settings.length}; expected at most the target's context of {target.config.max_context} tokens."
        )
    data = load_or_make_data(
        samples or out / SAMPLES, target, documents, settings, batch=sample_batch, progress=progress
    )
    state = train(
        target,
        data,
        settings,
        out,
        report_every=report_every,
        checkpoint_every=checkpoint_every,
        on_report=on_report,
    )
    reports = read_metrics(out / METRICS)
    with atomic_file(out / CURVES) as work:
        work.write_bytes(_curves(reports))
    notes = {
        "settings": settings.to_json(),
        "texts": list(texts),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "metrics": reports[-1]._asdict(),
    }
    embedding = np.asarray(target.module().embedding[...])
    draft = assemble(state.weights, target)
    save_draft(draft, out / DRAFT, target=reference, embedding=embedding, storage=storage, notes=notes)
    return reports


def check_room(out: Path) -> None:
    """Refuses a folder that holds a finished draft, or is none, before anything slow begins.

    Raises:
        UserError: it does.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file; expected a new folder, or that of an interrupted run.")
    if (out / DRAFT).exists():
        raise UserError(f"out: {out} holds a finished draft already; choose another folder or remove it.")


def _curves(reports: Sequence[Report]) -> bytes:
    """The run as a picture."""
    return training_curves(
        [report.step for report in reports],
        {
            "next-token distribution": [report.losses["token"] for report in reports],
            "attention, predicted by the mixture": [report.losses["attention"] for report in reports],
        },
        {report.step: report.accepted for report in reports if report.accepted is not None},
    )
