"""What `generate` returns."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

from specattn_jax.errors import UserError
from specattn_jax.planning.gate import Decision
from specattn_jax.reporting.display import Picture
from specattn_jax.reporting.shading import SelectionRecord, shade_window

FinishReason: TypeAlias = Literal["end token", "stop text", "length"]


@dataclasses.dataclass(frozen=True)
class Generation:
    """One continued prompt and what it cost.

    Attributes:
        text: the new text, stop tokens and stop texts left out.
        tokens: the new token ids; a stop token at the end, or what completes a stop text, included.
        prompt_tokens: length of the prompt.
        mode: how it was generated; where that changed, how most tokens were.
        windows: verification passes of the target.
        accepted_per_window: mean number of drafted tokens accepted (0 to W), the target's own token not counted.
        kv_reduction: share of the target's cache reads saved, averaged over layers, heads and windows.
        layer_reads: share of the cache that each target layer read, averaged over windows.
        lossless: whether the text is distributed as the target's own.
        selection: which tokens each window read; None unless `generate` was asked to keep it.
        window: drafted tokens per window, in most of that mode's windows; None where nothing is drafted.
        finish_reason: why the text ends: at the model's own end token, at a stop text, or at the wanted length.
        inner_accepted_per_window: in mode `hierarchical`, mean number of tokens that the target over few entries
            accepted in each of its own windows; None where there is no such level.
        draft_reads: in mode `specattn`, share of its own cache that the draft was to read (see
            `planning.draft_reads`); None in other modes.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    mode: str
    windows: int
    accepted_per_window: float
    kv_reduction: float
    layer_reads: list[float]
    lossless: bool
    selection: SelectionRecord | None = None
    window: int | None = None
    finish_reason: FinishReason = "length"
    inner_accepted_per_window: float | None = None
    draft_reads: float | None = None

    @property
    def stats(self) -> dict[str, float | int | str | None]:
        """The numbers, by name.

        Example:
            >>> from specattn_jax import generate
            >>> from specattn_jax.examples import tiny_pair
            >>> result = generate(tiny_pair(), ["Call me"], mode="speculative", max_new_tokens=8).results[0]
            >>> {name: result.stats[name] for name in ("mode", "prompt_tokens", "new_tokens", "kv_reduction")}
            {'mode': 'speculative', 'prompt_tokens': 7, 'new_tokens': 8, 'kv_reduction': 0.0}
        """
        return {
            "mode": self.mode,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.tokens),
            "windows": self.windows,
            "accepted_per_window": self.accepted_per_window,
            "kv_reduction": self.kv_reduction,
        }

    def plot_selection(self, window: int = -1, *, most_tokens: int = 400) -> Picture:
        """The text before a window, each word shaded by how many layers and kv heads read it.

        Args:
            window: which window; negative numbers count from the last.
            most_tokens: how much of the text before the window is shown.

        Returns:
            What a notebook shows as it is; its `html` can be written to a file.

        Raises:
            UserError: there is no such window, or the selection was not kept.

        Example:
            >>> from specattn_jax import generate
            >>> from specattn_jax.examples import tiny_pair
            >>> run = generate(
            ...     tiny_pair(), ["Call me Ishmael."], mode="specattn", max_new_tokens=8, p=0.8, keep_selection=True
            ... )
            >>> picture = run.results[0].plot_selection(window=0)  # in a notebook, shown as it is
            >>> picture.html.startswith("<div")
            True
        """
        if self.selection is None:
            raise UserError("plot_selection: nothing was kept; call generate with keep_selection=True.")
        if not -self.windows <= window < self.windows:
            raise UserError(f"window is {window}; expected a number below {self.windows}, the windows of this text.")
        return shade_window(self.selection, window, most_tokens=most_tokens)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Where the time of one call went, in seconds; compiling is kept apart because it happens once."""

    compile_s: float
    prefill_s: float
    decode_s: float


@dataclasses.dataclass(frozen=True)
class Generations:
    """The results of one call.

    Attributes:
        results: prompt by prompt.
        timing: shared by the batch.
        decisions: in mode `auto`, each choice of mode and window with its reason, the first one included.
        notes: sentences about what makes results doubtful, such as a text far longer than those of the calibration.
    """

    results: list[Generation]
    timing: Timing
    decisions: list[Decision] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """New tokens of the whole batch per second of decoding; prefill gives each sequence its first token."""
        decoded = sum(len(result.tokens) - 1 for result in self.results)
        return decoded / self.timing.decode_s if self.timing.decode_s > 0 else 0.0
