"""`specattn estimate`: what reading less can bring for a pair of models, before anything is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from specattn_jax.cli import options
from specattn_jax.cli.process import importing
from specattn_jax.cli.terminal import print_json, print_table, size, stage_bar
from specattn_jax.errors import UserError

if TYPE_CHECKING:
    from specattn_jax.models.config import ModelConfig

_SHAPE = "a shape from configs/shapes.toml, such as llama-3.1-8b, or any model reference"


def estimate_command(
    target: Annotated[str, typer.Option(help=f"The target: {_SHAPE}.", metavar="REF", show_default=False)],
    draft: Annotated[str, typer.Option(help=f"The draft: {_SHAPE}.", metavar="REF", show_default=False)],
    context: Annotated[
        str, typer.Option(help="Entries in the cache of each sequence.", metavar="N,...")
    ] = "2048,8192,32768,131072",
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    kv_reduction: Annotated[float, typer.Option(help="Share of the target's cache reads that is saved.")] = 0.75,
    accepted: Annotated[float, typer.Option(help="Drafted tokens accepted per window.")] = 3.5,
    draft_reads: Annotated[
        float | None,
        typer.Option(help="Share of its own cache that the draft reads.", show_default="that of the default policy"),
    ] = None,
    window: options.Window = 5,
    mesh: options.MeshBesideOne = None,
    as_json: options.Json = False,
) -> None:
    """Estimate, from the bytes that decoding in bfloat16 has to read and write, how the three modes compare.

    Ratios of tokens per second that memory allows: upper bounds, as whatever else takes time is left out.
    """
    with importing():
        from specattn_jax.decoding.work import Scenario
        from specattn_jax.planning.cost import estimate
        from specattn_jax.planning.mesh import predict_mesh
        from specattn_jax.selection.policy import load_policy

    contexts = [_whole_number(part) for part in context.split(",") if part.strip()]
    if not contexts:
        raise UserError(f"--context is {context!r}; expected whole numbers separated by commas.")
    scenario = Scenario(
        _shape(target),
        _shape(draft),
        batch,
        contexts[0],
        window,
        accepted,
        kv_reduction=kv_reduction,
        draft_reads=load_policy("default").draft_reads if draft_reads is None else draft_reads,
    )
    rows: list[dict[str, Any]] = [estimate(scenario._replace(context=entries)) for entries in contexts]
    if mesh is not None:
        for row, entries in zip(rows, contexts, strict=True):
            row["mesh"] = predict_mesh(scenario._replace(context=entries), mesh)
    if as_json:
        print_json({"target": target, "draft": draft, **_plain(scenario), "rows": rows})
        return
    for row in rows:
        print_table(
            [
                ("context", f"{row['context']:,} tokens, {batch} at a time"),
                ("target reads", f"{size(row['target_weights'])} of weights, {size(row['target_cache'])} of cache"),
                ("speculative", f"{row['speculative_over_autoregressive']:.2f} x autoregressive"),
                ("specattn", f"{row['specattn_over_autoregressive']:.2f} x autoregressive"),
                ("", f"{row['specattn_over_speculative']:.2f} x speculative"),
                *(_mesh_rows(row["mesh"]) if "mesh" in row else ()),
            ]
        )


def _mesh_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What is predicted of a mesh of H100s."""
    draft = "all of the draft" if found["whole_draft"] else "a part of the draft"
    held = f"{size(found['weight_bytes'])} of weights ({draft}), {size(found['cache_bytes'])} of cache"
    windows = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in found["window_seconds"].items())
    return [
        ("each device", held),
        ("predicted", f"a window on {found['devices']} H100: {windows}; nothing of it is measured"),
    ]


def _whole_number(part: str) -> int:
    try:
        return int(part)
    except ValueError as error:
        raise UserError(f"--context names {part.strip()!r}; expected whole numbers, such as 8192,32768.") from error


def _shape(reference: str) -> ModelConfig:
    """A known shape, or that of a model; its weights are not read."""
    from specattn_jax.loading import resolve
    from specattn_jax.planning.cost import load_shape, shape_names

    if reference in shape_names():
        return load_shape(reference)
    with stage_bar() as bar:
        return resolve(reference, bar.bytes).config


def _plain(scenario: Any) -> dict[str, Any]:
    return {name: value for name, value in scenario._asdict().items() if name not in ("target", "draft", "context")}
