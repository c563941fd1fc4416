"""What a mesh of devices decodes in which time: each device's part of the bytes, and what they wait for each other.

A device of a mesh reads its part of the weights and caches as a single one reads all of a smaller pair, so that the
predictions for one device serve; meeting the others is a fixed time of each layer. How fast devices meet is measured
where they are here; of those that are not, the constants of `link_` in configs/devices.toml are guesses.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from specattn_jax.decoding.autoregressive import Autoregressive
from specattn_jax.decoding.protocol import Strategy
from specattn_jax.decoding.speculative import SpecAttn, Speculative
from specattn_jax.decoding.work import Scenario
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.sharding import (
    HEADS,
    MeshShape,
    abstract_mesh,
    device_cache_bytes,
    device_weight_bytes,
    split_draft,
    split_target,
)
from specattn_jax.planning.device import DeviceProfile, load_profile, measure_profile, window_seconds
from specattn_jax.timing import median_and_spread

# What the H100 of scripts/results/decode-nvidia-h100 copies in a second.
H100_COPY = 2.46e12
_SCORE_BYTES = 2
# Bytes that are added up to measure a link: hardly any, and many. How often in one program, and how many in a row in a
# step of its loop, so that the loop's own work does not count; and of how many programs the median is taken.
_FEW_BYTES, _MANY_BYTES, _MANY_BYTES_ON_CPU = 2**12, 2**25, 2**20
_SUMS_OF_FEW, _SUMS_OF_MANY, _SUMS_A_STEP, _REPEATS = 256, 16, 8, 5
# Noise may hide what the bytes of a sum take besides meeting; they take at least this share of it.
_LEAST_MOVING = 0.1


class Link(NamedTuple):
    """How fast the devices of a mesh meet.

    Attributes:
        latency_s: seconds of a collective that moves hardly anything.
        bandwidth: bytes per second that a device sends to the others.
    """

    latency_s: float
    bandwidth: float


class Shared(NamedTuple):
    """What one device of a mesh decodes, and how it does.

    Attributes:
        scenario: its sequences, and models with its share of heads, MLP and vocabulary.
        profile: with what it waits for the others in the fixed seconds of layers, passes and windows.
    """

    scenario: Scenario
    profile: DeviceProfile


def share(scenario: Scenario, profile: DeviceProfile, mesh: MeshShape, *, whole_draft: bool) -> Shared:
    """A scenario as one device of a mesh sees it.

    Args:
        scenario: what all of them decode.
        profile: of one device alone.
        mesh: how many share the work.
        whole_draft: whether each has all of the draft.
    """
    mine = share_of(scenario, mesh, whole_draft=whole_draft)
    target, draft, batch = scenario.target, scenario.draft, mine.batch
    parts, drafting = mesh.heads, 1 if whole_draft else mesh.heads

    def meeting(config: ModelConfig, tokens: int, devices: int) -> float:
        """Seconds of a layer's two sums over devices."""
        return 2 * collective_seconds(batch * tokens * config.embed_dim * scenario.itemsize, devices, profile)

    # Every device gets the scores of the others once a window.
    scores = batch * scenario.context * draft.num_layers * draft.num_kv_heads * _SCORE_BYTES
    waiting = dataclasses.replace(
        profile,
        target_meeting_s=meeting(target, scenario.window + 1, parts),
        draft_meeting_s=meeting(draft, 2, drafting),
        # The embedding, and the largest logit.
        forward_s=profile.forward_s + 2 * collective_seconds(0, max(parts, drafting), profile),
        window_s=profile.window_s + collective_seconds(scores / 2, drafting, profile),
    )
    return Shared(mine, waiting)


def share_of(scenario: Scenario, mesh: MeshShape, *, whole_draft: bool) -> Scenario:
    """What one device of a mesh decodes: its sequences, and models with its share of heads, MLP and vocabulary."""
    return scenario._replace(
        target=_part(scenario.target, mesh.heads),
        draft=_part(scenario.draft, 1 if whole_draft else mesh.heads),
        batch=math.ceil(scenario.batch / mesh.data),
    )


def _part(config: ModelConfig, parts: int) -> ModelConfig:
    """A model with one device's share of heads, MLP and vocabulary."""
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // parts,
        num_kv_heads=config.num_kv_heads // parts,
        mlp_dim=math.ceil(config.mlp_dim / parts),
        vocab_size=math.ceil(config.vocab_size / parts),
    )


def collective_seconds(nbytes: float, devices: int, profile: DeviceProfile) -> float:
    """Seconds in which devices add up arrays of so many bytes; half of them where parts are gathered."""
    if devices == 1:
        return 0.0
    return profile.link_latency_s + _moved(nbytes, devices) / profile.link_bandwidth


def _moved(nbytes: float, devices: int) -> float:
    """Bytes that each device sends while all add up arrays of so many."""
    return 2 * nbytes * (devices - 1) / devices


@functools.cache
def measure_link(mesh: Mesh) -> Link | None:
    """How fast the devices along `heads` add up arrays, measured once a mesh, in far less than a second on a GPU.

    All lines of devices along `heads` add up at the same time, as in decoding. None where nobody meets: one device
    along `heads`.
    """
    devices = mesh.shape[HEADS]
    if devices == 1:
        return None
    many = _MANY_BYTES_ON_CPU if jax.default_backend() == "cpu" else _MANY_BYTES
    meeting, moving = _sum_seconds(mesh, _FEW_BYTES, _SUMS_OF_FEW), _sum_seconds(mesh, many, _SUMS_OF_MANY)
    return Link(meeting, _moved(many, devices) / max(moving - meeting, _LEAST_MOVING * moving))


def _sum_seconds(mesh: Mesh, nbytes: int, calls: int) -> float:
    """Seconds in which the devices along `heads` add up an array of so many bytes of each: a median."""

    def add(part: jax.Array) -> jax.Array:
        total = jax.lax.psum(part, HEADS)
        # Each sum needs the one before, and no two devices hold the same, or XLA would make fewer sums of them.
        return total.at[0, 0].set(jax.lax.axis_index(HEADS))

    def add_in_a_row(_: int, part: jax.Array) -> jax.Array:
        for _ in range(_SUMS_A_STEP):
            part = add(part)
        return part

    def add_often(parts: jax.Array) -> jax.Array:
        steps = calls // _SUMS_A_STEP
        return jax.lax.fori_loop(0, steps, add_in_a_row, parts)

    spec = PartitionSpec(HEADS)
    program = jax.jit(jax.shard_map(add_often, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    parts = jnp.zeros((mesh.shape[HEADS], nbytes // 4), jnp.float32, device=NamedSharding(mesh, spec))
    jax.block_until_ready(program(parts))
    measured = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(program(parts))
        measured.append((time.perf_counter() - began) / calls)
    return median_and_spread(measured)[0]


def measure_mesh(mesh: Mesh | AbstractMesh | None) -> DeviceProfile:
    """The profile of one device of a mesh, measured once; with how fast it meets the others, where they are here.

    Args:
        mesh: the devices; None is the one device of this process.
    """
    profile = measure_profile()
    link = measure_link(mesh) if isinstance(mesh, Mesh) else None
    if link is None:
        return profile
    return dataclasses.replace(profile, link_latency_s=link.latency_s, link_bandwidth=link.bandwidth)


def predict_mesh(scenario: Scenario, text: str, profile: DeviceProfile | None = None) -> dict[str, Any]:
    """What each device of a mesh, which need not be here, holds, and how long windows are predicted to take.

    Args:
        scenario: what is decoded.
        text: the mesh, such as data=2,heads=4.
        profile: of one device, see `measure_mesh`; an H100 with guessed links if None.

    Raises:
        UserError: the mesh cannot be read, or does not fit the target.
    """
    shape, profile = MeshShape.parse(text), profile or load_profile("gpu", bandwidth=H100_COPY)
    mesh, size = abstract_mesh(shape), scenario.itemsize
    splits = split_target(mesh, scenario.target), split_draft(mesh, scenario.draft, size)
    both = list(zip((scenario.target, scenario.draft), splits, strict=True))
    dtype = jnp.bfloat16 if size == 2 else jnp.float32
    shared = share(scenario, profile, shape, whole_draft=splits[1].heads is None)
    strategies: tuple[Strategy, ...] = (
        Autoregressive(), Speculative(window=scenario.window), SpecAttn(window=scenario.window),
    )  # fmt: skip
    seconds = {
        one.name: window_seconds(shared.scenario, one.cost(scenario), shared.profile).total for one in strategies
    }
    return {
        "devices": shape.devices,
        "whole_draft": splits[1].heads is None,
        "weight_bytes": sum(device_weight_bytes(config, dtype, split) for config, split in both),
        "cache_bytes": sum(
            device_cache_bytes(config, scenario.batch, scenario.context, size, split) for config, split in both
        ),
        "window_seconds": seconds,
        "tokens_per_second": {
            one.name: scenario.batch * one.cost(scenario).tokens / seconds[one.name] for one in strategies
        },
    }
