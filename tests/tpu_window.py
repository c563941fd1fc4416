"""Compiles decoding with every Pallas TPU kernel for chips that need not be there, and prints what came out as JSON.

    python tests/tpu_window.py v5e:2x2 v6e:2x2

A process of its own: libtpu reads the environment when it is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections import Counter

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from tiny import selection_for, trace_decoding

from specattn_jax.decoding.protocol import Models
from specattn_jax.decoding.speculative import SpecAttn
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.transformer import abstract_model

BATCH, SLOTS = 2, 4096
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


def lower_decode(topology: str) -> jax.stages.Lowered:
    """`decode` in mode specattn with every op named `pallas_tpu`, lowered for one chip of `topology`."""
    models = Models(*(abstract_model(config, jnp.bfloat16) for config in (TARGET, DRAFT)))
    strategy = SpecAttn(selection_for(TARGET, DRAFT, "default", 0.9, block_size=32, implementation="pallas_tpu"))
    chip = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0])
    return trace_decoding(strategy, models, batch=BATCH, slots=SLOTS, implementation="pallas_tpu", device=chip).lower()


def describe(lowered: jax.stages.Lowered) -> dict[str, object]:
    """The kernels that were compiled, and what would tell of the host or of copies of the target's cache."""
    compiled = lowered.compile()
    text = compiled.as_text()
    instructions = re.findall(r"^\s*(?:ROOT )?%[\w.-]+ = (.+?) ([a-z-]+)\(", text, re.MULTILINE)
    cache = f"bf16[{BATCH},{TARGET.num_kv_heads},{SLOTS},{TARGET.head_dim}]"
    return {
        "kernels": Counter(re.findall(r"%([a-z_]+)[\w.]* = .*custom_call_target=\"tpu_custom_call\"", text)),
        "opcodes": sorted({opcode for _, opcode in instructions}),
        "callbacks": lowered.as_text().count("callback") + text.count("callback"),
        # Memory space 5 is the host's.
        "host_arrays": text.count("S(5)"),
        # Not copy-start: XLA moves arrays into vector memory and back where they fit, as these small ones do.
        "cache_copies": sum(cache in shape and opcode in ("copy", "transpose") for shape, opcode in instructions),
        "aliased_bytes": compiled.memory_analysis().alias_size_in_bytes,
        "cache_bytes": sum(config.cache_bytes(BATCH, SLOTS, 2) for config in (TARGET, DRAFT)),
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
    print(json.dumps({topology: describe(lower_decode(topology)) for topology in sys.argv[1:]}))
