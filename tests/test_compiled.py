"""What XLA makes of a decode step of the embedded pair's shape: memory and host traffic. No weights are needed."""

from __future__ import annotations

import dataclasses
import re
import warnings

import jax.numpy as jnp
import pytest
from specattn_kernels import Choice, backends
from specattn_kernels.triton import attention, long_rows, memory, merge, scores, selection, short_rows
from tiny import selection_for, trace_decoding

from specattn_jax.decoding.protocol import Models
from specattn_jax.decoding.speculative import SpecAttn
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.transformer import abstract_model

# Kernels are chosen as for another device.
pytestmark = [pytest.mark.optimised, pytest.mark.usefixtures("own_programs")]

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
    models = Models(*(abstract_model(config, jnp.float32) for config in (target_config, draft_config)))
    strategy = SpecAttn(selection_for(target_config, draft_config, policy, 0.9))
    return trace_decoding(strategy, models, batch=1, slots=slots)


def lower_decode(slots: int, policy: str):
    """The embedded pair's step, lowered, and the bytes of the target's and draft's cache."""
    lowered = trace_decode(slots, policy, SMOLLM2, DRAFT).lower()
    return lowered, SMOLLM2.cache_bytes(1, slots, 4), DRAFT.cache_bytes(1, slots, 4)


@pytest.mark.parametrize("policy", ["default", pytest.param("paper", marks=pytest.mark.slow)])
@pytest.mark.slow
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


TRITON_MODULES = (attention, long_rows, memory, merge, scores, selection, short_rows)
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
        assert all(name in text for name in kernels | {"sparse_decode", "score_cache", "remember"})
        assert not re.findall(r"stablehlo\.(?:infeed|outfeed|send|recv)\b|custom_call @\w*callback", text)
