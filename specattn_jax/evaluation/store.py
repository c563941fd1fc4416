"""Results of an evaluation, part by part on disk, so that one that was killed goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specattn_jax.errors import UserError
from specattn_jax.files import atomic_file, exists, is_taken, sensible
from specattn_jax.loading.pair import ModelPair
from specattn_jax.reporting.provenance import alignment_digest, model_digest

SETTINGS, PARTS = "settings.json", "parts"


class Store:
    """A folder with the parts of one evaluation.

    Numbers are written with all their digits, and a part that was just measured is handled as if it had been read back,
    so an evaluation that was interrupted ends with the same bits as one that was not.
    """

    def __init__(self, out: Path, configuration: Mapping[str, Any]) -> None:
        """Looks at the folder; it is made with the first part, so that what fails before leaves nothing behind.

        Args:
            out: the folder.
            configuration: plain JSON data; all that every part depends on.

        Raises:
            UserError: it holds something else, or an evaluation of another configuration.
        """
        self._parts, self._note = out / PARTS, out / SETTINGS
        self._configuration = wanted = json.loads(json.dumps(configuration))
        if exists(self._note):
            with sensible(f"out: {self._note}", "choose another folder"):
                found = dict(json.loads(self._note.read_text(encoding="utf-8")))
            names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
            if names:
                raise UserError(
                    f"out: {out} holds an evaluation of another configuration ({', '.join(names)} differ); choose "
                    "another folder, or the same models, texts and settings."
                )
        elif is_taken(out):
            raise UserError(
                f"out: {out} exists already and holds no evaluation; expected a new or empty folder, or one to go on "
                "with; choose another one."
            )

    def load(self, name: str, header: Mapping[str, Any]) -> dict[str, Any] | None:
        """A part that was saved before; None where there is none.

        Args:
            name: of the part.
            header: what it is of; must be the same as when it was saved.

        Raises:
            UserError: it is damaged, or of something else.
        """
        path = self._path(name)
        if not exists(path):
            return None
        with sensible(path, "remove this file, and the same command measures it again"):
            content = json.loads(path.read_text(encoding="utf-8"))
            found, values = content["of"], dict(content["values"])
        if found != json.loads(json.dumps(header)):
            raise UserError(f"{path}: was measured with another selection policy of this name; choose another folder.")
        return values

    def save(self, name: str, header: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Writes a part, complete or not at all, and returns it as `load` would.

        Raises:
            UserError: it cannot be written.
        """
        if not exists(self._note):
            with atomic_file(self._note) as work:
                work.write_text(json.dumps(self._configuration, indent=2) + "\n", encoding="utf-8")
        text = json.dumps({"of": header, "values": values}, allow_nan=False)
        with atomic_file(self._path(name)) as work:
            work.write_text(text + "\n", encoding="utf-8")
        return dict(json.loads(text)["values"])

    def _path(self, name: str) -> Path:
        return self._parts / f"{name}.json"


def identify(pair: ModelPair) -> dict[str, Any]:
    """What a configuration says of a pair, so that results of other models do not mix with its own.

    Raises:
        UserError: the pair has no draft.
    """
    return {
        "target": model_digest(pair.target),
        "draft": model_digest(pair.need_draft()),
        "alignment": alignment_digest(pair.alignment),
        "dtype": str(pair.target.dtype),
    }
