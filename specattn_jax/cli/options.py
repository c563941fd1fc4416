"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from specattn_jax.errors import UserError
from specattn_jax.texts import UNNAMED, find_kinds, shipped_books

_REFERENCE = "a preset, a Hugging Face folder, a .gguf file, a folder written by `specattn convert`, or a hub id"

Target = Annotated[str, typer.Option(help=f"The model whose output is wanted: {_REFERENCE}.", metavar="REF")]
Draft = Annotated[
    str,
    typer.Option(
        help="The model that proposes tokens: as for --target; 'default' is the preset's, 'none' is none, 'self' the "
        "target."
    ),
]
Reference = Annotated[str, typer.Argument(help=f"The model: {_REFERENCE}.", metavar="REF", show_default=False)]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16, or auto: bfloat16 on an accelerator, float32 on a CPU.", metavar="DTYPE")
]
_MESH = "Devices that share the work, such as data=2,heads=4: sequences along data, kv heads along heads."
# Of commands that run a model, and of those that compare or predict.
Mesh = Annotated[
    str | None,
    typer.Option(
        help=f"{_MESH} data=1 is one device.",
        metavar="MESH",
        show_default="the local ones that are predicted to be fastest",
    ),
]
MeshBesideOne = Annotated[str | None, typer.Option(help=_MESH, metavar="MESH", show_default="one device")]
Window = Annotated[int, typer.Option(help="Drafted tokens per window.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens with this probability.")]
AlignmentFolder = Annotated[
    Path | None, typer.Option(help="specattn: folder written by `specattn calibrate`.", show_default="the preset's")
]
# Of the commands that compare methods.
MethodsAlignment = Annotated[
    Path | None, typer.Option(help="Folder written by `specattn calibrate`.", show_default="the preset's")
]
_SAVINGS = "0.75,0.9"
Savings = Annotated[
    str | None,
    typer.Option(
        help="Shares of the cache reads to save; where a method has no budgets, p is searched for.",
        metavar="R,...",
        show_default=_SAVINGS,
    ),
]
Masses = Annotated[
    str | None,
    typer.Option("--p", help="Instead: attention masses to read, in (0, 1].", metavar="P,...", show_default=False),
]
Policies = Annotated[
    str, typer.Option(help="specattn: default, paper, paper_exact; one line each.", metavar="NAME,...")
]
Seed = Annotated[int, typer.Option(help="Of everything random.", min=0, max=2**32 - 1)]
# Where text is sampled.
TextSeed = Annotated[
    int,
    typer.Option(
        help="Of everything random. With auto it does not fix a sampled text alone: give --mode too.",
        min=0,
        max=2**32 - 1,
    ),
]
Out = Annotated[Path, typer.Option(help="Folder to write; it appears complete or not at all.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; all else goes to stderr.")]
TEXTS_HELP = (
    "UTF-8 texts (.xz, .gz, .bz2 too), folders of them, or names of shipped books; several may follow. KIND=F names a "
    "kind of text; of a folder of folders these are the kinds."
)
Texts = Annotated[
    list[str] | None,
    typer.Option("--text", help=TEXTS_HELP, metavar="F...", show_default="the shipped books for training"),
]
# What follows the first text of `--text F...`.
MoreTexts = Annotated[list[str] | None, typer.Argument(hidden=True)]


def find_texts(text: list[str] | None, more: list[str] | None, split: str = "train") -> dict[str, list[Path]]:
    """The files that `--text F...` names, by kind; the shipped books of a split where it names none.

    Raises:
        UserError: a text does not exist, or stands without the option.
    """
    if more and not text:
        raise UserError(f"{more[0]!r} stands alone; put --text before the texts.")
    return find_kinds([*(text or []), *(more or [])]) or {UNNAMED: shipped_books(split)}


def split_names(given: str, option: str) -> list[str]:
    """Names separated by commas, each once.

    Raises:
        UserError: there are none.
    """
    names = [name.strip() for name in given.split(",") if name.strip()]
    if not names:
        raise UserError(f"{option} is {given!r}; expected names separated by commas.")
    return list(dict.fromkeys(names))


def split_lengths(given: str, option: str) -> list[int]:
    """Numbers of tokens separated by commas, each once, in ascending order.

    Raises:
        UserError: one of them is no whole number, or there are none.
    """
    return whole(split_numbers(given, option), option, "of tokens, such as 4096,8192")


def whole(numbers: Sequence[float], option: str, what: str) -> list[int]:
    """The same numbers as integers.

    Raises:
        UserError: one of them is no whole number; `what` goes on after "expected whole numbers".
    """
    for number in numbers:
        if not number.is_integer():
            raise UserError(f"{option} names {number:g}; expected whole numbers {what}.")
    return [int(number) for number in numbers]


def _numbers(given: str, option: str) -> list[float]:
    """Numbers separated by commas, as they stand there.

    Raises:
        UserError: one of them is no number, or there are none.
    """
    numbers = []
    for part in filter(None, (part.strip() for part in given.split(","))):
        try:
            numbers.append(float(part))
        except ValueError as error:
            raise UserError(f"{option} names {part!r}; expected numbers, such as 0.75,0.9.") from error
    if not numbers:
        raise UserError(f"{option} is {given!r}; expected numbers separated by commas.")
    return numbers


def split_numbers(given: str, option: str) -> list[float]:
    """Numbers separated by commas, each once, in ascending order.

    Raises:
        UserError: one of them is no number, or there are none.
    """
    return sorted(set(_numbers(given, option)))


def split_for_each(given: str, count: int, option: str) -> list[float]:
    """Numbers separated by commas: one for all of so many, or one for each.

    Raises:
        UserError: one of them is no number, or there are neither one nor so many.
    """
    numbers = _numbers(given, option)
    if len(numbers) not in (1, count):
        each = f", or one for each of {count} lengths" if count > 1 else ""
        raise UserError(f"{option} holds {len(numbers)} numbers; expected one{each}.")
    return numbers * count if len(numbers) == 1 else numbers


def split_reading(kv_reduction: str | None, p: str | None) -> tuple[list[float], list[float]]:
    """The savings and the masses that `Savings` and `Masses` say: one of them is empty.

    Raises:
        UserError: both are given, or one of them holds no numbers.
    """
    if kv_reduction is not None and p is not None:
        raise UserError("--p and --kv-reduction both say how much to read; give one of them.")
    if p is not None:
        return [], split_numbers(p, "--p")
    return split_numbers(_SAVINGS if kv_reduction is None else kv_reduction, "--kv-reduction"), []
