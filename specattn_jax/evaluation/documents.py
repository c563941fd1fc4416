"""What an evaluation reads: documents of one length, cut out of texts or streamed from a data set."""

from __future__ import annotations

import dataclasses
import importlib.resources
import tomllib
from collections.abc import Callable, Iterable, Sequence

from specattn_jax.errors import UserError
from specattn_jax.files import first_line


@dataclasses.dataclass(frozen=True)
class DatasetPreset:
    """A data set on the Hugging Face hub. Presets: `configs/datasets.toml`.

    Attributes:
        hub: its id.
        split: which part of it.
        column: where the text is.
    """

    hub: str
    split: str
    column: str


def load_dataset_preset(name: str) -> DatasetPreset:
    """The data set called `name`.

    Raises:
        UserError: there is no such preset.
    """
    text = importlib.resources.files("specattn_configs").joinpath("datasets.toml").read_text(encoding="utf-8")
    presets = tomllib.loads(text)
    if name not in presets:
        raise UserError(
            f"dataset is {name!r}; expected one of {', '.join(sorted(presets))}; give other texts as files with --text."
        )
    return DatasetPreset(**presets[name])


def cut_documents(texts: Sequence[Sequence[int]], context: int, count: int) -> list[list[int]]:
    """Documents of `context` tokens, none overlapping another, spread evenly over all texts.

    Texts are cut into as many documents as they hold, so a long one gives more of them; one that is too short gives
    none.

    Args:
        texts: token ids of each text.
        context: tokens per document.
        count: documents wanted.

    Raises:
        UserError: `context` or `count` is less than 1, or the texts do not hold that many documents.
    """
    for name, value in {"context": context, "documents": count}.items():
        if value < 1:
            raise UserError(f"{name} is {value}; expected at least 1.")
    places = [(text, start) for text in texts for start in range(0, len(text) - context + 1, context)]
    if not places:
        longest = max(map(len, texts), default=0)
        raise UserError(
            f"context is {context}, but the longest text has {longest} tokens; give a longer text or a shorter context."
        )
    if count > len(places):
        raise UserError(
            f"documents is {count}, but the texts hold {len(places)} documents of {context} tokens; ask for fewer, "
            "give more texts or a shorter context."
        )
    # From the middle of each stretch: the beginning of a book is often a table of contents.
    chosen = [places[(2 * index + 1) * len(places) // (2 * count)] for index in range(count)]
    return [list(text[start : start + context]) for text, start in chosen]


def take_documents(
    texts: Iterable[str],
    encode: Callable[[str], list[int]],
    context: int,
    count: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The first `context` tokens of the first `count` texts that are long enough.

    Args:
        texts: as they come.
        encode: gives the token ids of a text.
        context: tokens per document.
        count: documents wanted.
        progress: told the documents taken and wanted.

    Raises:
        UserError: there are not that many.
    """
    documents: list[list[int]] = []
    for text in texts:
        if progress is not None:
            progress(len(documents), count)
        tokens = encode(text)
        if len(tokens) >= context:
            documents.append(tokens[:context])
        if len(documents) == count:
            return documents
    raise UserError(
        f"documents is {count}, but only {len(documents)} texts of the data set have {context} tokens; ask for fewer "
        "or for a shorter context."
    )


def stream_texts(name: str) -> Iterable[str]:
    """The texts of a data set, one after the other, nothing kept on disk.

    Raises:
        UserError: there is no such preset, or the hub cannot be reached.
    """
    preset = load_dataset_preset(name)
    import datasets

    try:
        rows = datasets.load_dataset(preset.hub, split=preset.split, streaming=True)
        for row in rows:
            yield row[preset.column]
    except Exception as error:  # the hub's client raises errors of several HTTP libraries
        raise UserError(
            f"dataset {name!r} ({preset.hub} on the Hugging Face hub) cannot be read ({first_line(error)[:200]}); "
            "without it, give your own texts with --text F..."
        ) from error
