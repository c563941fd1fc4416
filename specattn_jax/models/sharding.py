"""Models on a mesh of devices: which meshes serve a model, and placing its weights, each device's part where it lies.

A mesh has two axes: `data` splits sequences, `heads` splits kv heads with their query heads, the MLP's width and the
vocabulary. Weights say their axes where they are made (`layers.py`), caches and plans in their annotations; the rule
table is `specattn_kernels.RULES`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh
from jaxtyping import DTypeLike
from specattn_kernels import Split

from specattn_jax.errors import UserError
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.transformer import LanguageModel, abstract_model

DATA, HEADS = "data", "heads"
# A collective between the devices of a host takes about as long as reading so many bytes of memory (10 us at 3 TB/s).
_BYTES_PER_COLLECTIVE = 30_000_000


class MeshShape(NamedTuple):
    """Devices along each axis of a mesh."""

    data: int = 1
    heads: int = 1

    def __str__(self) -> str:
        """As people write it."""
        return f"{DATA}={self.data},{HEADS}={self.heads}"

    @property
    def devices(self) -> int:
        """How many it takes."""
        return self.data * self.heads

    @classmethod
    def parse(cls, text: str) -> MeshShape:
        """What people write: `data=2,heads=4`; an axis that is not named has one device.

        Raises:
            UserError: that is not what they wrote.
        """
        parts = re.findall(rf"(?:^|,)\s*({DATA}|{HEADS})\s*=\s*([1-9]\d*)\s*(?=,|$)", text)
        sizes = {name: int(size) for name, size in parts}
        if not sizes or len(sizes) != len(text.split(",")):
            raise UserError(f"mesh is {text!r}; expected the devices along each axis, such as data=2,heads=4.")
        return cls(**sizes)


def make_mesh(shape: MeshShape | str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the first devices, of all processes.

    Args:
        shape: how many along each axis.
        devices: which; all that JAX sees by default.

    Raises:
        UserError: there are fewer, or what the shape says cannot be read.
    """
    shape = MeshShape.parse(shape) if isinstance(shape, str) else shape
    found = jax.devices() if devices is None else list(devices)
    if shape.devices > len(found):
        raise UserError(
            f"mesh is {shape}, which takes {shape.devices} devices, but {len(found)} are here; expected a mesh of at "
            f"most {len(found)}."
        )
    grid = np.array(found[: shape.devices]).reshape(shape)
    return Mesh(grid, (DATA, HEADS), axis_types=(AxisType.Auto, AxisType.Auto))


def abstract_mesh(shape: MeshShape) -> AbstractMesh:
    """A mesh of devices that need not be here, to ask about shapes."""
    return AbstractMesh(tuple(shape), (DATA, HEADS), axis_types=(AxisType.Auto, AxisType.Auto))


def split_target(mesh: Mesh | AbstractMesh, config: ModelConfig, name: str = "the target") -> Split:
    """How a target is split: sequences over `data`, heads over `heads`.

    Raises:
        UserError: its kv heads cannot be shared evenly.
    """
    heads, parts = config.num_kv_heads, mesh.shape[HEADS]
    if heads % parts:
        fine = [str(count) for count in range(1, heads + 1) if heads % count == 0]
        raise UserError(
            f"mesh: heads is {parts}, but {name} has {heads} kv heads, which {parts} devices cannot share evenly; "
            f"expected heads to be {' or '.join(fine)}."
        )
    return Split(mesh, DATA, HEADS)


def split_draft(mesh: Mesh | AbstractMesh, config: ModelConfig, itemsize: int) -> Split:
    """How a draft is split: like the target where that pays, else every device has all of its heads.

    A draft of which every device has all never waits for another; split, each step takes two collectives a layer, and
    its scores, of which every target head needs all, are gathered once a window. That pays for weights that take
    longer to read than the devices to meet.

    Args:
        mesh: the devices.
        config: the draft's shape.
        itemsize: bytes of a weight.
    """
    parts = mesh.shape[HEADS]
    spared = config.parameter_count() * itemsize * (1 - 1 / parts)
    pays = spared > (2 * config.num_layers + 1) * _BYTES_PER_COLLECTIVE
    return Split(mesh, DATA, HEADS if pays and config.num_kv_heads % parts == 0 else None)


def target_split(split: Split | None) -> Split | None:
    """How the target is split, on the mesh of its draft."""
    return None if split is None else dataclasses.replace(split, heads=HEADS)


def replicated(split: Split | None) -> Split | None:
    """The same, with all heads on every device."""
    return None if split is None else dataclasses.replace(split, heads=None)


def weight_shardings(model: LanguageModel, split: Split) -> nnx.State[Any, Any]:
    """Where each weight lies, in the structure of `model.params`: whole along an axis that does not divide evenly."""

    def place(weight: nnx.Variable[Any]) -> Any:
        sharding = split.sharding(weight.axes, weight.get_value().shape)
        return jax.tree.map(lambda _: sharding, weight)

    # Only there are the axes of weights.
    axes = abstract_model(model.config, model.dtype).params
    placed: nnx.State[Any, Any] = jax.tree.map(place, axes, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return placed


def place(model: LanguageModel, split: Split | None) -> LanguageModel:
    """The model with its weights split; the same model for None."""
    if split is None:
        return model
    params = jax.tree.map(jax.device_put, model.params, weight_shardings(model, split))
    return dataclasses.replace(model, params=params, split=split)


def mesh_shape(split: Split) -> MeshShape:
    """How many devices share the work along each axis."""
    return MeshShape(*(split.mesh.shape[name] for name in (DATA, HEADS)))


def describe_split(target: LanguageModel, draft: LanguageModel | None) -> str:
    """How a pair shares the work, in a sentence."""
    if target.split is None:
        return "One device does everything."
    sizes = mesh_shape(target.split)
    said = f"The mesh is {sizes}: each device has {target.config.num_kv_heads // sizes.heads} kv heads of the target"
    if draft is None or draft.split is None:
        return f"{said}."
    if draft.split.heads is None:
        return f"{said} and all of the draft, which so waits for nobody."
    heads = draft.config.num_kv_heads // sizes.heads
    return f"{said} and {heads} of the draft, whose scores are gathered once a window."


def describe_mesh(text: str, config: ModelConfig, context: int, dtype: DTypeLike, name: str) -> dict[str, Any]:
    """What each device of a mesh, which need not be here, holds of a model and of a full cache for each of `data`.

    Raises:
        UserError: the mesh cannot be read, or does not fit the model.
    """
    shape = MeshShape.parse(text)
    split = split_target(abstract_mesh(shape), config, name)
    itemsize = np.dtype(dtype).itemsize
    return {
        **shape._asdict(),
        "devices": shape.devices,
        "sequences": shape.data,
        "weight_bytes": device_weight_bytes(config, dtype, split),
        "cache_bytes": device_cache_bytes(config, shape.data, context, itemsize, split),
    }


def device_weight_bytes(config: ModelConfig, dtype: DTypeLike, split: Split | None) -> int:
    """Bytes that each device holds of a model's weights."""
    empty = abstract_model(config, dtype)
    if split is None:
        return empty.nbytes
    parts = jax.tree.map(
        lambda leaf, lies: math.prod(lies.shard_shape(leaf.shape)), empty.params, weight_shardings(empty, split)
    )
    return sum(jax.tree.leaves(parts)) * empty.dtype.itemsize


def device_cache_bytes(config: ModelConfig, batch: int, slots: int, itemsize: int, split: Split | None) -> int:
    """Bytes that each device holds of a cache."""
    whole = config.cache_bytes(batch, slots, itemsize)
    if split is None:
        return whole
    fits = split.fitting(B=batch, K=config.num_kv_heads)
    return whole // (fits.parts("B") * fits.parts("K"))


def device_bytes(tree: Any) -> int:
    """Bytes that the fullest device holds of the arrays of a tree."""

    def held(array: jax.Array) -> int:
        return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize

    return sum(held(leaf) for leaf in jax.tree.leaves(tree))


def fetch(tree: Any) -> Any:
    """Arrays on the host, with the parts that other processes hold; every process has to ask at the same point."""
    if all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    from jax.experimental.multihost_utils import process_allgather

    return process_allgather(tree, tiled=True)


def placer(config: ModelConfig, split: Split | None) -> Callable[[tuple[Any, ...], Any], jax.Array]:
    """What puts a weight, by its path in the parameters, where it belongs: on the default device without a split."""
    if split is None:
        return lambda _, weight: jax.device_put(weight)
    empty = abstract_model(config, np.float32)
    shardings = dict(jax.tree_util.tree_leaves_with_path(weight_shardings(empty, split)))
    return lambda path, weight: jax.device_put(weight, shardings[path])
