"""What a mesh of devices decodes in which time: each device's part of the bytes, and what they wait for each other.

A device of a mesh reads its part of the weights and caches as a single one reads all of a smaller pair, so that the
predictions for one device serve; meeting the others is a fixed time of each layer. Nothing of this was fitted to a
measurement yet: the constants of `link_` in configs/devices.toml are guesses.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from specattn_jax.decoding.autoregressive import Autoregressive
from specattn_jax.decoding.protocol import Strategy
from specattn_jax.decoding.speculative import SpecAttn, Speculative
from specattn_jax.decoding.work import Scenario
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.sharding import (
    MeshShape,
    abstract_mesh,
    device_cache_bytes,
    device_weight_bytes,
    split_draft,
    split_target,
)
from specattn_jax.planning.device import DeviceProfile, load_profile, window_seconds

# What the H100 of scripts/results/decode-nvidia-h100 copies in a second.
H100_COPY = 2.46e12
_SCORE_BYTES = 2


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
    target, draft, batch = scenario.target, scenario.draft, math.ceil(scenario.batch / mesh.data)
    parts, drafting = mesh.heads, 1 if whole_draft else mesh.heads

    def meeting(config: ModelConfig, tokens: int, devices: int) -> float:
        """Seconds of a layer's two sums over devices."""
        return 2 * _collective(batch * tokens * config.embed_dim * scenario.itemsize, devices, profile)

    # Every device gets the scores of the others once a window.
    scores = batch * scenario.context * draft.num_layers * draft.num_kv_heads * _SCORE_BYTES
    waiting = dataclasses.replace(
        profile,
        target_layer_s=profile.target_layer_s + meeting(target, scenario.window + 1, parts),
        draft_layer_s=profile.draft_layer_s + meeting(draft, 2, drafting),
        # The embedding, and the largest logit.
        forward_s=profile.forward_s + 2 * _collective(0, max(parts, drafting), profile),
        window_s=profile.window_s + _collective(scores / 2, drafting, profile),
    )
    mine = scenario._replace(target=_part(target, parts), draft=_part(draft, drafting), batch=batch)
    return Shared(mine, waiting)


def _part(config: ModelConfig, parts: int) -> ModelConfig:
    """A model with one device's share of heads, MLP and vocabulary."""
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // parts,
        num_kv_heads=config.num_kv_heads // parts,
        mlp_dim=math.ceil(config.mlp_dim / parts),
        vocab_size=math.ceil(config.vocab_size / parts),
    )


def _collective(nbytes: float, devices: int, profile: DeviceProfile) -> float:
    """Seconds in which devices add up arrays of so many bytes; half of them where parts are gathered."""
    if devices == 1:
        return 0.0
    moved = 2 * nbytes * (devices - 1) / devices
    return profile.link_latency_s + moved / profile.link_bandwidth


def predict_mesh(scenario: Scenario, text: str, profile: DeviceProfile | None = None) -> dict[str, Any]:
    """What each device of a mesh holds, and how long windows are predicted to take; nothing is measured.

    Args:
        scenario: what is decoded.
        text: the mesh, such as data=2,heads=4.
        profile: of one device; an H100 if None.

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
