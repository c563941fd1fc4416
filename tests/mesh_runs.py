"""Decodes and calibrates on meshes of eight virtual CPU devices, and on one device; prints what came out.

    JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/mesh_runs.py few|all|calibration

A process of its own: how many devices there are is settled when JAX starts.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import outputs, selection_for, start, tiny_model

from specattn_jax.calibration.passages import CalibrationSettings
from specattn_jax.decoding import loop
from specattn_jax.decoding.autoregressive import Autoregressive
from specattn_jax.decoding.hierarchical import Hierarchical
from specattn_jax.decoding.hierarchical_lookup import HierarchicalLookup
from specattn_jax.decoding.itself import SelfSpeculative
from specattn_jax.decoding.lookup import PromptLookup
from specattn_jax.decoding.protocol import DecodeSettings, Models, Strategy
from specattn_jax.decoding.sampling import Sampling
from specattn_jax.decoding.speculative import SpecAttn, Speculative
from specattn_jax.decoding.state import DecodeState
from specattn_jax.evaluation.forced import read_documents
from specattn_jax.examples import byte_tokenizer, tiny_pair
from specattn_jax.loading import save_hf
from specattn_jax.models.sharding import make_mesh, place, replicated, split_target
from specattn_jax.planning import mesh_choice
from specattn_jax.planning.gate import make_gate
from specattn_jax.planning.mesh import measure_link
from specattn_jax.runtime.session import Session
from specattn_jax.texts import find_text

MESHES = ("heads=8", "data=2,heads=4", "data=4,heads=2", "data=8")
NEW = 12
_COLLECTIVE = re.compile(r" = (?P<type>\(.*?\)|\S+) (?P<op>all-gather|all-to-all|collective-permute)(?:-start)?\(")
_HOST = re.compile(r" = \S+ (?:infeed|outfeed|send|recv)\(|callback")
_SHAPE = re.compile(r"[a-z]+\d*\[([\d,]*)\]")

_SHAPES = {"num_kv_heads": 8, "num_heads": 16, "embed_dim": 32, "head_dim": 16, "vocab_size": 64, "mlp_dim": 48}
TARGET, DRAFT = (tiny_model(seed, scale=6.0, num_layers=layers, **_SHAPES) for seed, layers in ((0, 2), (1, 1)))


def prompts(batch: int) -> list[list[int]]:
    """Of unequal lengths."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 64, size).tolist() for size in rng.integers(20, 60, batch)]


def models_on(mesh: str | None, *, whole_draft: bool) -> Models:
    """The pair, on one device without a mesh; every device may have the whole draft."""
    if mesh is None:
        return Models(TARGET, DRAFT)
    split = split_target(make_mesh(mesh), TARGET.config)
    return Models(place(TARGET, split), place(DRAFT, replicated(split) if whole_draft else split))


def strategies(temperature: float) -> dict[str, Strategy]:
    """All of them."""
    settings = DecodeSettings(Sampling(temperature=temperature, top_p=0.9 if temperature else 1.0))
    mixture, published = (
        selection_for(TARGET, DRAFT, policy, 0.6, **changes)
        for policy, changes in (("default", {}), ("paper", {"dense_layers": 1}))
    )
    return {
        "autoregressive": Autoregressive(settings),
        "speculative": Speculative(settings=settings, window=3),
        "specattn": SpecAttn(mixture, settings, 3),
        "paper": SpecAttn(published, settings, 3),
        "self": SelfSpeculative(settings, 3, every=2),
        "lookup": PromptLookup(settings, 3),
        "hierarchical": Hierarchical(settings, 5, 2),
        "hierarchical lookup": HierarchicalLookup(settings, 5, 2),
    }


def decode(strategy: Strategy, models: Models, batch: int) -> tuple[list[list[int]], dict[str, Any]]:
    """The new tokens, and what a window's compiled program moves."""
    session = Session(models)
    state = start(strategy, session, prompts(batch), NEW)
    program = loop.decode.lower(strategy, session.of(strategy), state, jnp.int32(1)).compile()
    facts = window_facts(program.as_text() or "", state)
    # The state lies as every window leaves it: a program takes no arrays that lie otherwise.
    for windows in (1, NEW):
        state = program(strategy, session.of(strategy), state, jnp.int32(windows))
    return outputs(state), facts


def window_facts(text: str, state: DecodeState) -> dict[str, Any]:
    """What a program sends from device to device, and to the host."""
    sizes = [
        int(np.prod([int(size) for size in shape.split(",") if size]))
        for found in _COLLECTIVE.finditer(text)
        for shape in _SHAPE.findall(found["type"])
    ]
    cache = state.target_cache
    return {
        # Numbers in the largest array that moves as it is; sums of partial results are none.
        "largest_moved": max(sizes, default=0),
        "moved": len(sizes),
        "host": len(_HOST.findall(text)),
        "cache_part": int(np.prod(cache.k[0].sharding.shard_shape(cache.k[0].shape))),
        "cache_spec": str(getattr(cache.k[0].sharding, "spec", None)),
    }


def perplexity(models: Models) -> float:
    """Mean negative log likelihood of random texts, read sparsely."""
    documents = jnp.asarray(np.random.default_rng(1).integers(0, 64, (4, 96)), jnp.int32)
    assert models.draft is not None
    selection = selection_for(TARGET, DRAFT, "default", 0.6)
    return float(read_documents(models.target, models.draft, selection, documents, window=3).perplexity)


def calibration(mesh: str | None) -> dict[str, Any]:
    """What is fitted on a text."""
    pair = tiny_pair()
    if mesh is not None:
        split = split_target(make_mesh(mesh), pair.target.config)
        pair = dataclasses.replace(pair, target=place(pair.target, split), draft=place(pair.need_draft(), split))
    settings = CalibrationSettings(context=128, passages=2, windows=4)
    fitted = pair.calibrate([find_text("northanger_abbey")], settings=settings).alignment
    assert fitted is not None
    arrays = ("weights", "savings", "left_out", "length_knots", "length_scale")
    notes = json.loads(fitted.provenance)
    return {
        "layer_map": fitted.layer_map,
        "arrays": {name: getattr(fitted, name).tolist() for name in arrays}
        | {name: notes[name] for name in ("mixture_kl", "layer_map_kl")},
    }


def meeting() -> dict[str, Any]:
    """How fast devices meet, and what the gate of a pair makes of it."""
    mesh = make_mesh("data=4,heads=2")
    pair = tiny_pair()
    split = split_target(mesh, pair.target.config)
    gate = make_gate(dataclasses.replace(pair, target=place(pair.target, split)), 4, (Autoregressive(),), None)
    link = measure_link(mesh)
    assert link is not None
    return {
        **link._asdict(),
        "alone": measure_link(make_mesh("data=8")),
        "believed": [gate.profile.link_latency_s, gate.profile.link_bandwidth],
        "waits": gate.profile.target_meeting_s,
    }


def chosen() -> dict[str, Any]:
    """The mesh of a folder's model that is taken by default: on a CPU, of all devices, and without room on one."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        save_hf(TARGET, byte_tokenizer(), Path(folder) / "target")
        asked = (f"{folder}/target", "none", "float32", mesh_choice.Wanted(4, 100, 10))
        found = {"cpu": mesh_choice.default_mesh(*asked), "all": mesh_choice.default_mesh(*asked, jax.devices())}
        patch.setattr(mesh_choice, "available_bytes", lambda: 0)
        return found | {"no room": mesh_choice.default_mesh(*asked, jax.devices())}


def run(which: str) -> dict[str, Any]:
    """What is asked for: tokens on meshes and on one device, and facts of the window's programs."""
    if which == "calibration":
        return {"fits": [calibration(mesh) for mesh in (None, "data=4,heads=2")]}
    few = which == "few"
    batch, meshes = (4, MESHES[1:2]) if few else (8, MESHES)
    found: dict[str, Any] = {"runs": [], "perplexity": []}
    for temperature in (1.0,) if few else (0.0, 1.0):
        for name, strategy in strategies(temperature).items():
            if few and name != "specattn":
                continue
            want, _ = decode(strategy, models_on(None, whole_draft=False), batch)
            for mesh in meshes:
                # Where the draft is does not depend on the mesh.
                for whole in (False, True) if strategy.needs_draft and mesh == MESHES[1] and not few else (False,):
                    got, facts = decode(strategy, models_on(mesh, whole_draft=whole), batch)
                    case = {"strategy": name, "temperature": temperature, "mesh": mesh, "whole_draft": whole}
                    found["runs"].append({"case": case, "got": got, "want": want, "window": facts})
    if not few:
        found["perplexity"] = [perplexity(models_on(mesh, whole_draft=False)) for mesh in (None, *MESHES[:3])]
    return found | ({"meeting": meeting(), "chosen": chosen()} if few else {})


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    print(json.dumps(run(sys.argv[1])))
