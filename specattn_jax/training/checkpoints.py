"""Checkpoints of a training run: Orbax, the newest two, tied to the configuration they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from specattn_jax.errors import UserError
from specattn_jax.files import check_disk, first_line, read_json, sensible


class Checkpoints:
    """Orbax checkpoints of a run, the newest two, with the configuration they belong to."""

    def __init__(self, folder: Path, configuration: Mapping[str, Any]) -> None:
        """Opens or creates the folder.

        Args:
            folder: for the checkpoints of one run.
            configuration: plain JSON data; what a resumed run must agree in.

        Raises:
            UserError: it holds checkpoints of another configuration, or cannot be written.
        """
        import orbax.checkpoint as ocp

        wanted = json.loads(json.dumps(configuration))
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        note = folder / "configuration.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
            # Without a checkpoint, a run that failed early does not bind the next one.
            found = read_json(note) if self.latest is not None else wanted
            if found != wanted:
                names = [name for name in wanted if found.get(name) != wanted[name]]
                raise UserError(
                    f"out: {folder} holds checkpoints of another configuration ({', '.join(names)} differ); choose "
                    "another folder, or the same settings and texts."
                )
            note.write_text(json.dumps(wanted, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"out: {folder} cannot be written ({error.strerror}); choose another folder.") from error
        self._args = ocp.args
        self._folder = folder

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint."""
        step: int | None = self._manager.latest_step()
        return step

    def save(self, step: int, tree: dict[str, Any]) -> None:
        """Writes a tree of arrays under its step.

        Raises:
            UserError: the disk is full or not writable.
        """
        # Orbax reports a full disk with pages of traces from its threads, so it is not let run into one.
        self.check_room(tree)
        try:
            self._manager.save(step, args=self._args.StandardSave(tree))
        except (OSError, ValueError) as error:
            reason = first_line(getattr(error, "strerror", None) or error)
            raise UserError(
                f"out: the checkpoint of step {step} could not be written ({reason}); free some room and "
                f"run the same command again, it goes on from step {self.latest or 0}."
            ) from error

    def check_room(self, tree: dict[str, Any], copies: int = 1) -> None:
        """Refuses to go on where the disk has no room for so many checkpoints.

        Raises:
            UserError: it has not.
        """
        needed = copies * sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        check_disk(self._folder, needed, "move the run to another disk; the same command goes on where it stopped")

    def restore(self, like: dict[str, Any]) -> dict[str, Any]:
        """The newest tree.

        Args:
            like: a tree of the same structure, shapes and dtypes.
        """
        with sensible(self._folder, "remove it, and the run begins anew"):
            tree: dict[str, Any] = self._manager.restore(self.latest, args=self._args.StandardRestore(like))
        return tree

    def close(self) -> None:
        """Releases what Orbax holds."""
        self._manager.close()
