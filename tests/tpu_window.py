"""Compiles decoding and prefill with the Pallas TPU kernels for chips that need not be there; prints what came out.

    python tests/tpu_window.py v5e:2x2 v6e:2x2 v5e:2x4/data=2,heads=4

A process of its own: libtpu reads the environment when it is loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import sys
from collections import Counter

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from tiny import selection_for, trace_decoding

from specattn_jax.decoding.protocol import Models
from specattn_jax.decoding.speculative import SpecAttn
from specattn_jax.models.cache import KVCache
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.forward import prefill
from specattn_jax.models.sharding import make_mesh, split_target, weight_shardings
from specattn_jax.models.transformer import LanguageModel, abstract_model

BATCH, SLOTS, PROMPT = 2, 4096, 2048
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


def chip_of(topology: str) -> SingleDeviceSharding:
    """One chip of `topology`."""
    return SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0])


def lower_prefill(topology: str, config: ModelConfig) -> jax.stages.Lowered:
    """`prefill` of whole prompts, ragged, with the op named `pallas_tpu`, lowered for one chip of `topology`."""

    def arguments() -> tuple[jax.Array, jax.Array, KVCache]:
        cache = KVCache.empty(config, BATCH, SLOTS, jnp.bfloat16, "pallas_tpu")
        return jnp.zeros((BATCH, PROMPT), jnp.int32), jnp.ones(BATCH, jnp.int32), cache

    chip = chip_of(topology)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=chip),
        (abstract_model(config, jnp.bfloat16), *jax.eval_shape(arguments)),
    )
    return jax.jit(functools.partial(prefill, chunk=PROMPT), donate_argnums=3).lower(*shapes)


def lower_decode(topology: str) -> jax.stages.Lowered:
    """`decode` in mode specattn with every op named `pallas_tpu`, lowered for one chip of `topology`."""
    models = Models(*(abstract_model(config, jnp.bfloat16) for config in (TARGET, DRAFT)))
    strategy = SpecAttn(selection_for(TARGET, DRAFT, "default", 0.9, block_size=32, implementation="pallas_tpu"))
    traced = trace_decoding(
        strategy, models, batch=BATCH, slots=SLOTS, implementation="pallas_tpu", device=chip_of(topology)
    )
    return traced.lower()


def lower_on_mesh(topology: str, text: str) -> jax.stages.Lowered:
    """The same for a mesh of the chips of `topology`, such as data=2,heads=4."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    split = split_target(make_mesh(text, chips), TARGET)

    def on_mesh(config: ModelConfig) -> LanguageModel:
        model = abstract_model(config, jnp.bfloat16)
        lies = weight_shardings(model, split)
        params = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), model.params, lies)
        return dataclasses.replace(model, params=params, split=split)

    strategy = SpecAttn(selection_for(TARGET, DRAFT, "default", 0.9, block_size=32, implementation="pallas_tpu"))
    whole = NamedSharding(split.mesh, PartitionSpec())
    models = Models(on_mesh(TARGET), on_mesh(DRAFT))
    return trace_decoding(strategy, models, batch=BATCH, slots=SLOTS, implementation="pallas_tpu", device=whole).lower()


def describe_mesh(topology: str, text: str) -> dict[str, object]:
    """What each chip of a mesh holds and runs, and what moves between them."""
    compiled = lower_on_mesh(topology, text).compile()
    program, memory = compiled.as_text(), compiled.memory_analysis()
    moved = re.findall(
        r" = \(?([a-z]+\d*)\[([\d,]*)\][^=]* (all-gather|all-to-all|collective-permute)(?:-start)?\(", program
    )
    return {
        "kernels": Counter(re.findall(r"%([a-z_]+)[\w.]* = .*custom_call_target=\"tpu_custom_call\"", program)),
        "callbacks": program.count("callback"),
        "host_arrays": program.count("S(5)"),
        "largest_moved": max(
            (math.prod(int(size) for size in sizes.split(",") if size) for _, sizes, _ in moved), default=0
        ),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "weight_bytes": sum(config.parameter_count() * 2 for config in (TARGET, DRAFT)),
        "cache_bytes": sum(config.cache_bytes(BATCH, SLOTS, 2) for config in (TARGET, DRAFT)),
    }


def describe(lowered: jax.stages.Lowered, configs: tuple[ModelConfig, ...]) -> dict[str, object]:
    """The kernels that were compiled, and what would tell of the host or of copies of the first model's cache."""
    compiled = lowered.compile()
    text = compiled.as_text()
    instructions = re.findall(r"^\s*(?:ROOT )?%[\w.-]+ = (.+?) ([a-z-]+)\(", text, re.MULTILINE)
    cache = f"bf16[{BATCH},{configs[0].num_kv_heads},{SLOTS},{configs[0].head_dim}]"
    return {
        "kernels": Counter(re.findall(r"%([a-z_]+)[\w.]* = .*custom_call_target=\"tpu_custom_call\"", text)),
        "opcodes": sorted({opcode for _, opcode in instructions}),
        "callbacks": lowered.as_text().count("callback") + text.count("callback"),
        # Memory space 5 is the host's.
        "host_arrays": text.count("S(5)"),
        # Not copy-start: XLA moves arrays into vector memory and back where they fit, as these small ones do.
        "cache_copies": sum(cache in shape and opcode in ("copy", "transpose") for shape, opcode in instructions),
        "aliased_bytes": compiled.memory_analysis().alias_size_in_bytes,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "cache_bytes": sum(config.cache_bytes(BATCH, SLOTS, 2) for config in configs),
    }


def programs(topology: str) -> dict[str, dict[str, object]]:
    """What came out: of decoding, and of each model's prefill."""
    return {
        "decode": describe(lower_decode(topology), (TARGET, DRAFT)),
        "target": describe(lower_prefill(topology, TARGET), (TARGET,)),
        "draft": describe(lower_prefill(topology, DRAFT), (DRAFT,)),
    }


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    # Without these libtpu looks for the machine that it believes to be on.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
    )
    asked = [argument.partition("/") for argument in sys.argv[1:]]
    print(
        json.dumps(
            {
                topology + slash + mesh: describe_mesh(topology, mesh) if slash else programs(topology)
                for topology, slash, mesh in asked
            }
        )
    )
