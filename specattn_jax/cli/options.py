"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_REFERENCE = "a preset, a Hugging Face folder, a .gguf file, a folder written by `specattn convert`, or a hub id"

Target = Annotated[str, typer.Option(help=f"The model whose output is wanted: {_REFERENCE}.", metavar="REF")]
Draft = Annotated[
    str,
    typer.Option(help="The model that proposes tokens: as for --target; 'default' is the preset's, 'self' the target."),
]
Reference = Annotated[str, typer.Argument(help=f"The model: {_REFERENCE}.", metavar="REF", show_default=False)]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16, or auto: bfloat16 on an accelerator, float32 on a CPU.", metavar="DTYPE")
]
Window = Annotated[int, typer.Option(help="Drafted tokens per window.")]
Seed = Annotated[int, typer.Option(help="Of everything random.", min=0, max=2**32 - 1)]
Out = Annotated[Path, typer.Option(help="Folder to write; it appears complete or not at all.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; all else goes to stderr.")]
