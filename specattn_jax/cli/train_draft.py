"""`specattn train-draft`: distils a draft for a target."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specattn_jax.cli import options
from specattn_jax.cli.process import importing
from specattn_jax.cli.terminal import StageBar, on_terminal, print_json, print_table, say, stage_bar
from specattn_jax.errors import UserError
from specattn_jax.texts import name_texts
from specattn_jax.training.settings import TrainSettings

if TYPE_CHECKING:
    from specattn_jax.training.trainer import Report

STORAGES = ("int8", "bfloat16")
_DEFAULTS = TrainSettings()


def train_draft_command(
    out: Annotated[
        Path,
        typer.Option(help="Folder for the run; the same command again goes on where it stopped.", show_default=False),
    ],
    target: options.Target = "smollm2",
    text: options.Texts = None,
    more_texts: options.MoreTexts = None,
    num_layers: Annotated[
        int, typer.Option(help="Layers of the draft, copied from the target's.")
    ] = _DEFAULTS.num_layers,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = _DEFAULTS.steps,
    rows: Annotated[int, typer.Option(help="Sequences per step.")] = _DEFAULTS.rows,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = _DEFAULTS.length,
    accumulate: Annotated[
        int, typer.Option(help="Parts that a step is split into, to save memory.")
    ] = _DEFAULTS.accumulate,
    peak_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = _DEFAULTS.peak_rate,
    attention_weight: Annotated[
        float, typer.Option(help="Weight of the attention term; 0 trains on tokens alone.")
    ] = _DEFAULTS.attention_weight,
    own_share: Annotated[
        float, typer.Option(help="Share of the sequences that the target writes itself.")
    ] = _DEFAULTS.own_share,
    continuations: Annotated[int, typer.Option(help="Texts that the target writes.")] = _DEFAULTS.continuations,
    prompt: Annotated[int, typer.Option(help="Tokens of the texts before each of them.")] = _DEFAULTS.prompt,
    written: Annotated[int, typer.Option(help="Tokens that the target writes each time.")] = _DEFAULTS.written,
    batch: Annotated[int, typer.Option(help="Texts that the target writes at once.")] = 256,
    storage: Annotated[str, typer.Option(help="How the draft is stored: int8 or bfloat16.", metavar="KIND")] = "int8",
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 400,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
) -> None:
    """Train a shallow draft for a target, and calibrate the pair.

    Writes draft/, alignment/, metrics.jsonl and curves.png. The draft borrows the target's embedding and output matrix.
    """
    paths = options.find_texts(text, more_texts)
    if storage not in STORAGES:
        raise UserError(f"--storage is {storage!r}; expected one of {', '.join(STORAGES)}.")
    for name, value in {"--batch": batch, "--checkpoint-every": checkpoint_every}.items():
        if value < 1:
            raise UserError(f"{name} is {value}; expected at least 1.")
    settings = TrainSettings(
        num_layers=num_layers,
        steps=steps,
        rows=rows,
        length=length,
        accumulate=accumulate,
        peak_rate=peak_rate,
        warmup=max(1, min(_DEFAULTS.warmup, steps // 10)),
        attention_weight=attention_weight,
        own_share=own_share,
        continuations=continuations,
        prompt=prompt,
        written=written,
        seed=seed,
    )
    with importing():
        from specattn_jax.calibration.passages import CalibrationSettings, usual_passages
        from specattn_jax.loading import load_model, resolve
        from specattn_jax.loading.pair import choose_dtype, load_pair
        from specattn_jax.training.distil import ALIGNMENT, DRAFT, check_room, distil
        from specattn_jax.training.trainer import METRICS, read_metrics

    trained = (out / DRAFT).is_dir() and not (out / ALIGNMENT).exists()
    if not trained:
        check_room(out)
    began = time.perf_counter()
    with stage_bar() as bar:
        bar.wait("starting")
        files = resolve(target, bar.bytes)
        documents = bar.read_documents(paths, files.tokenizer())
        if not trained:
            model, _ = load_model(files, dtype=choose_dtype(dtype), progress=bar.bytes)
            distil(
                model,
                documents,
                settings,
                out,
                reference=target,
                texts=name_texts(paths),
                storage=storage,  # type: ignore[arg-type]
                sample_batch=batch,
                checkpoint_every=checkpoint_every,
                progress=bar.steps,
                on_report=lambda report: _show(bar, report, steps),
            )
            del model
        draft = out / DRAFT
        pair = load_pair(target, str(draft), alignment=None, dtype=dtype, progress=bar.bytes)
        pair.calibrate(
            documents,
            out=out / ALIGNMENT,
            settings=CalibrationSettings(context=min(2048, length), passages=usual_passages(len(paths)), seed=seed),
            provenance={"texts": name_texts(paths)},
            progress=bar.steps,
        )
    report = _summary(out, read_metrics(out / METRICS)[-1], time.perf_counter() - began)
    if as_json:
        print_json(report)
    else:
        print_table(_table(report, target))


def _show(bar: StageBar, report: Report, steps: int) -> None:
    """Moves the bar; where there is none, such as in a log file, writes a line for every checkpoint."""
    parts = [f"loss {report.losses['total']:.3f}", f"{report.tokens_per_s:,.0f} tokens/s"]
    if report.accepted is not None:
        parts.append(f"{report.accepted:.2f} of 5 accepted")
    bar.steps("training", report.step, steps, ", ".join(parts))
    if report.accepted is not None and not on_terminal():
        say(f"step {report.step} of {steps}: {', '.join(parts)}")


def _summary(out: Path, last: Report, seconds: float) -> dict[str, Any]:
    """What the run says, for programs."""
    assert last.accepted is not None
    return {
        "draft": str(out / "draft"),
        "alignment": str(out / "alignment"),
        "steps": last.step,
        "losses": last.losses,
        "held_out_accepted_per_window": last.accepted,
        "tokens_per_s": last.tokens_per_s,
        "seconds": seconds,
    }


def _table(report: dict[str, Any], target: str) -> list[tuple[str, str]]:
    """What the run says, for people."""
    return [
        ("draft", report["draft"]),
        ("alignment", report["alignment"]),
        ("misfit", f"{report['losses']['token']:.3f} nats (KL from the target's next-token distribution)"),
        ("accepted", f"{report['held_out_accepted_per_window']:.2f} of 5 drafted tokens, on held-out text"),
        ("time", f"{report['seconds']:.0f} s"),
        (
            "use it",
            f"specattn generate --target {target} --draft {report['draft']} --alignment {report['alignment']} ...",
        ),
    ]
