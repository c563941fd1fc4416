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

from specattn_jax.calibration.passages import CalibrationSettings, usual_passages
from specattn_jax.loading import load_model
from specattn_jax.loading.draft import read_draft, save_draft
from specattn_jax.loading.pair import load_pair
from specattn_jax.texts import UNNAMED, Documents, by_kind, find_kinds, name_texts, read_text, shipped_books
from specattn_jax.training.distil import DRAFT, SAMPLES, distil
from specattn_jax.training.settings import TrainSettings

INT8 = "int8"


def quantise(folder: Path) -> None:
    """Stores a finished draft as int8 too."""
    info = read_draft(folder / DRAFT)
    model, _ = load_model(str(folder / DRAFT), dtype=jnp.float32)
    embedding = np.asarray(model.module().embedding[...])
    save_draft(model, folder / INT8, target=info.target, embedding=embedding, storage="int8", notes=info.notes)


def align(draft: str, out: Path, documents: Documents, texts: list[str]) -> None:
    """Calibrates a draft, in float32, on twice as many passages as is usual."""
    pair = load_pair("smollm2", draft, alignment=None, dtype="float32")
    passages = 2 * usual_passages(len(by_kind(documents)))
    pair.calibrate(
        documents,
        out=out,
        settings=CalibrationSettings(passages=passages),
        provenance={"draft": "distilled", "texts": texts},
        progress=lambda *step: print(*step, flush=True),
    )


def main() -> None:
    """Trains a draft for each attention weight."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--attention-weights", type=float, nargs="+", default=[0.1, 0.0])
    parser.add_argument("--sample-batch", type=int, default=1024)
    parser.add_argument("--texts", nargs="+", default=[], help="as --text of the command; the shipped books without")
    parser.add_argument(
        "--only-align", action="store_true", help="calibrate the shipped draft on the texts, into --out"
    )
    for field in dataclasses.fields(TrainSettings):
        if field.name != "attention_weight":
            parser.add_argument("--" + field.name.replace("_", "-"), type=type(field.default), default=field.default)
    options = vars(parser.parse_args())
    names = ("out", "attention_weights", "sample_batch", "texts", "only_align")
    out, weights, batch, named, only_align = (options.pop(name) for name in names)

    target, tokenizer = load_model("smollm2", dtype=jnp.bfloat16)
    paths = find_kinds(named) or {UNNAMED: shipped_books("train")}
    texts = name_texts(paths)
    documents = {kind: [tokenizer.encode(read_text(path)) for path in files] for kind, files in paths.items()}
    if only_align:
        align("default", out, documents, texts)
        return
    for weight in weights:
        folder = out / f"attention_{weight:g}"
        if not (folder / DRAFT).exists():
            reports = distil(
                target,
                documents,
                TrainSettings(attention_weight=weight, **options),
                folder,
                reference="smollm2",
                texts=texts,
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
            align(str(folder / INT8), folder / "alignment", documents, texts)


if __name__ == "__main__":
    main()
