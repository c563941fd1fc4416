"""Rotary embedding: understood as transformers understands it, or refused."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loading.tiny_models import torch
from specattn_jax.errors import UserError
from specattn_jax.loading.hf_config import hf_config, parse_hf_config
from specattn_jax.models.config import ModelConfig, RopeScaling
from specattn_jax.models.layers import rotary_frequencies, rotation

BASE = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}


def oracle(fields):
    config = LlamaConfig(**{key: value for key, value in (BASE | fields).items() if key != "model_type"})
    kind = config.rope_parameters["rope_type"]
    inverse, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return inverse.numpy(), factor


@settings(max_examples=100, deadline=None)
@given(
    theta=st.floats(100.0, 1e7),
    head_dim=st.sampled_from([16, 64, 128]),
    rope=st.fixed_dictionaries(
        {"rope_type": st.just("yarn"), "factor": st.floats(1.0, 64.0)},
        optional={
            "original_max_position_embeddings": st.integers(64, 65536),
            "beta_fast": st.one_of(st.just(0), st.integers(2, 64)),
            "beta_slow": st.sampled_from([0, 1, 2, 0.5]),
            "attention_factor": st.one_of(st.none(), st.floats(0.1, 3.0)),
            "mscale": st.sampled_from([0, 1.0, 0.707]),
            "mscale_all_dim": st.sampled_from([0, 1.0, 0.707]),
            "truncate": st.booleans(),
        },
    ),
)
def test_yarn_is_that_of_transformers(theta, head_dim, rope):
    fields = {"rope_parameters": {**rope, "rope_theta": theta}, "head_dim": head_dim}
    config = parse_hf_config(BASE | fields, "x")
    frequencies, factor = oracle(fields)
    np.testing.assert_allclose(rotary_frequencies(config), frequencies, rtol=2e-5)
    cos, sin = rotation(config, jnp.zeros((1, 1), int))
    assert math.isclose(float(cos[0, 0, 0]), factor, rel_tol=1e-6)
    assert not np.any(sin)
    again = parse_hf_config(hf_config(config, "float32"), "x")
    assert again == config
    assert ModelConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("fields", "context"),
    [
        ({"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 131072),
        ({"max_position_embeddings": 2048, "rope_scaling": YARN}, 8192),
        ({"max_position_embeddings": 8192, "rope_scaling": YARN}, 8192),
        ({"max_position_embeddings": 16384, "rope_scaling": YARN}, 16384),
    ],
)
def test_yarn_reaches_as_far_as_its_stretch(fields, context):
    assert parse_hf_config(BASE | fields, "x").max_context == context


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({"rope_scaling": {"type": None}}, 1e4, None),
        ({"rope_theta": 5e5, "rope_scaling": None, "rope_parameters": None}, 5e5, None),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}, 5e5, None),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 5e5}}, 5e5, None),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5, "rope_type": "default"}}}, 5e5, None),
        (
            {"rope_parameters": {name: {"rope_theta": 5e5, "type": "linear", "factor": 2} for name in ("a", "b")}},
            5e5,
            RopeScaling("linear", 2.0),
        ),
        (
            {
                "layer_types": ["full_attention", "full_attention"],
                "rope_parameters": {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1e4}},
            },
            5e5,
            None,
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"type": "linear", "factor": 2.0}},
            1e4,
            RopeScaling("linear", 2.0),
        ),
        # Where it is not said, transformers takes the model's own context for the original one.
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}},
            1e4,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        ),
    ],
)
def test_what_is_understood(fields, theta, scaling):
    config = parse_hf_config(BASE | fields, "x")
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_theta": None}, r"x: rope_theta is None; expected a positive number"),
        ({"rope_theta": True}, r"rope_theta is True; expected a positive number"),
        ({"rope_theta": "1e4"}, r"rope_theta is '1e4'; expected a positive number"),
        ({"rope_scaling": [4]}, r"rope_scaling is \[4\]; expected an object"),
        ({"rope_scaling": {"factor": 4.0}}, r"kind 'default' has the unknown key 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "bend": 1}}, r"kind 'linear' has the unknown key 'bend'"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, r"the unknown key 'mrope_section'"),
        (
            {"rope_scaling": {"rope_type": "default", "type": "mrope"}},
            r"rope scaling is \{'rope_type': 'default', 'type'",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2}},
            r"rope scaling is 'dynamic'; expected default, linear, llama3",
        ),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, r"rope scaling is 'longrope'"),
        ({"rope_scaling": {"type": "yarn"}}, r"x \(rope scaling\): factor is missing"),
        ({"rope_scaling": YARN | {"truncate": "no"}}, r"truncate is 'no'; expected true or false"),
        ({"rope_scaling": YARN | {"factor": -1}}, r"factor is -1; expected a positive number"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1e4}}},
            r"rope_parameters differs between types of layers \(full_attention, sliding_attention\)",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}},
            r"rope_scaling and rope_parameters say different things",
        ),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        parse_hf_config(BASE | fields, "x")
