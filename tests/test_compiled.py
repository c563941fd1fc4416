"""What XLA makes of a decode step of the embedded pair's shape: memory and host traffic. No weights are needed."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from tiny import random_alignment

from specattn_jax.alignment import NucleusMass
from specattn_jax.cache import init_cache
from specattn_jax.config import ModelConfig
from specattn_jax.model import abstract_model
from specattn_jax.selection import Selector, load_policy
from specattn_jax.speculative import DecodeSettings, decode, start_decoding

pytestmark = pytest.mark.optimised

SMOLLM2 = ModelConfig(
    family="llama",
    vocab_size=49152,
    embed_dim=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    mlp_dim=1536,
    max_context=8192,
    rope_theta=100_000.0,
    tie_embeddings=True,
)


DRAFT = dataclasses.replace(SMOLLM2, num_layers=6)


def lower_decode(slots: int, policy: str):
    """The decode step of mode specattn, lowered from shapes alone, and the bytes of the target's and draft's cache."""
    target, draft = (abstract_model(config, jnp.float32) for config in (SMOLLM2, DRAFT))
    settings = DecodeSettings("specattn", 5)
    selector = Selector(
        alignment=random_alignment(SMOLLM2, DRAFT),
        mass=NucleusMass.uniform(0.9, SMOLLM2.num_layers),
        policy=load_policy(policy),
        target=SMOLLM2,
        draft=DRAFT,
    )
    caches = [
        jax.eval_shape(functools.partial(init_cache, config, 1, slots, jnp.float32)) for config in (SMOLLM2, DRAFT)
    ]
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    hidden = jax.ShapeDtypeStruct((1, SMOLLM2.embed_dim), jnp.float32)
    state = jax.eval_shape(
        functools.partial(start_decoding, settings=settings, room=128), target, hidden, *caches, one, one, keys
    )
    lowered = decode.lower(target, draft, selector, state, jax.ShapeDtypeStruct((), jnp.int32), settings=settings)
    return lowered, SMOLLM2.cache_bytes(1, slots, 4), DRAFT.cache_bytes(1, slots, 4)


@pytest.mark.parametrize("policy", ["default", "paper"])
def test_temporaries_stay_under_five_percent_of_the_cache(policy):
    temporaries = {}
    for slots in (4096, 8192):
        lowered, target_bytes, draft_bytes = lower_decode(slots, policy)
        analysis = lowered.compile().memory_analysis()
        # Of the target's cache alone, which is the stricter measure.
        temporaries[slots] = analysis.temp_size_in_bytes / target_bytes
        # Donated: the caches are updated where they lie.
        assert analysis.alias_size_in_bytes >= target_bytes + draft_bytes
    assert temporaries[4096] < 0.05
    assert temporaries[8192] < 0.05


def test_a_step_never_touches_the_host():
    lowered, *_ = lower_decode(1024, "default")
    text = lowered.as_text()
    for word in ("callback", "infeed", "outfeed", "send", "recv"):
        assert word not in text
