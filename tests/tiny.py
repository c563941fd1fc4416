"""Tiny random model pairs for tests: real shapes of every axis, nothing learnt."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from specattn_jax.selection.TODO import Selector

from specattn_jax.decoding.speculative import DecodeSettings, DecodeState, decode, start_decoding
from specattn_jax.models.cache import init_cache
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.forward import prefill
from specattn_jax.models.transformer import LanguageModel, init_model
from specattn_jax.selection.alignment import Alignment


def tiny_config(**changes) -> ModelConfig:
    """Two layers, four query heads on two kv heads."""
    base = {
        "family": "llama",
        "vocab_size": 8,
        "embed_dim": 16,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "mlp_dim": 24,
        "max_context": 512,
    }
    return ModelConfig(**{**base, **changes})


def tiny_model(seed: int, scale: float = 12.0, **changes) -> LanguageModel:
    """Random weights, large enough that distributions are far from uniform."""
    model = init_model(tiny_config(**changes), jax.random.key(seed))
    params = jax.tree.map(lambda leaf: leaf * scale if leaf.ndim > 1 else leaf, model.params)
    return LanguageModel(params, model.graphdef, model.config)


def random_alignment(target: ModelConfig, draft: ModelConfig, seed: int = 0) -> Alignment:
    """An alignment with random weights and made-up budgets."""
    rng = np.random.default_rng(seed)
    rows, sources = target.num_layers * target.num_kv_heads, draft.num_layers * draft.num_kv_heads
    return Alignment(
        weights=jnp.asarray(rng.dirichlet(np.ones(sources), rows), jnp.float32),
        savings=jnp.asarray([0.5, 0.9], jnp.float32),
        left_out=jnp.asarray(rng.uniform(0.05, 0.3, (2, target.num_layers)), jnp.float32),
        length_knots=jnp.asarray([16.0, 64.0], jnp.float32),
        length_scale=jnp.ones((2, 2), jnp.float32),
        layer_map=tuple(sorted(rng.integers(0, draft.num_layers, target.num_layers).tolist())),
        granularity="kv_head",
    )


def causal_attention(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Dense attention of whole sequences, for `read_sequence`."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def start(
    target: LanguageModel,
    draft: LanguageModel | None,
    prompts: list[list[int]],
    settings: DecodeSettings,
    limit: int,
    keys: jax.Array | None = None,
) -> DecodeState:
    """State after prefilling both models."""
    chunk = 8
    longest = max(map(len, prompts))
    padded = -(-longest // chunk) * chunk
    slots = max(padded, longest + limit + settings.window + 1)
    tokens = jnp.array([prompt + [0] * (padded - len(prompt)) for prompt in prompts], jnp.int32)
    lengths = jnp.array([len(prompt) for prompt in prompts], jnp.int32)

    def read(model: LanguageModel):
        return prefill(model, tokens, lengths, init_cache(model.config, len(prompts), slots, model.dtype), chunk=chunk)

    hidden, target_cache = read(target)
    draft_cache = None if draft is None else read(draft)[1]
    if keys is None:
        keys = jax.random.split(jax.random.key(0), len(prompts))
    return start_decoding(
        target,
        hidden,
        target_cache,
        draft_cache,
        jnp.array([prompt[-1] for prompt in prompts], jnp.int32),
        jnp.full((len(prompts),), limit, jnp.int32),
        keys,
        settings=settings,
        room=limit,
    )


def run(
    target: LanguageModel,
    draft: LanguageModel | None,
    selector: Selector | None,
    prompts: list[list[int]],
    settings: DecodeSettings,
    limit: int,
    keys: jax.Array | None = None,
) -> DecodeState:
    """Prefills and decodes to the end."""
    state = start(target, draft, prompts, settings, limit, keys)
    return decode(target, draft, selector, state, jnp.int32(limit), settings=settings)


def outputs(state: DecodeState) -> list[list[int]]:
    """New tokens per sequence."""
    return [row[:count].tolist() for row, count in zip(np.asarray(state.output), state.emitted, strict=True)]
