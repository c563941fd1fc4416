"""One of several processes that decode together on a mesh of all their devices; prints the tokens.

    python tests/mesh_processes.py PORT PROCESSES ID NEW_TOKENS

With one process the same mesh is made of its own devices. `tests/test_mesh.py` starts it.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import jax

from specattn_jax.examples import tiny_pair
from specattn_jax.models.sharding import make_mesh, place, split_target
from specattn_jax.runtime.generate import generate

PROMPTS = ["Call me", "Once upon a time", "abc", "It was"]


def main(port: int, processes: int, process_id: int, new_tokens: int) -> None:
    """Joins the others, decodes, and prints."""
    jax.config.update("jax_disable_most_optimizations", True)
    if processes > 1:
        jax.distributed.initialize(f"localhost:{port}", processes, process_id, heartbeat_timeout_seconds=20)
    pair = tiny_pair()
    split = split_target(make_mesh("data=4,heads=2"), pair.target.config)
    pair = dataclasses.replace(pair, target=place(pair.target, split), draft=place(pair.draft, split))
    wanted = {"mode": "specattn", "kv_reduction": 0.75, "temperature": 0.7, "max_new_tokens": new_tokens}
    run = generate(pair, PROMPTS, on_text=lambda index, text: None, **wanted)
    print("tokens", json.dumps([result.tokens for result in run.results]), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
