"""Compiles the TPU prefill kernel for chips that need not be there, and prints the bytes that each program holds.

    python tests/kernels/tpu_prefill.py v5e:2x2 v6e:2x2

A process of its own: libtpu reads the environment when it is loaded.
"""

from __future__ import annotations

import functools
import json
import os
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from specattn_kernels import prefill_attention

# N, K, H, dtype, whether the lse is returned: Llama-3.1-8B, SmolLM2-135M, and the largest that the kernel takes.
SHAPES = [(32, 8, 128, "bfloat16", True), (9, 3, 64, "bfloat16", False), (8, 1, 256, "float32", True)]
BATCH, TOKENS, SLOTS = 2, 2048, 8192


def compiled_bytes(topology: str) -> list[int]:
    """Temporaries of each shape's program."""
    chip = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0])

    def array(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=chip)

    sizes = []
    for heads, kv_heads, head_dim, dtype, lse in SHAPES:
        op = jax.jit(functools.partial(prefill_attention, return_lse=lse, implementation="pallas_tpu"))
        cache = array(dtype, BATCH, kv_heads, SLOTS, head_dim)
        compiled = op.lower(array(dtype, BATCH, TOKENS, heads, head_dim), cache, cache, array("int32", BATCH)).compile()
        assert "tpu_custom_call" in compiled.as_text()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    return sizes


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    # Without these libtpu looks for the machine that it believes to be on.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
    )
    print(json.dumps({topology: compiled_bytes(topology) for topology in sys.argv[1:]}))
