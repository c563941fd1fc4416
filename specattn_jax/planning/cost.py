"""What a window has to move: a cost model in bytes, for estimates before anything is measured.

Decoding a few tokens at a time is bound by memory: every weight and every cache entry that is attended is read once
for all the tokens of a call. Bytes over bandwidth are the least time that a window can take; ratios of them say how
much faster one way of decoding can be than another, whatever the device.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Any, NamedTuple

from specattn_jax.decoding.autoregressive import Autoregressive
from specattn_jax.decoding.protocol import Strategy
from specattn_jax.decoding.speculative import SpecAttn, Speculative
from specattn_jax.decoding.work import Scenario, Work
from specattn_jax.errors import UserError
from specattn_jax.models.cache import Reach
from specattn_jax.models.config import ModelConfig

# Largest and mixed attention is kept in 16 bits; ids are int32.
_SCORE_BYTES, _ID_BYTES = 2, 4


class WindowBytes(NamedTuple):
    """Bytes of one window, all sequences together.

    Attributes:
        draft_weights: weights of the draft, once a drafted token.
        draft_cache: its cache, likewise.
        selection: the keys of those that choose once more, scores, their mixture, and the ids of what is selected.
        target_weights: weights of the target, once a pass.
        target_cache: what is read of its cache, by all passes.
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


def window_bytes(scenario: Scenario, work: Work) -> WindowBytes:
    """What one window moves.

    Args:
        scenario: what is decoded.
        work: what a window consists of; `Strategy.cost` tells.

    Raises:
        UserError: a number of the scenario means nothing.
    """
    scenario.check()
    target, draft, size = scenario.target, scenario.draft, (scenario.batch, scenario.context, scenario.itemsize)
    selection = scored_bytes(scenario, draft) + scoring_bytes(scenario, draft, work.draft_reads) if work.scores else 0.0
    if work.plans:
        selection += planning_bytes(scenario)
    if work.own_steps:
        once = scored_bytes(scenario, target) + scoring_bytes(scenario, target, work.own_reads)
        selection += work.own_scores * once
    return WindowBytes(
        draft_weights=work.steps * weights_read(draft) * scenario.itemsize,
        draft_cache=work.steps * work.draft_reads * draft.cache_bytes(*size),
        selection=selection,
        target_weights=(1 + work.own_steps) * weights_read(target) * scenario.itemsize,
        target_cache=(work.target_reads + work.own_steps * work.own_reads) * target.cache_bytes(*size),
    )


def scored_bytes(scenario: Scenario, scored: ModelConfig) -> float:
    """The keys of a model, all of them read once a window for the queries of several tokens.

    These, `scoring_bytes` and `planning_bytes` are what choosing costs with the kernels of the `default` policy. Every
    array is written by one kernel and read by the next.
    """
    return scored.cache_bytes(scenario.batch, scenario.context, scenario.itemsize) / 2


def scoring_bytes(scenario: Scenario, scored: ModelConfig, share: float) -> float:
    """The scores, and the choice of the share that the model itself reads: they belong to drafting too."""
    sources = scored.num_layers * scored.num_kv_heads
    # Written layer by layer, then put together.
    scores = 3 * _SCORE_BYTES
    # Read twice; ids are written once and read by every step.
    narrow = 2 * _SCORE_BYTES + share * (1 + scenario.window) * _ID_BYTES if share < 1 else 0.0
    return scenario.batch * scenario.context * sources * (scores + narrow)


def planning_bytes(scenario: Scenario) -> float:
    """The choice of what the target reads: scores are mixed, the mixtures are selected from, and the ids are read.

    Besides, what is remembered is put together and mixed in; of what is read the logits of a token are written and read
    back, and what each entry got is noted.
    """
    target, share = scenario.target, 1 - scenario.kv_reduction
    sources = scenario.draft.num_layers * scenario.draft.num_kv_heads
    rows = target.num_layers * target.num_kv_heads
    mix = (sources + rows) * _SCORE_BYTES
    select = rows * (2 * _SCORE_BYTES + share * 2 * _ID_BYTES)
    remember = rows * _SCORE_BYTES * (3 + share * (2 * target.group_size + 1))
    return scenario.batch * scenario.context * (mix + select + remember)


def weights_of_vocabulary(config: ModelConfig) -> float:
    """Weights of the embedding, and of the output matrix where it is another."""
    return float(config.vocab_size * config.embed_dim * (1 if config.tie_embeddings else 2))


def prefill_arithmetic(config: ModelConfig, batch: int, tokens: int, reach: Reach | None = None) -> tuple[float, float]:
    """Operations of a prefill: products with the layers' weights, and what the causal mask leaves of attention.

    Args:
        config: shape of the model.
        batch: sequences.
        tokens: of each prompt.
        reach: how far back the tokens see; None is everything.
    """
    # Only the last token of a prompt meets the vocabulary.
    products = 2.0 * (config.parameter_count() - weights_of_vocabulary(config)) * batch * tokens
    # Two products of each query with the keys and values up to its own place, half of all; or with what is in reach of
    # a chunk that is as long as the reach.
    seen = tokens / 2 if reach is None else min(tokens / 2, reach.sinks + 1.5 * reach.recent)
    attention = 4.0 * config.num_layers * config.num_heads * config.head_dim * batch * tokens * seen
    return products, attention


def weights_read(config: ModelConfig) -> float:
    """Weights that a call reads: all but the rows of an embedding of its own that belong to other tokens."""
    unread = 0 if config.tie_embeddings else config.vocab_size * config.embed_dim
    return float(config.parameter_count() - unread)


def speedup(scenario: Scenario, strategy: Strategy, over: Strategy) -> float:
    """How many times the tokens per second of another strategy the bytes allow."""
    cost = [window_bytes(scenario, work).total / work.tokens for work in (strategy.cost(scenario), over.cost(scenario))]
    return cost[1] / cost[0]


def estimate(scenario: Scenario) -> dict[str, float]:
    """What the bytes say of one context: the target's reads per dense pass, and the modes compared."""
    alone, dense, sparse = Autoregressive(), Speculative(window=scenario.window), SpecAttn(window=scenario.window)
    moved = window_bytes(scenario, alone.cost(scenario))
    return {
        "context": scenario.context,
        "target_weights": moved.target_weights,
        "target_cache": moved.target_cache,
        "speculative_over_autoregressive": speedup(scenario, dense, over=alone),
        "specattn_over_autoregressive": speedup(scenario, sparse, over=alone),
        "specattn_over_speculative": speedup(scenario, sparse, over=dense),
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
