"""The ingredients of a selection, and their presets."""

from __future__ import annotations

import dataclasses
import importlib.resources
import math
import tomllib
from pathlib import Path
from typing import Literal

from specattn_jax.errors import UserError
from specattn_jax.files import sensible

# A draft that reads sparsely reads at least so many entries.
LEAST_DRAFT_ENTRIES = 256


@dataclasses.dataclass(frozen=True)
class SelectionPolicy:
    """Every ingredient of a selection; static under jit. Presets: `configs/policies.toml`.

    Attributes:
        prediction: `layer_map` is the published method: the head-averaged attention of one draft layer stands for each
            target layer, and the nuclei of the W steps of a window are united. `mixture` predicts each target kv head
            from a calibrated mixture of the draft's attention, and takes one nucleus of the largest prediction over the
            steps.
        draft_reads: share of its own cache that the draft reads: for each of its kv heads the entries that the window
            before looked at most, sinks and recent window besides. 1 is all. What the target reads does not depend
            on it but through the draft's queries, as its whole cache is scored in any case.
        fits_draft_reads: whether the pair, the context and the batch say how much that is, where they are known
            (`planning.draft_reads`); `draft_reads` is then for pairs of which nothing was measured.
        threshold: `exact` minimal nucleus, or `linear` bisection that over-selects (published).
        steps: halvings of the linear bisection.
        dense_layers: leading target layers that read everything.
        num_sink: first slots that are always read.
        num_recent: last slots that are always read.
        block_size: slots per block; 1 is token granular.
        opening_weight: weight, beside the mixture's, of what the target itself looked at when decoding began: the
            largest attention of the prompt's last token and the first new one. A draft may not find what was asked
            for; the target has already. 0 does without.
        opening_life: windows after which that weight is half as large; it falls as 1 / (1 + windows / opening_life),
            down to `memory_weight`.
        memory_weight: if above 0, every verification notes for each entry that it reads how much the window's first
            token gave it, in the place of what was known of that entry before; this is what it weighs beside the
            mixture once the opening weighs less. A slot that got much is often wanted again.
    """

    prediction: Literal["layer_map", "mixture"]
    draft_reads: float = 1.0
    fits_draft_reads: bool = False
    threshold: Literal["exact", "linear"] = "exact"
    steps: int = 10
    dense_layers: int = 0
    num_sink: int = 0
    num_recent: int = 0
    block_size: int = 1
    opening_weight: float = 0.0
    opening_life: float = 8.0
    memory_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.draft_reads <= 1.0:
            raise UserError(f"draft_reads is {self.draft_reads}; expected a share in (0, 1].")
        if (self.draft_reads < 1.0 or self.fits_draft_reads) and self.prediction != "mixture":
            fitted = ", to be fitted" if self.fits_draft_reads else ""
            raise UserError(
                f"draft_reads is {self.draft_reads}{fitted}, but prediction 'layer_map' needs the attention of a draft "
                "that reads everything; expected 1."
            )
        if not 0.0 <= self.opening_weight < math.inf:
            raise UserError(f"opening_weight is {self.opening_weight}; expected a number of at least 0.")
        if not 0.0 <= self.memory_weight < math.inf:
            raise UserError(f"memory_weight is {self.memory_weight}; expected a number of at least 0.")
        if (self.opening_weight or self.memory_weight) and self.prediction != "mixture":
            raise UserError(
                f"opening_weight is {self.opening_weight} and memory_weight {self.memory_weight}, but prediction "
                f"{self.prediction!r} has nothing that they could be weighed against; expected 0."
            )
        if not 0.0 < self.opening_life < math.inf:
            raise UserError(f"opening_life is {self.opening_life}; expected a number of windows above 0.")

    def with_draft_reads(self, share: float) -> SelectionPolicy:
        """The same policy with a share that the draft reads in any case."""
        return dataclasses.replace(self, draft_reads=share, fits_draft_reads=False)


def load_policy(name: str) -> SelectionPolicy:
    """The policy preset called `name`.

    Raises:
        UserError: there is no such preset.
    """
    text = importlib.resources.files("specattn_configs").joinpath("policies.toml").read_text(encoding="utf-8")
    presets = tomllib.loads(text)
    if name not in presets:
        raise UserError(f"policy is {name!r}; expected one of {', '.join(sorted(presets))}.")
    return SelectionPolicy(**presets[name])


def read_policies(path: Path) -> dict[str, SelectionPolicy]:
    """The policies of a file that is written like the presets, by name.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    with sensible(path, "write it like configs/policies.toml"):
        return {name: SelectionPolicy(**fields) for name, fields in tomllib.loads(path.read_text("utf-8")).items()}
