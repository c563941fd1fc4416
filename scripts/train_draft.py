"""Distils the embedded draft on an accelerator: data, training, the draft folder, its alignment. One command."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from specattn_jax.alignment import save_alignment
from specattn_jax.calibration import CalibrationSettings, calibrate
from specattn_jax.loading import load_model
from specattn_jax.loading.draft import save_draft
from specattn_jax.model import LanguageModel
from specattn_jax.selection import load_policy
from specattn_jax.texts import read_text, shipped_books
from specattn_jax.training.data import TrainingData, make_data
from specattn_jax.training.settings import TrainSettings
from specattn_jax.training.trainer import assemble, init_state, train, train_step


def load_data(
    target: LanguageModel, documents: list[list[int]], settings: TrainSettings, file: Path, batch: int
) -> TrainingData:
    """What the target wrote, made once for all runs that share `file`."""
    from specattn_jax.training.data import split_documents

    if file.exists():
        with np.load(file) as arrays:
            return TrainingData(split_documents(documents, settings.length)[0], arrays["own"], arrays["held_out"])
    data = make_data(target, documents, settings, batch=batch)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, own=data.own, held_out=data.held_out)
    return data


def steps_for(target: LanguageModel, data: TrainingData, settings: TrainSettings, minutes: float) -> int:
    """How many steps fit into the time, measured on a state that is thrown away."""
    state = init_state(target, settings)
    for count in (3, 20):
        start = time.perf_counter()
        for step in range(count):
            state, losses = train_step(target, state, jnp.asarray(data.batch(step, settings)), settings=settings)
        jax.block_until_ready(losses)
        seconds = (time.perf_counter() - start) / count
    print(f"{seconds:.3f} s per step", flush=True)
    return int(minutes * 60 / seconds)


def main() -> None:
    """Trains one draft."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=Path, required=True, help="file for the target's own texts, shared by runs")
    parser.add_argument("--minutes", type=float, help="train for about so long (decides --steps)")
    parser.add_argument("--sample-batch", type=int, default=512)
    parser.add_argument("--only-sample", action="store_true")
    for field in dataclasses.fields(TrainSettings):
        name, kind = "--" + field.name.replace("_", "-"), type(field.default)
        parser.add_argument(name, type=kind, default=field.default)
    options = parser.parse_args()
    names = {field.name for field in dataclasses.fields(TrainSettings)}
    settings = TrainSettings(**{name: value for name, value in vars(options).items() if name in names})

    started = time.perf_counter()
    target, tokenizer = load_model("smollm2", dtype=jnp.bfloat16)
    documents = [tokenizer.encode(read_text(book)) for book in shipped_books("train")]
    data = load_data(target, documents, settings, options.samples, options.sample_batch)
    print(f"data ready after {time.perf_counter() - started:.0f} s: {data.own.shape}", flush=True)
    if options.minutes:
        steps = steps_for(target, data, settings, options.minutes)
        settings = dataclasses.replace(settings, steps=steps)
    if options.only_sample:
        return

    options.out.mkdir(parents=True, exist_ok=True)
    state = train(target, data, settings, options.out, checkpoint_every=400, on_report=lambda r: print(r, flush=True))
    trained = time.perf_counter() - started
    exact, _ = load_model("smollm2", dtype=jnp.float32)
    draft = assemble(state.weights, exact)
    notes = {
        "settings": settings.to_json(),
        "texts": [book.name for book in shipped_books("train")],
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "seconds": round(trained),
        "metrics": [json.loads(line) for line in (options.out / "metrics.jsonl").read_text().splitlines()][-1],
    }
    embedding = np.asarray(exact.module().embedding[...])
    for storage in ("int8", "bfloat16"):
        save_draft(draft, options.out / storage, target="smollm2", embedding=embedding, storage=storage, notes=notes)
    draft, _ = load_model(str(options.out / "int8"), dtype=jnp.float32)
    alignment, _ = calibrate(
        exact,
        draft,
        documents,
        load_policy("default"),
        settings=CalibrationSettings(passages=8, gradients=4, windows=32),
        provenance={"target": "smollm2", "draft": "distilled", "texts": notes["texts"]},
        progress=lambda *step: print(*step, flush=True),
    )
    (options.out / "alignment").mkdir(exist_ok=True)
    save_alignment(alignment, options.out / "alignment")
    print(alignment.provenance)


if __name__ == "__main__":
    main()
