"""Random models, caches and states for the decode benchmark, made on the device and never copied."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array, PRNGKeyArray
from specattn_kernels import Implementation, Split, lay

from specattn_jax.bench.decode_cases import DecodeCase, shape
from specattn_jax.bench.decode_methods import BEST, ImposedAcceptance, Method
from specattn_jax.decoding.protocol import Models, Strategy
from specattn_jax.decoding.state import DecodeState, begin
from specattn_jax.loading.memory import check_memory
from specattn_jax.models.cache import KVCache
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.sharding import (
    device_bytes,
    device_cache_bytes,
    device_weight_bytes,
    make_mesh,
    split_draft,
    split_target,
    weight_shardings,
)
from specattn_jax.models.transformer import LanguageModel, abstract_model
from specattn_jax.planning.mesh import measure_link
from specattn_jax.runtime.session import Session
from specattn_jax.selection.alignment import Alignment, NucleusMass
from specattn_jax.selection.make import make_selection
from specattn_jax.selection.protocol import Selection
from specattn_jax.selection.reads import ReadEverything

# Standard deviation of all matrices, that of the published models when they were new.
_WEIGHT_SCALE = 0.02
# How unequal the weights of a random mixture are: a calibrated row has a few large ones too.
_MIXTURE_SCALE = 2.0
_NO_LIMIT = 2**30


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "lies"))
def _normal(
    key: PRNGKeyArray, scale: float, *, shape: tuple[int, ...], dtype: str, lies: Sharding | None = None
) -> Array:
    """Normal numbers; with the conversion inside, nothing wider than `dtype` outlives the call."""
    made = (scale * jax.random.normal(key, shape, jnp.dtype(dtype))).astype(dtype)
    return made if lies is None else jax.lax.with_sharding_constraint(made, lies)


def random_model(config: ModelConfig, key: PRNGKeyArray, dtype: str, split: Split | None = None) -> LanguageModel:
    """A model with random weights, leaf by leaf, so that it takes little more than its own memory."""
    empty = abstract_model(config, jnp.dtype(dtype))
    leaves, structure = jax.tree.flatten(empty.params)
    lies = [None] * len(leaves) if split is None else jax.tree.leaves(weight_shardings(empty, split))
    made = [
        _normal(jax.random.fold_in(key, index), _WEIGHT_SCALE, shape=leaf.shape, dtype=dtype, lies=lies[index])
        if leaf.ndim > 1
        else jnp.ones(leaf.shape, dtype, device=lies[index])
        for index, leaf in enumerate(leaves)
    ]
    return dataclasses.replace(empty, params=jax.tree.unflatten(structure, made), split=split)


def case_splits(case: DecodeCase) -> tuple[Split | None, Split | None]:
    """How target and draft of a case are split over its mesh.

    Raises:
        UserError: the mesh does not fit the target or this machine.
    """
    if not case.mesh:
        return None, None
    mesh, itemsize = make_mesh(case.mesh), jnp.dtype(case.dtype).itemsize
    return split_target(mesh, shape(case.target)), split_draft(mesh, shape(case.draft), itemsize)


def random_models(case: DecodeCase) -> Models:
    """The models of a case, on its mesh.

    Raises:
        UserError: the mesh does not fit the target or this machine.
    """
    configs = shape(case.target), shape(case.draft)
    keys = jax.random.split(jax.random.key(1))
    made = zip(configs, keys, case_splits(case), strict=True)
    return Models(*(random_model(config, key, case.dtype, split) for config, key, split in made))


def link_facts(meshes: Sequence[str]) -> dict[str, dict[str, float] | None]:
    """How fast the devices of each mesh meet, measured; None where they do not.

    Raises:
        UserError: there are fewer devices than a mesh takes.
    """
    links = {mesh: measure_link(make_mesh(mesh)) for mesh in meshes}
    return {mesh: None if link is None else link._asdict() for mesh, link in links.items()}


def peak_bytes() -> int | None:
    """The most that any device of this process has held so far; None where nobody counts."""
    counts = [device.memory_stats() for device in jax.local_devices()]
    return max((count["peak_bytes_in_use"] for count in counts if count and "peak_bytes_in_use" in count), default=None)


def random_cache(
    config: ModelConfig, batch: int, slots: int, key: PRNGKeyArray, dtype: str, split: Split | None = None
) -> KVCache:
    """A cache that looks full of tokens, layer by layer."""
    size = (batch, config.num_kv_heads, slots, config.head_dim)
    split = None if split is None else split.fitting(B=batch, K=config.num_kv_heads)
    lies = None if split is None else split.sharding("B K S H")
    make = functools.partial(_normal, scale=1.0, shape=size, dtype=dtype, lies=lies)
    arrays = [make(jax.random.fold_in(key, n)) for n in range(2 * config.num_layers)]
    lengths = lay(split, jnp.zeros((batch,), jnp.int32), "B")
    return KVCache(tuple(arrays[::2]), tuple(arrays[1::2]), lengths, split=split)


def random_alignment(target: ModelConfig, draft: ModelConfig) -> Alignment:
    """A mixture as uneven as a calibrated one: random rows on the simplex, and layers mapped in order."""
    rows, sources = target.num_layers * target.num_kv_heads, draft.num_layers * draft.num_kv_heads
    logits = _MIXTURE_SCALE * jax.random.normal(jax.random.key(7), (rows, sources))
    return Alignment(
        weights=jax.nn.softmax(logits, axis=-1),
        savings=jnp.asarray([0.5, 0.9], jnp.float32),
        left_out=jnp.tile(jnp.asarray([[0.1], [0.5]], jnp.float32), (1, target.num_layers)),
        length_knots=jnp.asarray([64.0], jnp.float32),
        length_scale=jnp.ones((2, 1), jnp.float32),
        layer_map=tuple(index * draft.num_layers // target.num_layers for index in range(target.num_layers)),
        granularity="kv_head",
    )


class Workload:
    """Models and caches of one case; each state borrows the caches and gives them back.

    A second pair of caches would not fit beside the first, so that there is one, donated from call to call.

    Attributes:
        case: what is decoded.
        session: the models.
        cache_bytes: what each device holds of the caches.
        weight_bytes: likewise, of the weights.
    """

    def __init__(self, case: DecodeCase, models: Models | None = None) -> None:
        """Makes caches, and models where none are given.

        Args:
            case: what is decoded.
            models: those of the case, see `models_for`.

        Raises:
            UserError: a device has not enough memory, or the mesh does not fit the target or this machine.
        """
        self.case = case
        configs, splits = (shape(case.target), shape(case.draft)), case_splits(case)
        both, dtype = list(zip(configs, splits, strict=True)), jnp.dtype(case.dtype)
        self.cache_bytes = sum(
            device_cache_bytes(config, case.batch, case.slots, dtype.itemsize, split) for config, split in both
        )
        self.weight_bytes = sum(device_weight_bytes(config, dtype, split) for config, split in both)
        check_memory({"weights": 0 if models else self.weight_bytes, "caches": self.cache_bytes})
        self.session = Session(random_models(case) if models is None else models)
        keys = jax.random.split(jax.random.key(2))
        self._target_cache, self._draft_cache = (
            random_cache(config, case.batch, case.slots, key, case.dtype, split)
            for (config, split), key in zip(both, keys, strict=True)
        )
        jax.block_until_ready((self._target_cache, self._draft_cache))

    def models_for(self, case: DecodeCase) -> Models | None:
        """The models of this workload if they are those of another case too."""
        mine = self.case
        same = (mine.target, mine.draft, mine.dtype, mine.mesh) == (case.target, case.draft, case.dtype, case.mesh)
        return self.session.models if same else None

    @property
    def layer_cache_bytes(self) -> int:
        """Bytes that a device holds of the smallest array of the caches."""
        return min(device_bytes(cache.k[0]) for cache in (self._target_cache, self._draft_cache))

    def start(self, strategy: Strategy, implementation: Implementation | None) -> DecodeState:
        """A started state at the case's context, with the caches; `give_back` a state before the next."""
        state = _begin(
            dataclasses.replace(self._target_cache, implementation=implementation),
            dataclasses.replace(self._draft_cache, implementation=implementation) if strategy.needs_draft else None,
            jnp.int32(self.case.context),
            room=self.case.room + strategy.window + 1,
        )
        return self.session.start(strategy, state)

    def give_back(self, state: DecodeState) -> None:
        """Takes back the caches of a state."""
        self._target_cache = state.target_cache
        if state.draft_cache is not None:
            self._draft_cache = state.draft_cache


@functools.partial(jax.jit, static_argnames=("room",), donate_argnames=("target_cache", "draft_cache"))
def _begin(target_cache: KVCache, draft_cache: KVCache | None, context: Array, *, room: int) -> DecodeState:
    """A state whose caches hold so many entries, and which goes on for ever."""
    batch = target_cache.lengths.shape[0]
    return begin(
        target_cache.at(jnp.full((batch,), context)),
        None if draft_cache is None else draft_cache.at(jnp.full((batch,), context - 1)),
        jnp.tile(jnp.arange(1, 3, dtype=jnp.int32), (batch, 1)),
        jnp.full((batch,), _NO_LIMIT, jnp.int32),
        jax.random.split(jax.random.key(3), batch),
        room=room,
    )


def backend_of(method: Method) -> Implementation | None:
    """The backend of a method's ops: interpreted kernels tell nothing, so that the library chooses but on a GPU."""
    if method.implementation != BEST:
        return method.implementation  # type: ignore[return-value]
    return "pallas_triton" if jax.default_backend() == "gpu" else None


def bench_strategy(workload: Workload, method: Method, p: float) -> Strategy:
    """A method's strategy for a case, at the nucleus mass p, with the acceptance of the case."""
    case, models = workload.case, workload.session.models
    selection: Selection = ReadEverything()
    if method.policy is not None:
        assert models.draft is not None
        target, draft = models.target.config, models.draft.config
        mass = NucleusMass.uniform(p, target.num_layers)
        # The kernels know the exact nucleus alone.
        backend = backend_of(method) if method.policy.threshold == "exact" else "xla"
        selection = make_selection(method.policy, random_alignment(target, draft), mass, target, draft, backend)
    return method.make(selection, case.window, ImposedAcceptance(case.accepted))
