"""Random models, caches and states for the decode benchmark, made on the device and never copied."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from specattn_kernels import Implementation, SelectionPlan

from specattn_jax.bench.decode_cases import DecodeCase, Method, shape
from specattn_jax.decoding.speculative import DecodeSettings, DecodeState, Statistics
from specattn_jax.errors import UserError
from specattn_jax.models.cache import KVCache
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.transformer import LanguageModel, abstract_model
from specattn_jax.selection.alignment import Alignment, NucleusMass
from specattn_jax.selection.TODO import DraftScores, Selector

# Standard deviation of all matrices, that of the published models when they were new.
_WEIGHT_SCALE = 0.02
# How unequal the weights of a random mixture are: a calibrated row has a few large ones too.
_MIXTURE_SCALE = 2.0
_NO_LIMIT = 2**30
# Of an accelerator's memory, what weights and caches may fill.
_FULL = 0.97


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key: PRNGKeyArray, scale: float, *, shape: tuple[int, ...], dtype: str) -> Array:
    """Normal numbers; with the conversion inside, nothing wider than `dtype` outlives the call."""
    return (scale * jax.random.normal(key, shape, jnp.dtype(dtype))).astype(dtype)


def random_model(config: ModelConfig, key: PRNGKeyArray, dtype: str) -> LanguageModel:
    """A model with random weights, leaf by leaf, so that it takes little more than its own memory."""
    empty = abstract_model(config, jnp.dtype(dtype))
    leaves, structure = jax.tree.flatten(empty.params)
    made = [
        _normal(jax.random.fold_in(key, index), _WEIGHT_SCALE, shape=leaf.shape, dtype=dtype)
        if leaf.ndim > 1
        else jnp.ones(leaf.shape, dtype)
        for index, leaf in enumerate(leaves)
    ]
    return dataclasses.replace(empty, params=jax.tree.unflatten(structure, made))


def random_cache(config: ModelConfig, batch: int, slots: int, key: PRNGKeyArray, dtype: str) -> KVCache:
    """A cache that looks full of tokens, layer by layer."""
    size = (batch, config.num_kv_heads, slots, config.head_dim)
    k, v = (
        tuple(
            _normal(jax.random.fold_in(key, 2 * layer + which), 1.0, shape=size, dtype=dtype)
            for layer in range(config.num_layers)
        )
        for which in range(2)
    )
    return KVCache(k, v, jnp.zeros((batch,), jnp.int32))


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseVerification(Selector):
    """The rival: the draft reads sparsely, as the policy says, but the target reads everything."""

    def plan(
        self,
        scores: DraftScores,
        past: Array,
        read: Float[Array, "B L"] | None = None,
        windows: Array | None = None,
    ) -> tuple[SelectionPlan | None, ...]:
        """Everything, in every layer."""
        return (None,) * self.target.num_layers


class Pair(NamedTuple):
    """Two random models that were asked for by name."""

    names: tuple[str, str, str]
    target: LanguageModel
    draft: LanguageModel

    def fits(self, case: DecodeCase) -> bool:
        """Whether these are the models of a case."""
        return self.names == _pair_names(case)


def make_pair(case: DecodeCase) -> Pair:
    """The models of a case."""
    keys = jax.random.split(jax.random.key(1))
    target, draft = (
        random_model(shape(name), key, case.dtype) for name, key in zip((case.target, case.draft), keys, strict=True)
    )
    return Pair(_pair_names(case), target, draft)


def _pair_names(case: DecodeCase) -> tuple[str, str, str]:
    return case.target, case.draft, case.dtype


class Workload:
    """Models and caches of one case; each state borrows the caches and gives them back.

    A second pair of caches would not fit beside the first, so that there is one, donated from call to call.
    """

    def __init__(self, case: DecodeCase, pair: Pair | None = None) -> None:
        """Makes what is not there yet.

        Args:
            case: what is decoded.
            pair: models made before; taken if they are of the case.

        Raises:
            UserError: the device has not enough memory.
        """
        self.case = case
        configs = shape(case.target), shape(case.draft)
        item = jnp.dtype(case.dtype).itemsize
        self.cache_bytes = sum(config.cache_bytes(case.batch, case.slots, item) for config in configs)
        self.weight_bytes = sum(config.parameter_count() * item for config in configs)
        _check_memory(self.cache_bytes + self.weight_bytes)
        self.pair = pair if pair is not None and pair.fits(case) else make_pair(case)
        keys = jax.random.split(jax.random.key(2))
        self._target_cache, self._draft_cache = (
            random_cache(config, case.batch, case.slots, key, case.dtype)
            for config, key in zip(configs, keys, strict=True)
        )
        jax.block_until_ready((self._target_cache, self._draft_cache))

    @property
    def layer_cache_bytes(self) -> int:
        """Bytes of the smallest array of the caches."""
        return int(min(cache.k[0].nbytes for cache in (self._target_cache, self._draft_cache)))

    def start(self, settings: DecodeSettings, selector: Selector | None = None) -> DecodeState:
        """A state at the case's context, with the caches; `give_back` a state before the next.

        Where the draft reads sparsely its first plan is of slots at equal distances; the later ones are its own.
        """
        batch, width = self.case.batch, settings.tokens_per_window

        def zeros(*shape: int) -> Array:
            return jnp.zeros(shape, jnp.int32)

        return DecodeState(
            target_cache=self._target_cache.at_lengths(jnp.full((batch,), self.case.context, jnp.int32)),
            draft_cache=self._draft_cache.at_lengths(jnp.full((batch,), self.case.context - 1, jnp.int32)),
            last=jnp.tile(jnp.arange(1, 3, dtype=jnp.int32), (batch, 1)),
            output=zeros(batch, self.case.room + width),
            emitted=zeros(batch),
            limit=jnp.full((batch,), _NO_LIMIT, jnp.int32),
            done=jnp.zeros((batch,), jnp.bool_),
            keys=jax.random.split(jax.random.key(3), batch),
            statistics=Statistics(
                zeros(batch),
                zeros(batch),
                zeros(batch),
                jnp.zeros((batch, self.pair.target.config.num_layers), jnp.float32),
            ),
            draft_plan=None if selector is None else self._spaced_plan(selector, settings.window),
        )

    def _spaced_plan(self, selector: Selector, window: int) -> SelectionPlan | None:
        """A plan for the draft as large as those that the selector makes."""
        config, case = self.pair.draft.config, self.case
        shape = (case.batch, config.num_layers * config.num_kv_heads, case.slots)
        scores = DraftScores(jax.ShapeDtypeStruct(shape, jnp.dtype(case.dtype)), None)  # type: ignore[arg-type]
        past = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
        like = jax.eval_shape(lambda scores, past: selector.draft_plan(scores, past, window), scores, past)
        if like is None:
            return None
        room = like.block_ids.shape[-1]
        ids = jnp.arange(room, dtype=jnp.int32) * (case.slots // (room * like.block_size))
        return SelectionPlan(
            jnp.broadcast_to(ids, like.block_ids.shape), jnp.full(like.counts.shape, room, jnp.int32), like.block_size
        )

    def give_back(self, target_cache: KVCache | None = None, draft_cache: KVCache | None = None) -> None:
        """Takes back caches that were donated to a call."""
        if target_cache is not None:
            self._target_cache = target_cache
        if draft_cache is not None:
            self._draft_cache = draft_cache


def _check_memory(needed: int) -> None:
    """Refuses what an accelerator cannot hold, before it is half made."""
    stats = jax.devices()[0].memory_stats()
    limit = (stats or {}).get("bytes_limit")
    if limit is not None and needed > _FULL * limit:
        raise UserError(
            f"weights and caches take {needed / 1e9:.1f} GB, but JAX may use {limit / 1e9:.1f} GB of the device; set "
            "XLA_PYTHON_CLIENT_MEM_FRACTION=0.96, or leave this case out."
        )


def best_implementation() -> Implementation | None:
    """Our kernels where they are compiled, and the library's choice elsewhere: interpreted they tell nothing."""
    return "pallas_triton" if jax.default_backend() == "gpu" else None


def make_settings(case: DecodeCase, method: Method) -> DecodeSettings:
    """How a method decodes a case."""
    return DecodeSettings(
        mode=method.mode,
        window=case.window,
        implementation=_implementation(method),
        imposed_acceptance=case.accepted,
    )


def make_bench_selector(pair: Pair, method: Method, p: float) -> Selector | None:
    """What a method reads at the nucleus mass p; None for all."""
    if method.policy is None:
        return None
    target, draft = pair.target.config, pair.draft.config
    kind = Selector if method.sparse_target else DenseVerification
    # The kernels know the exact nucleus alone.
    linear = method.policy.threshold == "linear"
    return kind(
        alignment=random_alignment(target, draft),
        mass=NucleusMass.uniform(p, target.num_layers),
        policy=method.policy,
        target=target,
        draft=draft,
        implementation="xla" if linear else _implementation(method),
    )


def _implementation(method: Method) -> Implementation | None:
    return best_implementation() if method.implementation == "best" else method.implementation  # type: ignore[return-value]
