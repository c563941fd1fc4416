"""`specattn calibrate`: fits how a draft's attention predicts a target's."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer

from specattn_jax.cli import options
from specattn_jax.cli.process import importing
from specattn_jax.cli.terminal import check_out, print_json, print_table, stage_bar
from specattn_jax.errors import UserError
from specattn_jax.texts import name_texts

GRANULARITIES = ("head", "kv_head", "layer")


def calibrate_command(
    out: options.Out,
    target: options.Target = "smollm2",
    draft: options.Draft = "default",
    text: options.Texts = None,
    more_texts: options.MoreTexts = None,
    context: Annotated[
        str,
        typer.Option(
            help="Tokens per passage. Several lengths are calibrated each; caches between two get what lies between.",
            metavar="N,...",
        ),
    ] = "2048",
    passages: Annotated[
        str | None,
        typer.Option(
            help="Passages, of all kinds of text in turn: half of them fit the mixture, half the budgets. One number "
            "for all lengths, or one for each, the shortest first.",
            metavar="N,...",
            show_default="4, at least 2 of each kind",
        ),
    ] = None,
    granularity: Annotated[
        str, typer.Option(help=f"Sources of the mixture: {', '.join(GRANULARITIES)}.", metavar="SOURCE")
    ] = "kv_head",
    quotes: Annotated[
        str,
        typer.Option(
            help="Share of each passage, at its end, that repeats pieces of what stands before it. One number for all "
            "lengths, or one for each, the shortest first.",
            metavar="R,...",
        ),
    ] = "0",
    window: options.Window = 5,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    mesh: options.Mesh = None,
    as_json: options.Json = False,
) -> None:
    """Fit how the draft's attention predicts the target's; writes alignment.json, alignment.npz and heatmap.png."""
    check_out(out)
    contexts = options.split_lengths(context, "--context")
    paths = options.find_texts(text, more_texts)
    if granularity not in GRANULARITIES:
        raise UserError(f"--granularity is {granularity!r}; expected one of {', '.join(GRANULARITIES)}.")
    if window < 1:
        raise UserError(f"--window is {window}; expected at least 1 drafted token per window.")

    with importing():
        from specattn_jax.calibration.passages import CalibrationSettings, usual_passages
        from specattn_jax.loading.pair import load_pair
        from specattn_jax.planning.mesh_choice import Wanted, default_mesh

    given = str(usual_passages(len(paths))) if passages is None else passages
    asked = options.split_for_each(given, len(contexts), "--passages")
    counts = options.whole(asked, "--passages", "of passages, such as 20")
    shares = options.split_for_each(quotes, len(contexts), "--quotes")
    settings = [
        CalibrationSettings(
            context=length,
            window=window,
            passages=count,
            granularity=granularity,  # type: ignore[arg-type]
            seed=seed,
            quotes=share,
        )
        for length, count, share in zip(contexts, counts, shares, strict=True)
    ]
    began = time.perf_counter()
    with stage_bar() as bar:
        bar.wait("starting")
        mesh = mesh or default_mesh(target, draft, dtype, Wanted(1, contexts[-1], 0))
        pair = load_pair(target, draft, alignment=None, dtype=dtype, mesh=mesh, progress=bar.bytes)
        documents = bar.read_documents(paths, pair.tokenizer)
        texts = name_texts(paths)
        alignment = pair.calibrate(
            documents, out=out, settings=settings, provenance={"texts": texts}, progress=bar.steps
        ).alignment
    assert alignment is not None
    report = {
        "out": str(out),
        "target": target,
        "draft": draft,
        "texts": texts,
        **_fit(json.loads(alignment.provenance)),
        "layer_map": list(alignment.layer_map),
        "granularity": alignment.granularity,
        "draft_kl": alignment.draft_losses,
        "seconds": time.perf_counter() - began,
    }
    if as_json:
        print_json(report)
    else:
        print_table(_rows(report))


def _fit(provenance: dict[str, Any]) -> dict[str, float]:
    """How well both predictions fit."""
    return {name: provenance[name] for name in ("mixture_kl", "layer_map_kl")}


def sparse_draft(losses: dict[float, float]) -> str:
    """What it costs that the draft reads sparsely, for people."""
    if not losses:
        return "not measured: it reads all of texts this short, or its sources are no kv heads"
    read = [f"{kl:.4f} where it reads {share:.1%}" for share, kl in losses.items()]
    return f"KL {', '.join(read)} of its cache"


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("written", f"{report['out']}: alignment.json, alignment.npz, heatmap.png"),
        ("misfit of the mixture", f"{report['mixture_kl']:.3f} nats (KL from the target's attention)"),
        ("misfit of the layer map", f"{report['layer_map_kl']:.3f} nats"),
        ("cost of a sparse draft", sparse_draft(report["draft_kl"])),
        ("time", f"{report['seconds']:.0f} s"),
        (
            "use it",
            f"specattn generate --target {report['target']} --draft {report['draft']} --alignment {report['out']} ...",
        ),
    ]
