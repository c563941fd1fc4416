"""What XLA makes of a decode step of the embedded pair's shape: memory and host traffic. No weights are needed."""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings

import jax
import jax.numpy as jnp
import pytest
from specattn_kernels import Choice, backends
from specattn_kernels.triton import attention, long_rows, merge, scores, selection, short_rows
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


def trace_decode(slots: int, policy: str, target_config: ModelConfig, draft_config: ModelConfig):
    """The decode step of mode specattn, traced from shapes alone."""
    target, draft = (abstract_model(config, jnp.float32) for config in (target_config, draft_config))
    settings = DecodeSettings("specattn", 5)
    selector = Selector(
        alignment=random_alignment(target_config, draft_config),
        mass=NucleusMass.uniform(0.9, target_config.num_layers),
        policy=load_policy(policy),
        target=target_config,
        draft=draft_config,
    )
    caches = [
        jax.eval_shape(functools.partial(init_cache, config, 1, slots, jnp.float32))
        for config in (target_config, draft_config)
    ]
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    hidden = jax.ShapeDtypeStruct((1, target_config.embed_dim), jnp.float32)
    state = jax.eval_shape(
        functools.partial(start_decoding, settings=settings, room=128), target, hidden, *caches, one, one, keys
    )
    return decode.trace(target, draft, selector, state, jax.ShapeDtypeStruct((), jnp.int32), settings=settings)


def lower_decode(slots: int, policy: str):
    """The embedded pair's step, lowered, and the bytes of the target's and draft's cache."""
    lowered = trace_decode(slots, policy, SMOLLM2, DRAFT).lower()
    return lowered, SMOLLM2.cache_bytes(1, slots, 4), DRAFT.cache_bytes(1, slots, 4)


@pytest.mark.parametrize("policy", ["default", pytest.param("paper", marks=pytest.mark.slow)])
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


TRITON_MODULES = (attention, long_rows, merge, scores, selection, short_rows)
HOST_WORDS = ("callback", "infeed", "outfeed", "send", "recv")


def test_a_step_never_touches_the_host():
    lowered, *_ = lower_decode(1024, "default")
    text = lowered.as_text()
    for word in HOST_WORDS:
        assert word not in text


def test_no_kernel_touches_the_host(monkeypatch):
    """The same for a GPU with the Triton kernels of every op, as far as it can be lowered without one."""
    for module in TRITON_MODULES:
        monkeypatch.setattr(module, "interpreted", lambda: False)
    monkeypatch.setattr(backends, "choose_implementation", lambda *_: Choice("pallas_triton", "for the test"))
    # Shapes of their own, as what was traced for them is kept.
    target, draft = (dataclasses.replace(SMOLLM2, num_layers=layers, vocab_size=499) for layers in (2, 1))
    for slots, kernels in ((640, {"select_in_rows"}), (65536, {"keep_bracket", "write_chosen"})):
        traced = trace_decode(slots, "default", target, draft)
        for word in HOST_WORDS[:3]:
            assert word not in str(traced.jaxpr)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Triton.*", category=DeprecationWarning)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert all(name in text for name in kernels | {"sparse_decode", "score_cache"})
        assert not re.findall(r"stablehlo\.(?:infeed|outfeed|send|recv)\b|custom_call @\w*callback", text)
