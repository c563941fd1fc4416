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
from specattn_jax.planning.device import DeviceProfile, prefill_seconds, window_seconds
from specattn_jax.planning.mesh import collective_seconds, measure_mesh, share, share_of

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
    shapes = sorted(_shapes(target, devices, wanted.batch), key=lambda shape: (shape.devices, shape.heads))
    held = {shape: _held_bytes(target, draft, wanted, shape, itemsize) for shape in shapes}
    fitting = [shape for shape in shapes if room is None or held[shape] <= room]
    if not fitting:
        return min(shapes, key=held.__getitem__)
    best, fastest = fitting[0], float("inf")
    for shape in fitting:
        seconds = request_seconds(target, draft, wanted, shape, profile, itemsize=itemsize)
        if seconds * _LEAST_GAIN < fastest:
            best, fastest = shape, seconds
    return best


def request_seconds(
    target: ModelConfig,
    draft: ModelConfig | None,
    wanted: Wanted,
    shape: MeshShape,
    profile: DeviceProfile,
    *,
    itemsize: int = 2,
) -> float:
    """Predicted seconds of a whole request on a mesh, in the mode that is the fastest there."""
    scenario = Scenario(
        target, draft or target, wanted.batch, wanted.tokens + wanted.new_tokens // 2, itemsize=itemsize
    )
    whole = draft is not None and _draft_is_whole(draft, shape, itemsize)
    mine, waiting = share(scenario, profile, shape, whole_draft=whole)
    strategies: tuple[Strategy, ...] = (Autoregressive(),)
    if draft is not None:
        strategies += (Speculative(window=scenario.window), SpecAttn(window=scenario.window))

    def reading(config: ModelConfig, part: ModelConfig, parts: int) -> float:
        nbytes = mine.batch * wanted.tokens * config.embed_dim * itemsize
        meeting = 2 * config.num_layers * collective_seconds(nbytes, parts, profile)
        return prefill_seconds(part, mine.batch, wanted.tokens, profile) + meeting

    alone = reading(target, mine.target, shape.heads)
    drafted = alone if draft is None else alone + reading(draft, mine.draft, 1 if whole else shape.heads)
    return min(
        (drafted if one.needs_draft else alone)
        + wanted.new_tokens * window_seconds(mine, one.cost(scenario), waiting).total / one.cost(scenario).tokens
        for one in strategies
    )


def _shapes(target: ModelConfig, devices: int, batch: int) -> Iterator[MeshShape]:
    """Meshes of at most so many devices that share heads and sequences evenly."""
    for heads in range(1, devices + 1):
        for data in range(1, devices // heads + 1):
            if target.num_kv_heads % heads == 0 and batch % data == 0:
                yield MeshShape(data, heads)


def _held_bytes(
    target: ModelConfig, draft: ModelConfig | None, wanted: Wanted, shape: MeshShape, itemsize: int
) -> float:
    """Bytes of weights and caches that one device of a mesh holds."""
    mine = share_of(
        Scenario(target, draft or target, wanted.batch),
        shape,
        whole_draft=draft is not None and _draft_is_whole(draft, shape, itemsize),
    )
    slots = wanted.tokens + wanted.new_tokens
    return sum(
        config.parameter_count() * itemsize + config.cache_bytes(mine.batch, slots, itemsize)
        for config in (mine.target, *(() if draft is None else (mine.draft,)))
    )


def _draft_is_whole(draft: ModelConfig, shape: MeshShape, itemsize: int) -> bool:
    """Whether each device has all of the draft."""
    return split_draft(abstract_mesh(shape), draft, itemsize).heads is None
