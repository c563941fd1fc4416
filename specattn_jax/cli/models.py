"""`specattn fetch`, `convert` and `info`: models as files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from specattn_jax.cli import options
from specattn_jax.cli.process import importing
from specattn_jax.cli.terminal import check_out, print_json, print_table, size, stage_bar
from specattn_jax.errors import UserError

if TYPE_CHECKING:
    from specattn_jax.loading import ModelFiles

FORMATS = ("orbax", "hf")


def fetch_command(
    preset: Annotated[str, typer.Argument(help="A model pair, such as smollm2.", metavar="PRESET", show_default=False)],
    as_json: options.Json = False,
) -> None:
    """Download a preset's models, so that later commands need no network."""
    with importing():
        from specattn_jax.loading import fetch_preset, get_preset

    description = get_preset(preset).description
    with stage_bar(keep=True) as bar:
        places = {role: str(path) for role, path in fetch_preset(preset, bar.bytes).items()}
    if as_json:
        print_json({"preset": preset, "description": description, **places})
    else:
        print_table([("preset", f"{preset}: {description}"), *places.items()])


def convert_command(
    reference: options.Reference,
    out: options.Out,
    to: Annotated[str, typer.Option(help="orbax (our own layout, fastest to load) or hf.", metavar="FORMAT")] = "orbax",
    dtype: Annotated[str, typer.Option(help="dtype of the weights written: float32 or bfloat16.")] = "float32",
    as_json: options.Json = False,
) -> None:
    """Write a model, with its tokenizer, as a folder that every command takes."""
    check_out(out)
    if to not in FORMATS:
        raise UserError(f"--to is {to!r}; expected one of {', '.join(FORMATS)}.")

    with importing():
        from specattn_jax.loading import load_model, save_checkpoint, save_hf
        from specattn_jax.loading.pair import choose_dtype

    kind = choose_dtype(dtype)
    with stage_bar() as bar:
        bar.wait("starting")
        model, tokenizer = load_model(reference, dtype=kind, progress=bar.bytes)
        bar.wait("writing")
        (save_checkpoint if to == "orbax" else save_hf)(model, tokenizer, out)
    written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if as_json:
        print_json({"model": reference, "out": str(out), "format": to, "dtype": model.dtype.name, "bytes": written})
    else:
        print_table([("written", f"{out} ({to}, {model.dtype.name}, {size(written)})")])


def info_command(
    reference: options.Reference,
    context: Annotated[
        int | None, typer.Option(help="Tokens in the cache.", show_default="the model's own limit")
    ] = None,
    dtype: options.Dtype = "auto",
    mesh: options.MeshBesideOne = None,
    as_json: options.Json = False,
) -> None:
    """Describe a model: shape, memory, tokenizer, devices, kernels, alignment. Weights are not read."""
    with importing():
        from specattn_jax.loading import resolve
        from specattn_jax.loading.pair import choose_dtype
        from specattn_jax.models.sharding import describe_mesh
        from specattn_jax.notebook.devices import describe_devices, describe_kernels

    kind = choose_dtype(dtype)
    with stage_bar() as bar:
        files = resolve(reference, bar.bytes)
    limit = files.config.max_context
    context = limit if context is None else context
    if not 1 <= context <= limit:
        raise UserError(f"--context is {context}; expected 1 to {limit}, the context of {reference}.")
    report = {
        "model": reference,
        "format": files.kind,
        "path": str(files.path),
        "config": files.config.to_json(),
        "parameters": files.config.parameter_count(),
        "dtype": kind.name,
        "weight_bytes": files.weight_bytes(kind),
        "context": context,
        "cache_bytes": files.config.cache_bytes(1, context, kind.itemsize),
        "tokenizer": _describe_tokenizer(files),
        "devices": describe_devices(),
        "kernels": describe_kernels(files.config, context, kind.name),
        **_describe_pair(reference),
    }
    if mesh is not None:
        report["mesh"] = describe_mesh(mesh, files.config, context, kind, reference)
    if as_json:
        print_json(report)
    else:
        print_table(_rows(report))


def _describe_tokenizer(files: ModelFiles) -> dict[str, Any]:
    tokenizer = files.tokenizer()
    return {
        "tokens": tokenizer.vocab_size,
        "end_ids": list(tokenizer.eos_ids),
        "chat_template": tokenizer.chat_template is not None,
        "fingerprint": tokenizer.fingerprint()[:12],
    }


def _describe_pair(reference: str) -> dict[str, str | None]:
    """What a preset adds to its target."""
    from specattn_jax.loading import get_preset, preset_names
    from specattn_jax.loading.pair import shipped_alignment

    if reference not in preset_names():
        return {"preset": None, "alignment": None}
    folder = shipped_alignment(reference, shared=False)
    return {"preset": get_preset(reference).description, "alignment": None if folder is None else str(folder)}


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    config, tokenizer = report["config"], report["tokenizer"]
    extras = [
        name
        for name, present in {
            "tied embeddings": config["tie_embeddings"],
            "qkv bias": config["qkv_bias"],
            "output bias": config["out_bias"],
            "q/k norm": config["qk_norm"],
            f"{(config['rope_scaling'] or {}).get('kind')} rope scaling": config["rope_scaling"],
        }.items()
        if present
    ]
    rows = [
        ("model", report["model"] + (f" ({report['preset']})" if report["preset"] else "")),
        ("files", f"{report['path']} ({report['format']})"),
        ("architecture", ", ".join([config["family"], f"{config['num_layers']} layers", *extras])),
        ("width", f"{config['embed_dim']}, MLP {config['mlp_dim']}"),
        ("heads", f"{config['num_heads']} query, {config['num_kv_heads']} kv, {config['head_dim']} wide"),
        ("longest context", f"{config['max_context']:,} tokens"),
        ("parameters", f"{report['parameters'] / 1e6:,.1f} million"),
        ("weights in memory", f"{size(report['weight_bytes'])} as {report['dtype']}"),
        ("cache in memory", f"{size(report['cache_bytes'])} for {report['context']:,} tokens"),
        (
            "tokenizer",
            f"{tokenizer['tokens']:,} tokens, {'with' if tokenizer['chat_template'] else 'no'} chat template, "
            f"fingerprint {tokenizer['fingerprint']}",
        ),
    ]
    if "mesh" in report:
        mesh = report["mesh"]
        held = f"{size(mesh['weight_bytes'])} of weights, {size(mesh['cache_bytes'])} of cache for {mesh['sequences']}"
        rows.append(("each of a mesh", f"{held} x {report['context']:,} tokens on {mesh['devices']} devices"))
    rows += [("device", f"{d['kind']}, {size(d['available_bytes'])} available") for d in report["devices"]]
    reasons: dict[tuple[str, str], list[str]] = {}
    for op, choice in report["kernels"].items():
        reasons.setdefault((choice["name"], choice["reason"]), []).append(op)
    rows += [("kernels", f"{name} for {', '.join(ops)}: {reason}") for (name, reason), ops in reasons.items()]
    if report["preset"]:
        rows.append(("alignment", report["alignment"] or "none shipped; make one with `specattn calibrate`"))
    return rows
