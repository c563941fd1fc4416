"""What a distillation run does: frozen, saved beside its checkpoints, compared when it is resumed."""

from __future__ import annotations

import dataclasses
from typing import Any

from specattn_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Settings of a distillation run. The defaults trained the embedded draft.

    Attributes:
        num_layers: M, layers of the draft, initialised from target layers spread evenly from first to last.
        steps: optimiser steps.
        rows: sequences per step.
        length: tokens per sequence.
        accumulate: parts that a step's rows are split into, one after the other, to save memory.
        peak_rate: highest learning rate, reached after `warmup` steps, then lowered along a cosine to zero.
        warmup: steps.
        decay: weight decay of AdamW on matrices.
        clip: largest global norm of the gradient.
        attention_weight: weight of the attention term; 0 trains on tokens alone.
        attention_rows: query positions per sequence at which attention is compared.
        own_share: share of the rows that the target wrote itself; the others are windows of the texts.
        continuations: how many texts the target writes.
        prompt: tokens of a text that the target continues.
        written: tokens that it writes.
        seed: of everything random.
    """

    num_layers: int = 7
    steps: int = 4800
    rows: int = 8
    length: int = 4096
    accumulate: int = 1
    peak_rate: float = 1e-3
    warmup: int = 100
    decay: float = 0.01
    clip: float = 1.0
    attention_weight: float = 0.1
    attention_rows: int = 32
    own_share: float = 0.75
    continuations: int = 20480
    prompt: int = 256
    written: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("num_layers", "steps", "rows", "length", "accumulate", "attention_rows", "continuations", "prompt")
        for name in (*counts, "written"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.rows % self.accumulate:
            raise UserError(f"rows is {self.rows}; expected a multiple of accumulate, {self.accumulate}.")
        if self.length % (self.prompt + self.written):
            raise UserError(
                f"length is {self.length}; expected a multiple of prompt + written, {self.prompt + self.written}, so "
                "that continuations fill a row."
            )
        if not 0.0 <= self.own_share <= 1.0:
            raise UserError(f"own_share is {self.own_share}; expected a share between 0 and 1.")
        for name in ("peak_rate", "clip"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}; expected a positive number.")
        if not 0.0 <= self.attention_weight < float("inf"):
            raise UserError(f"attention_weight is {self.attention_weight}; expected 0 or more.")

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary."""
        return dataclasses.asdict(self)
