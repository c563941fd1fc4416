"""One selection with every ingredient as a number, to measure what each of them is worth.

`Ablation` reads as `selection.Selector` does, but nearly all that distinguishes the rows of the ablation table is an
array: one compiled reading serves most of them, and many can be read at once (`forced.read_together`). It costs more
per window than the policies that are shipped, and steers harder, so that all rows save the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Self, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int32
from specattn_kernels import (
    SelectionPlan,
    compact_blocks,
    merge_states,
    sparse_decode_attention,
    top_p_threshold,
)

from specattn_jax.decoding.speculative import WindowRead
from specattn_jax.evaluation.learning import attend_plan, attention_read, remember
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.transformer import LayerChoice
from specattn_jax.selection.alignment import Alignment
from specattn_jax.selection.TODO import DenseDraft, DraftScores, past_mask

# What is selected: slots, blocks by the sum or maximum of their scores, or slots for which whole blocks are fetched.
Grain = Literal["slot", "sum 4", "sum 8", "sum 16", "max 16", "inside 16"]
GRAINS: tuple[str, ...] = get_args(Grain)
Extra = Literal["oracle", "blend", "tail", "inside"]
# Keys per centroid.
TAIL = 256
# A proportional and integral controller in the logarithm of the mass left out, of the reads that it can change. The
# integral is bounded, so that a start far off is not paid for ever after. The prior, in windows, keeps one dense
# window from being taken back by those right after it.
_PROPORTIONAL, _INTEGRAL, _PRIOR = 6.0, 0.2, 16.0
_LARGEST_INTEGRAL = 4.0
# Least share of the wanted reads that is believed, where logarithms are taken.
_LEAST = 0.1
_MOST_LEFT_OUT = 0.9999


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepScores(DraftScores):
    """What the draft steps of a window said, both ways.

    Attributes:
        maximum: largest predicted attention over the steps, one row per target kv head.
        union: slots in the nucleus of any step.
        sources: largest attention of every draft kv head (the mean of its query heads) over the steps.
        step: steps so far.
    """

    maximum: Float[Array, "B rows S"]
    union: Bool[Array, "B rows S"]
    sources: Float[Array, "B M*K S"]
    step: Int32[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """What is carried from window to window.

    Attributes:
        attention: target attention as last seen, one row per target kv head.
        scores: the scores for which plans were last made.
        past: entries in the cache then.
        read: sum of the shares read.
        windows: windows so far.
        integral: of the logarithmic error of the share read.
    """

    attention: Float[Array, "B rows S"]
    scores: StepScores
    past: Int32[Array, " B"]
    read: Float[Array, " B"]
    windows: Int32[Array, ""]
    integral: Float[Array, " B"]


class Ingredients(NamedTuple):
    """What distinguishes one row of the table; the defaults are those of the `default` policy.

    Attributes:
        oracle: select by the target's own attention at this window, not by the draft's.
        union: unite the nuclei of the steps, instead of one nucleus of their maximum.
        linear: published bisection, where nuclei are united.
        steps: draft steps that count.
        mix_last: mix once a window, from the largest attention of the draft's kv heads over the steps.
        grain: how slots become a selection.
        num_sink: first slots that are always read.
        num_recent: last slots that are always read.
        blend: weight of the target's attention as last seen; 1 does without the draft.
        decay: factor, per window, on attention of entries that were not read.
        reuse: windows for which one selection serves.
        dense_every: every so many windows everything is read; 0 never.
        tail: attend to the mean of the unread keys and values of every 256 slots besides.
    """

    oracle: bool = False
    union: bool = False
    linear: bool = False
    steps: int = 64
    mix_last: bool = False
    grain: Grain = "slot"
    num_sink: int = 4
    num_recent: int = 16
    blend: float = 0.0
    decay: float = 1.0
    reuse: int = 1
    dense_every: int = 0
    tail: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ablation(DenseDraft):
    """A selection made of `Ingredients`, a `learning.Learner`.

    Attributes:
        weights: mixture over all heads of the draft, one row per target kv head (see `head_weights`, `map_weights`).
        left_out: attention mass that each target kv head leaves out, before steering; 0 reads everything.
        wanted: share of reads to steer to, everything counted; 0 keeps `left_out` as it is.
        numbers: the ingredients as arrays.
        extras: the ingredients among them that need work of their own in every layer.
        target: shape of the target.
        draft: shape of the draft.
        memory: None before `prepare`.
    """

    weights: Float[Array, "rows R"]
    left_out: Float[Array, " rows"]
    wanted: Float[Array, ""]
    numbers: dict[str, Array]
    extras: frozenset[Extra] = dataclasses.field(metadata={"static": True})
    target: ModelConfig = dataclasses.field(metadata={"static": True})
    draft: ModelConfig = dataclasses.field(metadata={"static": True})
    memory: Memory | None = None

    @classmethod
    def make(
        cls,
        weights: Float[Array, "rows R"],
        left_out: Float[Array, " rows"],
        wanted: float,
        ingredients: Ingredients,
        target: ModelConfig,
        draft: ModelConfig,
    ) -> Ablation:
        """A selection of these ingredients, nothing remembered yet."""
        plain = {**ingredients._asdict(), "grain": GRAINS.index(ingredients.grain)}
        kinds = {bool: jnp.bool_, int: jnp.int32, float: jnp.float32}
        numbers = {name: jnp.asarray(value, kinds[type(value)]) for name, value in plain.items()}
        has: dict[Extra, bool] = {
            "oracle": ingredients.oracle,
            "blend": ingredients.blend > 0,
            "tail": ingredients.tail,
            "inside": ingredients.grain == "inside 16",
        }
        extras = frozenset(name for name, used in has.items() if used)
        return cls(weights, left_out, jnp.asarray(wanted, jnp.float32), numbers, extras, target, draft)

    @property
    def observed_layers(self) -> tuple[int, ...]:
        """All draft layers."""
        return tuple(range(self.draft.num_layers))

    def observe(self, scores: Float[Array, "B 1 N S"]) -> Float[Array, "B N S"]:
        """Attention of the newest token, all heads."""
        return scores[:, -1]

    def prepare(self, batch: int, num_slots: int) -> Self:
        """Nothing seen yet."""
        zero = jnp.zeros((batch,), jnp.float32)
        memory = Memory(
            attention=jnp.zeros((batch, len(self.weights), num_slots), jnp.float32),
            scores=self.start(batch, num_slots),
            past=jnp.zeros((batch,), jnp.int32),
            read=zero,
            windows=jnp.zeros((), jnp.int32),
            integral=zero,
        )
        return dataclasses.replace(self, memory=memory)

    def start(self, batch: int, num_slots: int, dtype: DTypeLike = jnp.float32) -> StepScores:
        """Scores before the first draft step."""
        shape = (batch, len(self.weights), num_slots)
        sources = jnp.zeros((batch, self.draft.num_layers * self.draft.num_kv_heads, num_slots), jnp.float32)
        return StepScores(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.bool_), sources, jnp.zeros((), jnp.int32))

    @property
    def _remembered(self) -> Memory:
        if self.memory is None:
            raise ValueError("Ablation: nothing is remembered; call `prepare` first.")
        return self.memory

    def _p(self) -> Float[Array, "B rows"]:
        """Nucleus masses of this window, steered by what was read so far."""
        memory = self._remembered
        scale = jnp.exp(_PROPORTIONAL * self._error(memory) + memory.integral)
        p = 1.0 - jnp.clip(self.left_out * scale[:, None], 0.0, _MOST_LEFT_OUT)
        every = self.numbers["dense_every"]
        # Also the first window of a selection that has seen nothing.
        dense = (every > 0) & (memory.windows % jnp.maximum(every, 1) == every - 1)
        dense |= (self.numbers["blend"] == 1.0) & (memory.windows == 0)
        return jnp.where(dense, 1.0, p)

    def _error(self, memory: Memory) -> Float[Array, " B"]:
        """Logarithm of reads over wanted reads, dense layers and windows left aside; 0 if no share is wanted."""
        every, first = self.numbers["dense_every"], self.numbers["blend"] == 1.0
        dense_share = jnp.where(every > 0, 1.0 / jnp.maximum(every, 1), 0.0)
        dense_windows = jnp.where(every > 0, memory.windows // jnp.maximum(every, 1), 0) + first * (memory.windows > 0)
        dense_layers = jnp.mean(self.left_out == 0.0)
        wanted = (self.wanted - dense_share) / (1.0 - dense_share)
        mean = (memory.read - dense_windows + _PRIOR * wanted) / (memory.windows - dense_windows + _PRIOR)
        room = wanted - dense_layers
        ratio = jnp.maximum((mean - dense_layers) / jnp.maximum(room, _LEAST * wanted), _LEAST)
        return jnp.where(self.wanted > 0, jnp.log(ratio), 0.0)

    def update(
        self, scores: DraftScores, observed: Sequence[Float[Array, "B N S"]], lengths: Int32[Array, " B"]
    ) -> StepScores:
        """Adds one draft step, if it counts."""
        assert isinstance(scores, StepScores)
        heads = jnp.concatenate(observed, axis=1)
        rows = jnp.einsum("ar,brs->bas", self.weights, heads)
        groups = jnp.mean(heads.reshape(heads.shape[0], -1, self.draft.group_size, heads.shape[-1]), axis=2)
        p = self._p()

        def nucleus(method: Literal["exact", "linear"]) -> Callable[[], Bool[Array, "B rows S"]]:
            return lambda: rows >= top_p_threshold(rows, p, lengths=lengths[:, None], method=method)[..., None]

        def united() -> Bool[Array, "B rows S"]:
            return scores.union | jax.lax.cond(self.numbers["linear"], nucleus("linear"), nucleus("exact"))

        counts = scores.step < self.numbers["steps"]
        union = jax.lax.cond(self.numbers["union"] & counts, united, lambda: scores.union)
        maximum = jnp.where(counts, jnp.maximum(scores.maximum, rows), scores.maximum)
        sources = jnp.where(counts, jnp.maximum(scores.sources, groups), scores.sources)
        return StepScores(maximum, union, sources, scores.step + 1)

    def _current(self, scores: StepScores, past: Int32[Array, " B"]) -> tuple[StepScores, Int32[Array, " B"]]:
        """The scores for which is selected, and the past when they were made."""
        memory = self._remembered
        fresh = memory.windows % self.numbers["reuse"] == 0
        chosen = jax.tree.map(lambda new, old: jnp.where(fresh, new, old), scores, memory.scores)
        return chosen, jnp.where(fresh, past, memory.past)

    def plan(
        self,
        scores: DraftScores,
        past: Int32[Array, " B"],
        read: Float[Array, "B L"] | None = None,
        windows: Int32[Array, " B"] | None = None,
    ) -> tuple[LayerChoice, ...]:
        """One choice per target layer; that of the oracle is made when the layer's queries are there."""
        assert isinstance(scores, StepScores)
        current, made = self._current(scores, past)
        blend, p = self.numbers["blend"], self._p()
        slot, end = jnp.arange(current.maximum.shape[-1]), past[:, None, None]
        inside = slot < end
        per_source = jnp.sum(self.weights.reshape(len(self.weights), -1, self.draft.group_size), axis=2)
        predicted = jax.lax.cond(
            self.numbers["mix_last"],
            lambda: jnp.einsum("ar,brs->bas", per_source, current.sources),
            lambda: current.maximum,
        )
        mixed = (1.0 - blend) * predicted + blend * self._remembered.attention
        chosen = jax.lax.cond(
            self.numbers["union"],
            lambda: current.union,
            lambda: jax.lax.switch(self.numbers["grain"], _SELECT, jnp.where(inside, mixed, 0.0), p),
        )
        # What was written since the scores were made has none.
        forced = (slot < self.numbers["num_sink"]) | (slot >= end - self.numbers["num_recent"])
        forced |= (slot >= made[:, None, None]) | (p >= 1.0)[..., None]
        heads = self.target.num_kv_heads

        def for_layer(layer: int) -> LayerChoice:
            rows = slice(layer * heads, (layer + 1) * heads)

            def choose(
                q: Float[Array, "B T N H"], keys: Float[Array, "B K S H"], past: Int32[Array, " B"]
            ) -> SelectionPlan:
                attention = attention_read(q, keys, None, past + q.shape[1])
                own = _slots(jnp.where(inside, attention, 0.0), p[:, rows])
                return compact_blocks((own | forced[:, rows]) & inside, block_size=1)

            if "oracle" in self.extras:
                return choose
            return compact_blocks((chosen | forced)[:, rows] & inside, block_size=1)

        return tuple(for_layer(layer) for layer in range(self.target.num_layers))

    def attend(
        self,
        q: Float[Array, "B T N H"],
        keys: Float[Array, "B K S H"],
        values: Float[Array, "B K S H"],
        plan: SelectionPlan | None,
        lengths: Int32[Array, " B"],
    ) -> tuple[Float[Array, "B T N H"], tuple[Float[Array, "B K S"] | None, Float[Array, " B"] | None]]:
        """Sparse attention, with centroids if wanted; keeps the attention over what was read, and what was fetched.

        Each of them only where it is an ingredient.
        """
        assert plan is not None
        past, slots = lengths - q.shape[1], keys.shape[2]
        read = attend_with_centroids if "tail" in self.extras else attend_plan
        seen = attention_read(q, keys, plan, lengths) if "blend" in self.extras else None
        whole = _fetched(past_mask(plan, past, slots), past, 16) if "inside" in self.extras else None
        return read(q, keys, values, plan, lengths), (seen, whole)

    def learn(self, window: WindowRead, past: Int32[Array, " B"]) -> tuple[Self, Float[Array, "B L"]]:
        """Remembers the attention of this window, and steers by what it read."""
        memory = self._remembered
        assert isinstance(window.drafted.scores, StepScores)
        seen, whole = zip(*window.kept, strict=True)
        read = jnp.stack(whole, axis=1) if "inside" in self.extras else window.read
        if "tail" in self.extras:
            read += (-(-past // TAIL) / jnp.maximum(past, 1))[:, None]
        attention = memory.attention
        if "blend" in self.extras:
            attention = remember(attention, jnp.concatenate(seen, axis=1), self.numbers["decay"])
        scores, made = self._current(window.drafted.scores, past)
        grown = dataclasses.replace(
            memory,
            attention=attention,
            scores=scores,
            past=made,
            read=memory.read + jnp.mean(read, axis=1),
            windows=memory.windows + 1,
        )
        integral = memory.integral + _INTEGRAL * self._error(grown)
        grown = dataclasses.replace(grown, integral=jnp.clip(integral, -_LARGEST_INTEGRAL, _LARGEST_INTEGRAL))
        return dataclasses.replace(self, memory=grown), read


def _slots(scores: Float[Array, "B rows S"], p: Float[Array, "B rows"]) -> Bool[Array, "B rows S"]:
    """The nucleus of slots."""
    return scores >= top_p_threshold(scores, p)[..., None]


def _blocks(
    size: int, reduce: Callable[..., Array]
) -> Callable[[Float[Array, "B rows S"], Float[Array, "B rows"]], Bool[Array, "B rows S"]]:
    """The nucleus of blocks, as slots."""

    def select(scores: Float[Array, "B rows S"], p: Float[Array, "B rows"]) -> Bool[Array, "B rows S"]:
        slots = scores.shape[-1]
        padded = jnp.pad(scores, ((0, 0), (0, 0), (0, -slots % size)))
        chosen = _slots(reduce(padded.reshape(*scores.shape[:2], -1, size), axis=-1), p)
        return jnp.repeat(chosen, size, axis=-1)[..., :slots]

    return select


# In the order of `GRAINS`.
_SELECT = (_slots, _blocks(4, jnp.sum), _blocks(8, jnp.sum), _blocks(16, jnp.sum), _blocks(16, jnp.max), _slots)


def _fetched(mask: Bool[Array, "B K S"], past: Int32[Array, " B"], size: int) -> Float[Array, " B"]:
    """Share of the past in blocks that hold any slot of the mask, averaged over kv heads."""
    padded = jnp.pad(mask, ((0, 0), (0, 0), (0, -mask.shape[-1] % size)))
    blocks = jnp.any(padded.reshape(*mask.shape[:2], -1, size), axis=-1)
    entries = jnp.clip(past[:, None, None] - size * jnp.arange(blocks.shape[-1]), 0, size)
    return jnp.mean(jnp.sum(jnp.where(blocks, entries, 0), axis=-1), axis=-1) / jnp.maximum(past, 1)


def attend_with_centroids(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    plan: SelectionPlan,
    lengths: Int32[Array, " B"],
) -> Float[Array, "B T N H"]:
    """Sparse attention that also sees, for every 256 slots, the mean of the keys and values that it did not read.

    A centroid counts as often as there are keys behind it. Its cost is one key and one value a block: the sums over
    whole blocks are kept, and what was read is subtracted from them.
    """
    batch, heads, slots, width = keys.shape
    past = lengths - q.shape[1]
    unread = (jnp.arange(slots) < past[:, None, None]) & ~past_mask(plan, past, slots)
    unread = jnp.pad(unread, ((0, 0), (0, 0), (0, -slots % TAIL))).reshape(batch, heads, -1, TAIL)

    def mean(x: Float[Array, "B K S H"]) -> Float[Array, "B K blocks H"]:
        wide = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, 0), (0, -slots % TAIL), (0, 0)))
        blocks = jnp.where(unread[..., None], wide.reshape(batch, heads, -1, TAIL, width), 0.0)
        return jnp.sum(blocks, axis=3) / jnp.maximum(count, 1)[..., None]

    count = jnp.sum(unread, axis=-1)
    grouped = q.astype(jnp.float32).reshape(*q.shape[:2], heads, -1, width)
    logits = jnp.einsum("btkgh,bkch->btkgc", grouped, mean(keys), precision="highest") * width**-0.5
    behind = count[:, None, :, None]
    logits = jnp.where(behind > 0, logits + jnp.log(jnp.maximum(behind, 1)), -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None])
    tail = jnp.einsum("btkgc,bkch->btkgh", weights, mean(values), precision="highest").reshape(q.shape)
    near = sparse_decode_attention(q, keys, values, plan, lengths, return_lse=True)
    assert near.lse is not None
    out, _ = merge_states(near.out, near.lse, tail.astype(near.out.dtype), lse.reshape(q.shape[:3]))
    return out


def head_weights(alignment: Alignment, draft: ModelConfig) -> Float[Array, "rows R"]:
    """An alignment's mixture weights over all heads of the draft, whatever its sources are."""
    per_layer = alignment.weights.shape[1] // draft.num_layers
    shared = draft.num_heads // per_layer
    return jnp.repeat(alignment.weights, shared, axis=1) / shared


def map_weights(alignment: Alignment, target: ModelConfig, draft: ModelConfig) -> Float[Array, "rows R"]:
    """The published layer map as a mixture: the mean over the heads of one draft layer."""
    layer = jnp.repeat(jnp.asarray(alignment.layer_map), target.num_kv_heads)
    return jnp.repeat(jax.nn.one_hot(layer, draft.num_layers), draft.num_heads, axis=1) / draft.num_heads
