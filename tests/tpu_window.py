"""Compiles one decoding step for a TPU that need not be there, and prints what came out as JSON.

    python tests/tpu_window.py v5e:2x2

A process of its own: libtpu reads the environment when it is loaded.
"""

from __future__ import annotations

import os

os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
)

import dataclasses
import functools
import json
import re
import sys
from collections import Counter

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from tiny import random_alignment

from specattn_jax.alignment import NucleusMass
from specattn_jax.cache import init_cache
from specattn_jax.config import ModelConfig
from specattn_jax.model import abstract_model
from specattn_jax.selection import Selector, load_policy
from specattn_jax.speculative import DecodeSettings, decode, start_decoding

SLOTS = 4096
# The attention of Llama-3.1-8B, few layers and a narrow rest.
TARGET = ModelConfig(
    family="llama",
    vocab_size=4096,
    embed_dim=512,
    num_layers=3,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=1024,
    max_context=131072,
)
# The head dim of SmolLM2 and the smaller Llamas.
DRAFT = dataclasses.replace(TARGET, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=64)


def compile_step(topology: str) -> jax.stages.Compiled:
    """`decode` in mode specattn with every op named `pallas_tpu`, compiled for one chip of `topology`."""
    target, draft = (abstract_model(config, jnp.bfloat16) for config in (TARGET, DRAFT))
    settings = DecodeSettings("specattn", 5, implementation="pallas_tpu")
    selector = Selector(
        alignment=random_alignment(TARGET, DRAFT),
        mass=NucleusMass.uniform(0.9, TARGET.num_layers),
        policy=dataclasses.replace(load_policy("default"), block_size=32),
        target=TARGET,
        draft=DRAFT,
        implementation="pallas_tpu",
    )
    caches = [
        jax.eval_shape(functools.partial(init_cache, config, 1, SLOTS, jnp.bfloat16)) for config in (TARGET, DRAFT)
    ]
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    hidden = jax.ShapeDtypeStruct((1, TARGET.embed_dim), jnp.bfloat16)
    state = jax.eval_shape(
        functools.partial(start_decoding, settings=settings, room=128), target, hidden, *caches, one, one, keys
    )
    chip = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0])
    arguments = target, draft, selector, state, jax.ShapeDtypeStruct((), jnp.int32)
    on_chip = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), arguments)
    return decode.lower(*on_chip, settings=settings).compile()


def describe(compiled: jax.stages.Compiled) -> dict[str, object]:
    """The Pallas kernels of the program by name, how often each other kind of instruction occurs, and its memory."""
    text = compiled.as_text()
    analysis = compiled.memory_analysis()
    calls = [line for line in text.splitlines() if "custom-call(" in line]
    return {
        "targets": Counter(target for line in calls for target in re.findall(r'custom_call_target="(\w+)"', line)),
        "kernels": Counter(re.findall(r"(\w+?)(?:\.\d+)* = [^\n]*custom_call_target=\"tpu_custom_call\"", text)),
        "instructions": Counter(re.findall(r"^\s*(?:ROOT )?%?[\w.-]+ = [^=]*? ([a-z][\w-]*)\(", text, re.MULTILINE)),
        "temporaries": analysis.temp_size_in_bytes,
        "aliased": analysis.alias_size_in_bytes,
        "caches": sum(config.cache_bytes(1, SLOTS, 2) for config in (TARGET, DRAFT)),
    }


if __name__ == "__main__":
    print(json.dumps(describe(compile_step(sys.argv[1]))))
