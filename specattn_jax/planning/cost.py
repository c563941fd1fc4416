"""What a window has to move: a cost model in bytes, for estimates before anything is measured.

Decoding a few tokens at a time is bound by memory: every weight and every cache entry that is attended is read once
for all the tokens of a call. Bytes over bandwidth are the least time that a window can take; ratios of them say how
much faster one way of decoding can be than another, whatever the device.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Any, NamedTuple

from specattn_jax.decoding.speculative import MODES, Mode
from specattn_jax.errors import UserError
from specattn_jax.models.config import ModelConfig
from specattn_jax.selection.policies import LEAST_DRAFT_ENTRIES

# Largest and mixed attention is kept in 16 bits; ids are int32.
_SCORE_BYTES, _ID_BYTES = 2, 4


class Scenario(NamedTuple):
    """What is decoded.

    Attributes:
        target: shape of the target.
        draft: shape of the draft.
        batch: sequences.
        context: entries in the cache of each.
        window: W, tokens drafted per window.
        accepted: drafted tokens accepted per window, on average.
        kv_reduction: share of the target's cache reads that mode `specattn` saves.
        itemsize: bytes of a weight and of a cache number.
        draft_reads: share of its own cache that the draft reads in mode `specattn`, but not of very short ones.
    """

    target: ModelConfig
    draft: ModelConfig
    batch: int = 1
    context: int = 32768
    window: int = 5
    accepted: float = 3.5
    kv_reduction: float = 0.75
    itemsize: int = 2
    draft_reads: float = 1.0

    @property
    def draft_share(self) -> float:
        """Share of its own cache that the draft does read in mode `specattn`."""
        return min(1.0, max(self.draft_reads, LEAST_DRAFT_ENTRIES / self.context))

    def check(self) -> None:
        """Raises UserError for numbers that mean nothing."""
        for name in ("batch", "context", "window", "itemsize"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if not 0 <= self.accepted <= self.window:
            raise UserError(f"accepted is {self.accepted}; expected 0 to the window's {self.window} drafted tokens.")
        if not 0 <= self.kv_reduction <= 1:
            raise UserError(f"kv_reduction is {self.kv_reduction}; expected a share from 0 to 1.")
        if not 0 < self.draft_reads <= 1:
            raise UserError(f"draft_reads is {self.draft_reads}; expected a share above 0, of at most 1.")


class WindowBytes(NamedTuple):
    """Bytes of one window, all sequences together.

    Attributes:
        draft_weights: weights of the draft, once a drafted token.
        draft_cache: its cache, likewise.
        selection: the draft's keys once more, scores, their mixture, and the ids of what is selected.
        target_weights: weights of the target, once.
        target_cache: what is read of its cache.
    """

    draft_weights: float
    draft_cache: float
    selection: float
    target_weights: float
    target_cache: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


def window_bytes(scenario: Scenario, mode: Mode) -> WindowBytes:
    """What one window moves; in mode `autoregressive` that is one token.

    Raises:
        UserError: a number of the scenario, or the mode, means nothing.
    """
    scenario.check()
    if mode not in MODES:
        raise UserError(f"mode is {mode!r}; expected one of {', '.join(MODES)}.")
    target, draft, steps = scenario.target, scenario.draft, scenario.window
    cache = float(target.cache_bytes(scenario.batch, scenario.context, scenario.itemsize))
    target_weights = weights_read(target) * scenario.itemsize
    if mode == "autoregressive":
        return WindowBytes(0.0, 0.0, 0.0, target_weights, cache)
    draft_cache = float(draft.cache_bytes(scenario.batch, scenario.context, scenario.itemsize))
    drafted = WindowBytes(
        steps * weights_read(draft) * scenario.itemsize, steps * draft_cache, 0.0, target_weights, cache
    )
    if mode == "speculative":
        return drafted
    return drafted._replace(
        draft_cache=steps * draft_cache * scenario.draft_share,
        selection=selection_bytes(scenario),
        target_cache=cache * (1 - scenario.kv_reduction),
    )


def selection_bytes(scenario: Scenario) -> float:
    """What choosing costs with the kernels of the `default` policy, which scores and mixes once a window.

    Every array is written by one kernel and read by the next.
    """
    return scored_bytes(scenario) + scoring_bytes(scenario) + planning_bytes(scenario)


def scored_bytes(scenario: Scenario) -> float:
    """Those of `selection_bytes` that are the draft's keys, all of them read once for the queries of all steps."""
    return scenario.draft.cache_bytes(scenario.batch, scenario.context, scenario.itemsize) / 2


def scoring_bytes(scenario: Scenario) -> float:
    """Those that belong to drafting too: the scores, and the choice of what the draft itself reads."""
    sources, share = scenario.draft.num_layers * scenario.draft.num_kv_heads, scenario.draft_share
    # Written layer by layer, then put together.
    scores = 3 * _SCORE_BYTES
    # Read twice; ids are written once and read by every step.
    narrow = 2 * _SCORE_BYTES + share * (1 + scenario.window) * _ID_BYTES if scenario.draft_reads < 1 else 0.0
    return scenario.batch * scenario.context * sources * (scores + narrow)


def planning_bytes(scenario: Scenario) -> float:
    """Those of the choice of what the target reads: scores are mixed, the mixtures selected from, the ids read."""
    sources = scenario.draft.num_layers * scenario.draft.num_kv_heads
    rows = scenario.target.num_layers * scenario.target.num_kv_heads
    mix = (sources + rows) * _SCORE_BYTES
    select = rows * (2 * _SCORE_BYTES + (1 - scenario.kv_reduction) * 2 * _ID_BYTES)
    return scenario.batch * scenario.context * (mix + select)


def weights_read(config: ModelConfig) -> float:
    """Weights that a call reads: all but the rows of an embedding of its own that belong to other tokens."""
    unread = 0 if config.tie_embeddings else config.vocab_size * config.embed_dim
    return float(config.parameter_count() - unread)


def tokens_per_window(scenario: Scenario, mode: Mode) -> float:
    """Tokens that a window gives each sequence: those accepted, and the target's own."""
    return 1.0 if mode == "autoregressive" else scenario.accepted + 1.0


def speedup(scenario: Scenario, mode: Mode, over: Mode) -> float:
    """How many times the tokens per second of another mode the bytes allow."""
    cost = [window_bytes(scenario, one).total / tokens_per_window(scenario, one) for one in (mode, over)]
    return cost[1] / cost[0]


def estimate(scenario: Scenario) -> dict[str, float]:
    """What the bytes say of one context: the target's reads per dense pass, and the modes compared."""
    dense = window_bytes(scenario, "autoregressive")
    return {
        "context": scenario.context,
        "target_weights": dense.target_weights,
        "target_cache": dense.target_cache,
        "speculative_over_autoregressive": speedup(scenario, "speculative", over="autoregressive"),
        "specattn_over_autoregressive": speedup(scenario, "specattn", over="autoregressive"),
        "specattn_over_speculative": speedup(scenario, "specattn", over="speculative"),
    }


def load_shape(name: str) -> ModelConfig:
    """The shape of a well-known model, from `configs/shapes.toml`.

    Raises:
        UserError: there is none of that name.
    """
    shapes = _shapes()
    if name not in shapes:
        raise UserError(f"shape is {name!r}; expected one of {', '.join(shapes)}.")
    return ModelConfig(**shapes[name])


def shape_names() -> tuple[str, ...]:
    """Names that `load_shape` knows."""
    return tuple(_shapes())


def _shapes() -> dict[str, dict[str, Any]]:
    return tomllib.loads(resources.files("specattn_configs").joinpath("shapes.toml").read_text(encoding="utf-8"))
