"""Distils the embedded draft on an accelerator, with and without the attention term, on the same texts and steps.

The same command again goes on where it stopped, so that it fits machines that limit the time of a command. Each draft
lies in a folder of its own, as bfloat16 (`draft`) and as int8 (`int8`, the form that is shipped), with the alignment of
the int8 form, metrics and curves; scripts/measure_draft.py measures any of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from specattn_jax.calibration.calibrate import CalibrationSettings
from specattn_jax.loading import load_model
from specattn_jax.loading.draft import read_draft, save_draft
from specattn_jax.loading.pair import load_pair
from specattn_jax.texts import read_text, shipped_books
from specattn_jax.training.distil import DRAFT, SAMPLES, distil
from specattn_jax.training.settings import TrainSettings

INT8 = "int8"


def quantise(folder: Path) -> None:
    """Stores a finished draft as int8 too."""
    info = read_draft(folder / DRAFT)
    model, _ = load_model(str(folder / DRAFT), dtype=jnp.float32)
    embedding = np.asarray(model.module().embedding[...])
    save_draft(model, folder / INT8, target=info.target, embedding=embedding, storage="int8", notes=info.notes)


def align(folder: Path, documents: list[list[int]], texts: list[str]) -> None:
    """Calibrates the int8 draft, in float32."""
    pair = load_pair("smollm2", str(folder / INT8), alignment=None, dtype="float32")
    pair.calibrate(
        documents,
        out=folder / "alignment",
        settings=CalibrationSettings(passages=8, gradients=4, windows=32, budgets="kv_head"),
        provenance={"draft": "distilled", "texts": texts},
        progress=lambda *step: print(*step, flush=True),
    )


def main() -> None:
    """Trains a draft for each attention weight."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--attention-weights", type=float, nargs="+", default=[0.1, 0.0])
    parser.add_argument("--sample-batch", type=int, default=1024)
    for field in dataclasses.fields(TrainSettings):
        if field.name != "attention_weight":
            parser.add_argument("--" + field.name.replace("_", "-"), type=type(field.default), default=field.default)
    options = vars(parser.parse_args())
    out, weights, batch = (options.pop(name) for name in ("out", "attention_weights", "sample_batch"))

    target, tokenizer = load_model("smollm2", dtype=jnp.bfloat16)
    books = shipped_books("train")
    documents = [tokenizer.encode(read_text(book)) for book in books]
    for weight in weights:
        folder = out / f"attention_{weight:g}"
        if not (folder / DRAFT).exists():
            reports = distil(
                target,
                documents,
                TrainSettings(attention_weight=weight, **options),
                folder,
                reference="smollm2",
                texts=[book.name for book in books],
                storage="bfloat16",
                samples=out / SAMPLES,
                sample_batch=batch,
                progress=lambda *step: print(*step, flush=True),
                on_report=lambda report: print(report, flush=True),
            )
            print(json.dumps(reports[-1]._asdict()), flush=True)
        if not (folder / INT8).exists():
            quantise(folder)
        if not (folder / "alignment").exists():
            align(folder, documents, [book.name for book in books])


if __name__ == "__main__":
    main()
