"""Which of the devices of this process share the work where nobody says it: the mesh that is predicted to end first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from specattn_jax.decoding.autoregressive import Autoregressive
from specattn_jax.decoding.protocol import Strategy
from specattn_jax.decoding.speculative import SpecAttn, Speculative
from specattn_jax.decoding.work import Scenario
from specattn_jax.loading.memory import available_bytes
from specattn_jax.loading.pair import NO_DRAFT, choose_dtype
from specattn_jax.loading.resolve import draft_reference, resolve
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.sharding import MeshShape, abstract_mesh, make_mesh, split_draft
from specattn_jax.planning.device import DeviceProfile, prefill_seconds, seconds_per_token
from specattn_jax.planning.mesh import Shared, collective_seconds, measure_mesh, share

# Another device has to gain so much: predictions are no better.
_LEAST_GAIN = 1.05


class Wanted(NamedTuple):
    """What a mesh is chosen for.

    Attributes:
        batch: sequences at a time.
        tokens: of each prompt, about.
        new_tokens: of each answer, at most.
    """

    batch: int
    tokens: int
    new_tokens: int


def default_mesh(
    target: str, draft: str, dtype: str, wanted: Wanted, devices: Sequence[jax.Device] | None = None
) -> str | None:
    """The mesh that is taken where nobody says one; None is one device.

    Args:
        target: as for `load_pair`.
        draft: likewise.
        dtype: likewise.
        wanted: for what.
        devices: which may be taken; by default those of the only process, unless they are parts of one CPU.

    Raises:
        UserError: a reference cannot be resolved.
    """
    if devices is None:
        devices = [] if jax.default_backend() == "cpu" or jax.process_count() > 1 else jax.local_devices()
    if len(devices) < 2:
        return None
    config = resolve(target).config
    drafting = None if draft == NO_DRAFT else resolve(draft_reference(draft, target)).config
    itemsize = choose_dtype(dtype).itemsize
    most = max(shape.heads for shape in _shapes(config, len(devices), wanted.batch))
    profile = measure_mesh(make_mesh(MeshShape(heads=most), devices))
    chosen = choose_mesh(config, drafting, wanted, len(devices), profile, itemsize=itemsize, room=available_bytes())
    return None if chosen.devices == 1 else str(chosen)


def choose_mesh(
    target: ModelConfig,
    draft: ModelConfig | None,
    wanted: Wanted,
    devices: int,
    profile: DeviceProfile,
    *,
    itemsize: int = 2,
    room: float | None = None,
) -> MeshShape:
    """The mesh of at most so many devices on which a request is predicted to end first.

    Fewer devices are preferred where more gain next to nothing. Where none has room for its part, the mesh whose
    devices hold least.

    Args:
        target: shape of the target.
        draft: shape of the draft; None without one.
        wanted: what is decoded.
        devices: how many are here.
        profile: of one device, with how fast it meets the others.
        itemsize: bytes of a weight and of a cache number.
        room: bytes that a device has; None where nobody knows.
    """
    context = wanted.tokens + wanted.new_tokens // 2
    scenario = Scenario(target, draft or target, wanted.batch, context, itemsize=itemsize)
    shapes = sorted(_shapes(target, devices, wanted.batch), key=lambda shape: (shape.devices, shape.heads))
    whole = {shape: split_draft(abstract_mesh(shape), scenario.draft, itemsize).heads is None for shape in shapes}
    shared = {shape: share(scenario, profile, shape, whole_draft=whole[shape]) for shape in shapes}
    drafts = draft is not None
    held = {shape: _held_bytes(shared[shape].scenario, wanted, drafts) for shape in shapes}
    fitting = [shape for shape in shapes if room is None or held[shape] <= room]
    if not fitting:
        return min(shapes, key=held.__getitem__)
    best, fastest = fitting[0], float("inf")
    for shape in fitting:
        meeting = shape.heads, 1 if whole[shape] else shape.heads
        seconds = _request_seconds(scenario, shared[shape], wanted, drafts, meeting, profile)
        if seconds * _LEAST_GAIN < fastest:
            best, fastest = shape, seconds
    return best


def _request_seconds(
    scenario: Scenario, shared: Shared, wanted: Wanted, drafts: bool, meeting: tuple[int, int], profile: DeviceProfile
) -> float:
    """Predicted seconds of a whole request on a mesh, in the mode that is the fastest there.

    Args:
        scenario: what all devices decode.
        shared: one device's part of it.
        wanted: the request.
        drafts: whether there is a draft.
        meeting: how many devices meet in a layer of the target, and of the draft.
        profile: of one device alone.
    """
    mine, waiting = shared
    strategies: tuple[Strategy, ...] = (Autoregressive(),)
    if drafts:
        strategies += (Speculative(window=scenario.window), SpecAttn(window=scenario.window))

    def reading(config: ModelConfig, part: ModelConfig, parts: int) -> float:
        nbytes = mine.batch * wanted.tokens * config.embed_dim * scenario.itemsize
        sums = 2 * config.num_layers * collective_seconds(nbytes, parts, profile)
        return prefill_seconds(part, mine.batch, wanted.tokens, profile) + sums

    alone = reading(scenario.target, mine.target, meeting[0])
    drafted = alone + reading(scenario.draft, mine.draft, meeting[1])
    return min(
        (drafted if one.needs_draft else alone)
        + wanted.new_tokens * seconds_per_token(mine, one.cost(scenario), waiting)
        for one in strategies
    )


def _shapes(target: ModelConfig, devices: int, batch: int) -> Iterator[MeshShape]:
    """Meshes of at most so many devices that share heads and sequences evenly."""
    for heads in range(1, devices + 1):
        for data in range(1, devices // heads + 1):
            if target.num_kv_heads % heads == 0 and batch % data == 0:
                yield MeshShape(data, heads)


def _held_bytes(mine: Scenario, wanted: Wanted, drafts: bool) -> float:
    """Bytes of weights and caches that one device of a mesh holds: of the target, and of the draft if there is one."""
    slots = wanted.tokens + wanted.new_tokens
    return sum(
        config.parameter_count() * mine.itemsize + config.cache_bytes(mine.batch, slots, mine.itemsize)
        for config in (mine.target, mine.draft)[: 1 + drafts]
    )
