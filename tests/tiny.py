"""Tiny random model pairs for tests: real shapes of every axis, nothing learnt."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from specattn_kernels import Implementation

from specattn_jax.decoding import loop
from specattn_jax.decoding.protocol import Models, Strategy
from specattn_jax.decoding.state import DecodeState, begin
from specattn_jax.models.cache import KVCache
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.transformer import LanguageModel, init_model
from specattn_jax.runtime.session import Session
from specattn_jax.selection.alignment import Alignment, Granularity, NucleusMass
from specattn_jax.selection.make import DraftedSelection, make_selection
from specattn_jax.selection.policy import load_policy


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


@functools.cache
def tiny_model(seed: int, scale: float = 12.0, **changes) -> LanguageModel:
    """Random weights, large enough that distributions are far from uniform."""
    model = init_model(tiny_config(**changes), jax.random.key(seed))
    params = jax.tree.map(lambda leaf: leaf * scale if leaf.ndim > 1 else leaf, model.params)
    return LanguageModel(params, model.graphdef, model.config)


def random_alignment(
    target: ModelConfig, draft: ModelConfig, seed: int = 0, granularity: Granularity = "kv_head"
) -> Alignment:
    """An alignment with random weights and made-up budgets."""
    rng = np.random.default_rng(seed)
    per_layer = {"head": draft.num_heads, "kv_head": draft.num_kv_heads, "layer": 1}[granularity]
    rows, sources = target.num_layers * target.num_kv_heads, draft.num_layers * per_layer
    return Alignment(
        weights=jnp.asarray(rng.dirichlet(np.ones(sources), rows), jnp.float32),
        savings=jnp.asarray([0.5, 0.9], jnp.float32),
        left_out=jnp.asarray(rng.uniform(0.05, 0.3, (2, target.num_layers)), jnp.float32),
        length_knots=jnp.asarray([16.0, 64.0], jnp.float32),
        length_scale=jnp.ones((2, 2), jnp.float32),
        layer_map=tuple(sorted(rng.integers(0, draft.num_layers, target.num_layers).tolist())),
        granularity=granularity,
    )


def causal_attention(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Dense attention of whole sequences, for `read_sequence`."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def selection_for(
    target: LanguageModel | ModelConfig,
    draft: LanguageModel | ModelConfig,
    policy: str,
    p: float,
    *,
    alignment: Alignment | None = None,
    implementation: Implementation | None = None,
    **changes,
) -> DraftedSelection:
    """The selection of a policy preset (with some ingredients changed) for two models, by a random alignment."""
    target, draft = (model.config if isinstance(model, LanguageModel) else model for model in (target, draft))
    return make_selection(
        dataclasses.replace(load_policy(policy), **changes),
        random_alignment(target, draft) if alignment is None else alignment,
        NucleusMass.uniform(p, target.num_layers),
        target,
        draft,
        implementation,
    )


def start(
    strategy: Strategy,
    session: Session,
    prompts: list[list[int]],
    limit: int,
    keys: jax.Array | None = None,
) -> DecodeState:
    """State after prefilling, taken over by the strategy."""
    if keys is None:
        keys = jax.random.split(jax.random.key(0), len(prompts))
    state = session.prefill(
        prompts,
        limit,
        settings=strategy.settings,
        window=strategy.window,
        with_draft=strategy.needs_draft,
        with_prompt=strategy.needs_text,
        keys=keys,
        chunk=8,
    )
    return session.start(strategy, state)


def run(
    strategy: Strategy,
    target: LanguageModel,
    draft: LanguageModel | None,
    prompts: list[list[int]],
    limit: int,
    keys: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> DecodeState:
    """Prefills and decodes to the end."""
    session = Session(Models(target, draft), implementation)
    return session.decode(strategy, start(strategy, session, prompts, limit, keys), limit)


def trace_decoding(
    strategy: Strategy,
    models: Models,
    *,
    batch: int,
    slots: int,
    implementation: Implementation | None = None,
    device: jax.sharding.Sharding | None = None,
) -> jax.stages.Traced:
    """The strategy's start and its decoding as one program, of shapes alone."""

    def prefilled(models: Models) -> DecodeState:
        target, draft = (
            KVCache.empty(model.config, batch, slots, model.dtype, implementation, model.split)
            for model in (models.target, models.draft)
        )
        last, limit = jnp.zeros((batch, 2), jnp.int32), jnp.ones((batch,), jnp.int32)
        return begin(target, draft, last, limit, jax.random.split(jax.random.key(0), batch), room=128)

    @functools.partial(jax.jit, donate_argnames=("state",))
    def start_and_decode(strategy: Strategy, models: Models, state: DecodeState, windows: jax.Array) -> DecodeState:
        return loop.decode(strategy, models, loop.start(strategy, models, state), windows)

    def on_mesh(cache: KVCache) -> KVCache:
        """Shapes forget where they lie."""
        split = cache.split
        if split is None:
            return cache
        k, v = jax.tree.map(lambda leaf: leaf.update(sharding=split.sharding("B K S H")), (cache.k, cache.v))
        return dataclasses.replace(cache, k=k, v=v)

    state = jax.eval_shape(prefilled, models)
    assert state.draft_cache is not None
    caches = {"target_cache": on_mesh(state.target_cache), "draft_cache": on_mesh(state.draft_cache)}
    arguments = strategy, models, dataclasses.replace(state, **caches), jnp.int32(0)

    def lies(leaf: jax.ShapeDtypeStruct | jax.Array) -> jax.ShapeDtypeStruct:
        sharding = leaf.sharding if isinstance(leaf.sharding, NamedSharding) else device
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return start_and_decode.trace(*jax.tree.map(lies, arguments))


def outputs(state: DecodeState) -> list[list[int]]:
    """New tokens per sequence."""
    return [row[:count].tolist() for row, count in zip(np.asarray(state.output), state.emitted, strict=True)]
