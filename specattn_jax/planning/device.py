"""How long a window takes: the bytes of `cost.py` and the arithmetic over what a device does, and what is fixed."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from importlib import resources
from typing import NamedTuple

import jax
import jax.numpy as jnp

from specattn_jax.decoding.work import Scenario, Work
from specattn_jax.errors import UserError
from specattn_jax.models.cache import Reach
from specattn_jax.models.config import ModelConfig
from specattn_jax.planning.cost import (
    planning_bytes,
    prefill_arithmetic,
    scored_bytes,
    scoring_bytes,
    weights_read,
)
from specattn_jax.timing import TimingSettings, copy_bandwidth, time_calls

_MIB = 2**20
# Arrays copied to measure the bandwidth, and bytes between two uses of one: a CPU copies slowly, a GPU caches much.
_COPIED = {"cpu": (16 * _MIB, 32 * _MIB)}
_COPIED_ELSEWHERE = (64 * _MIB, 128 * _MIB)
_QUICK = TimingSettings(seconds=0.02, repeats=3)
# Tokens and width of the product by which a rate of arithmetic is measured: about what a window of a batch of one does.
_PRODUCT_TOKENS, _PRODUCT_WIDTH = 8, 1024


@dataclasses.dataclass(frozen=True)
class DeviceProfile:
    """What a device does in a second, and what it spends on every call. Guesses and fits: `configs/devices.toml`.

    Attributes:
        bandwidth: bytes that a copy reads and writes per second; measured where decoding runs.
        flops: arithmetic per second in products of a few tokens with weights.
        weights_share: share of the bandwidth at which products read weights.
        attention_share: likewise, at which dense attention reads a cache.
        attention_flops_share: share of `flops` that attention reaches.
        sparse_share: as `attention_share`, sparse attention what it reads.
        selection_share: likewise, at which scores are written, mixed and selected from.
        layer_s: fixed seconds of a layer in one pass: what its kernels wait for, not what they move.
        selecting_layer_s: fixed seconds of a window for each layer of the draft that is scored, and for each layer of
            the target for which is selected.
        forward_s: fixed seconds of a pass besides its layers: embedding, vocabulary, choosing a token.
        window_s: fixed seconds of a window besides its passes: acceptance, rollback, the loop.
        compile_s: seconds that a program takes that was never compiled before.
        prefill_share: share of `flops` at which the weights meet the many tokens of a prompt; may be above 1.
        prefill_attention_share: likewise, at which the tokens of a prompt attend to each other.
        prefill_layer_s: fixed seconds of a layer in a prefill.
        link_bandwidth: bytes per second that a device sends to the others of its mesh.
        link_latency_s: seconds of a collective that moves hardly anything.
        target_meeting_s: seconds in which a layer of the target meets those of other devices in one pass; 0 alone.
        draft_meeting_s: likewise, of the draft.
    """

    bandwidth: float
    flops: float
    weights_share: float = 1.0
    attention_share: float = 1.0
    attention_flops_share: float = 1.0
    sparse_share: float = 1.0
    selection_share: float = 1.0
    layer_s: float = 0.0
    selecting_layer_s: float = 0.0
    forward_s: float = 0.0
    window_s: float = 0.0
    compile_s: float = 0.0
    prefill_share: float = 1.0
    prefill_attention_share: float = 1.0
    prefill_layer_s: float = 0.0
    link_bandwidth: float = 1e11
    link_latency_s: float = 1e-5
    target_meeting_s: float = 0.0
    draft_meeting_s: float = 0.0


class WindowSeconds(NamedTuple):
    """Where the time of one window goes.

    Attributes:
        draft: the steps that propose tokens, with the scores, and the choice of what they read.
        selection: choosing what the target reads.
        verify: the target's pass.
        rest: what is neither.
    """

    draft: float
    selection: float
    verify: float
    rest: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


def window_seconds(scenario: Scenario, work: Work, profile: DeviceProfile) -> WindowSeconds:
    """Predicts one window: each part takes as long as its bytes or its arithmetic, whichever is more.

    Args:
        scenario: what is decoded; `accepted` does not matter.
        work: what a window consists of.
        profile: on what.

    Raises:
        UserError: a number of the scenario means nothing.
    """
    scenario.check()
    target, draft = scenario.target, scenario.draft

    def weights(nbytes: float, config: ModelConfig, tokens: int) -> float:
        arithmetic = 2 * weights_read(config) * scenario.batch * tokens
        return max(nbytes / (profile.bandwidth * profile.weights_share), arithmetic / profile.flops)

    def attention(nbytes: float, config: ModelConfig, tokens: float, share: float) -> float:
        # Two products of a query with each entry; an entry is a key and a value of every kv head.
        arithmetic = 2 * nbytes / scenario.itemsize * config.group_size * tokens
        return max(nbytes / (profile.bandwidth * share), arithmetic / (profile.flops * profile.attention_flops_share))

    def rate(reads: float) -> float:
        return profile.sparse_share if reads < 1 else profile.attention_share

    def one_pass(config: ModelConfig, tokens: int, reads: float, meeting_s: float) -> float:
        nbytes = weights_read(config) * scenario.itemsize
        cache = reads * config.cache_bytes(scenario.batch, scenario.context, scenario.itemsize)
        moving = weights(nbytes, config, tokens) + attention(cache, config, tokens, rate(reads))
        return profile.forward_s + moving + config.num_layers * (profile.layer_s + meeting_s)

    def choosing(config: ModelConfig, tokens: float, share: float) -> float:
        scored = attention(scored_bytes(scenario, config), config, tokens, profile.attention_share)
        return scored + scoring_bytes(scenario, config, share) / written + config.num_layers * profile.selecting_layer_s

    verify = one_pass(target, work.verified, work.target_reads, profile.target_meeting_s)
    if work.verified == 1:
        return WindowSeconds(0.0, 0.0, verify, 0.0)
    # Every step of a draft reads two tokens, the second-last one again.
    drafting = work.steps * one_pass(draft, 2, work.draft_reads, profile.draft_meeting_s)
    drafting += work.own_steps * one_pass(target, work.own_tokens, work.own_reads, profile.target_meeting_s)
    selecting, written = 0.0, profile.bandwidth * profile.selection_share
    if work.scores:
        drafting += choosing(draft, work.steps, work.draft_reads)
    if work.own_steps:
        drafting += work.own_scores * choosing(target, work.verified, work.own_reads)
    if work.plans:
        selecting = planning_bytes(scenario) / written + target.num_layers * profile.selecting_layer_s
    return WindowSeconds(drafting, selecting, verify, profile.window_s)


def prefill_seconds(
    config: ModelConfig, batch: int, tokens: int, profile: DeviceProfile, reach: Reach | None = None
) -> float:
    """Predicts the prefill of one model: the arithmetic of its layers and of causal attention, over a device's rates.

    Args:
        config: shape of the model.
        batch: sequences.
        tokens: of each prompt.
        profile: on what.
        reach: how far back the tokens see; None is everything.
    """
    products, attention = prefill_arithmetic(config, batch, tokens, reach)
    return (
        products / (profile.flops * profile.prefill_share)
        + attention / (profile.flops * profile.prefill_attention_share)
        + config.num_layers * profile.prefill_layer_s
    )


def seconds_per_token(scenario: Scenario, work: Work, profile: DeviceProfile) -> float:
    """Predicted time in which every sequence of the batch gets one more token."""
    return window_seconds(scenario, work, profile).total / work.tokens


def load_profile(kind: str, *, bandwidth: float, flops: float | None = None) -> DeviceProfile:
    """The constants of a kind of device, with what was measured of this one.

    Args:
        kind: `cpu`, `gpu` or `tpu`.
        bandwidth: bytes per second of a copy.
        flops: arithmetic per second, in place of the constant.

    Raises:
        UserError: there are no constants for the kind.
    """
    kinds = _kinds()
    if kind not in kinds:
        raise UserError(f"device is {kind!r}; expected one of {', '.join(kinds)}.")
    measured = {} if flops is None else {"flops": flops}
    return DeviceProfile(bandwidth=bandwidth, **{**kinds[kind], **measured})


def device_kind(platform: str) -> str:
    """The kind of device whose constants are taken on a platform of JAX."""
    return platform if platform in _kinds() else "gpu"


@functools.cache
def measure_profile() -> DeviceProfile:
    """The profile of the device of this process, measured once: about a second on a CPU, less on a GPU."""
    backend = jax.default_backend()
    kind = device_kind(backend)
    copied, rotate = _COPIED.get(backend, _COPIED_ELSEWHERE)
    bandwidth = copy_bandwidth(_QUICK._replace(rotate=rotate), copied)
    return load_profile(kind, bandwidth=bandwidth, flops=None if _kinds()[kind]["flops"] else _product_flops())


def _product_flops() -> float:
    """Arithmetic per second in the product of a few tokens with weights that no cache holds."""
    tokens, width = _PRODUCT_TOKENS, _PRODUCT_WIDTH
    dtype = jnp.float32

    def make(seed: int) -> tuple[jax.Array, jax.Array]:
        return jnp.full((tokens, width), seed, dtype), jnp.full((width, 4 * width), 1.0, dtype)

    nbytes = 4 * width * width * 4
    timed = time_calls(jnp.matmul, make, nbytes, _QUICK._replace(rotate=32 * _MIB))
    return 2.0 * tokens * width * 4 * width / timed.seconds


@functools.cache
def _kinds() -> dict[str, dict[str, float]]:
    return tomllib.loads(resources.files("specattn_configs").joinpath("devices.toml").read_text(encoding="utf-8"))
