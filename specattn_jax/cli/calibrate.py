"""`specattn calibrate`: fits how a draft's attention predicts a target's."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specattn_jax.cli import options
from specattn_jax.cli.process import importing
from specattn_jax.cli.terminal import StageBar, check_out, print_json, print_table, stage_bar
from specattn_jax.errors import UserError
from specattn_jax.texts import find_text, read_text, shipped_books

if TYPE_CHECKING:
    from specattn_jax.loading.tokenizer import Tokenizer

HEATMAP = "heatmap.png"
GRANULARITIES = ("head", "kv_head", "layer")


def calibrate_command(
    out: options.Out,
    target: options.Target = "smollm2",
    draft: options.Draft = "default",
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="UTF-8 text (.xz, .gz, .bz2 too) or the name of a shipped book; several may follow.",
            metavar="F...",
            show_default="the shipped books for training",
        ),
    ] = None,
    more_texts: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    context: Annotated[int, typer.Option(help="Tokens per passage.")] = 2048,
    passages: Annotated[int, typer.Option(help="Passages: half of them fit the mixture, half the budgets.")] = 4,
    granularity: Annotated[
        str, typer.Option(help=f"Sources of the mixture: {', '.join(GRANULARITIES)}.", metavar="SOURCE")
    ] = "kv_head",
    window: options.Window = 5,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
) -> None:
    """Fit how the draft's attention predicts the target's; writes alignment.json, alignment.npz and heatmap.png."""
    check_out(out)
    if more_texts and not text:
        raise UserError(f"{more_texts[0]!r} stands alone; put --text before the texts.")
    paths = [find_text(name) for name in [*(text or []), *(more_texts or [])]] or shipped_books("train")
    if granularity not in GRANULARITIES:
        raise UserError(f"--granularity is {granularity!r}; expected one of {', '.join(GRANULARITIES)}.")
    if window < 1:
        raise UserError(f"--window is {window}; expected at least 1 drafted token per window.")

    with importing():
        from specattn_jax.alignment import save_alignment
        from specattn_jax.calibration import CalibrationSettings, calibrate
        from specattn_jax.loading.files import atomic_folder
        from specattn_jax.pair import load_pair
        from specattn_jax.plots import alignment_heatmap
        from specattn_jax.selection import load_policy

    settings = CalibrationSettings(
        context=context,
        window=window,
        passages=passages,
        granularity=granularity,  # type: ignore[arg-type]
        seed=seed,
    )
    began = time.perf_counter()
    with stage_bar() as bar:
        bar.wait("starting")
        pair = load_pair(target, draft, alignment=None, dtype=dtype, progress=bar.bytes)
        documents = _read_documents(paths, pair.tokenizer, bar)
        names = {"target": target, "draft": draft, "texts": [path.name for path in paths]}
        alignment, similarity = calibrate(
            pair.target,
            pair.draft,
            documents,
            load_policy("default"),
            settings=settings,
            provenance=dict(names),
            progress=bar.steps,
        )
    picture = alignment_heatmap(similarity, alignment, target=target, draft=draft)
    with atomic_folder(out) as work:
        save_alignment(alignment, work)
        (work / HEATMAP).write_bytes(picture)
    report = {
        "out": str(out),
        **names,
        **_fit(json.loads(alignment.provenance)),
        "layer_map": list(alignment.layer_map),
        "granularity": alignment.granularity,
        "seconds": time.perf_counter() - began,
    }
    if as_json:
        print_json(report)
    else:
        print_table(_rows(report))


def _read_documents(paths: list[Path], tokenizer: Tokenizer, bar: StageBar) -> list[list[int]]:
    """Token ids of each text."""
    documents = []
    for index, path in enumerate(paths):
        bar.steps("reading texts", index, len(paths))
        documents.append(tokenizer.encode(read_text(path), add_special=False))
    return documents


def _fit(provenance: dict[str, Any]) -> dict[str, float]:
    """How well both predictions fit."""
    return {name: provenance[name] for name in ("mixture_kl", "layer_map_kl")}


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("written", f"{report['out']}: alignment.json, alignment.npz, {HEATMAP}"),
        ("misfit of the mixture", f"{report['mixture_kl']:.3f} nats (KL from the target's attention)"),
        ("misfit of the layer map", f"{report['layer_map_kl']:.3f} nats"),
        ("time", f"{report['seconds']:.0f} s"),
        ("use it", f"specattn generate --alignment {report['out']} ..."),
    ]
