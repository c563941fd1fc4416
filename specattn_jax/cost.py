"""What a window has to move: a cost model in bytes, for estimates before anything is measured.

Decoding a few tokens at a time is bound by memory: every weight and every cache entry that is attended is read once
for all the tokens of a call. Bytes over bandwidth are the least time that a window can take; ratios of them say how
much faster one way of decoding can be than another, whatever the device.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Any, NamedTuple

from specattn_jax.config import ModelConfig
from specattn_jax.errors import UserError
from specattn_jax.speculative import MODES, Mode

_SCORE_BYTES, _ID_BYTES = 4, 4


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
    """

    target: ModelConfig
    draft: ModelConfig
    batch: int = 1
    context: int = 32768
    window: int = 5
    accepted: float = 3.5
    kv_reduction: float = 0.75
    itemsize: int = 2

    def check(self) -> None:
        """Raises UserError for numbers that mean nothing."""
        for name in ("batch", "context", "window", "itemsize"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if not 0 <= self.accepted <= self.window:
            raise UserError(f"accepted is {self.accepted}; expected 0 to the window's {self.window} drafted tokens.")
        if not 0 <= self.kv_reduction <= 1:
            raise UserError(f"kv_reduction is {self.kv_reduction}; expected a share from 0 to 1.")


class WindowBytes(NamedTuple):
    """Bytes of one window, all sequences together.

    Attributes:
        draft_weights: weights of the draft, once a drafted token.
        draft_cache: its cache, likewise.
        selection: scores of the draft's attention, their mixture, and the ids of what is selected.
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
    return drafted._replace(selection=_selection_bytes(scenario), target_cache=cache * (1 - scenario.kv_reduction))


def _selection_bytes(scenario: Scenario) -> float:
    """Of the `default` policy with kv-head sources: every array is written by one kernel and read by the next."""
    target, draft = scenario.target, scenario.draft
    logits = draft.num_layers * draft.num_heads
    sources = draft.num_layers * draft.num_kv_heads
    rows = target.num_layers * target.num_kv_heads
    per_step = _SCORE_BYTES * 2 * (logits + sources + rows)
    once = rows * (_SCORE_BYTES + _ID_BYTES)
    return float(scenario.batch * scenario.context * (scenario.window * per_step + once))


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
