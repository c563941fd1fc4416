"""One selection with every ingredient as a number, to measure what each of them is worth.

`Ablation` reads as `selection.Mixture` does, but nearly all that distinguishes the rows of the ablation table is an
array: one compiled reading serves most of them, and many can be read at once (`forced.read_together`). It costs more
per window than the policies that are shipped, and steers harder, so that all rows save the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32
from specattn_kernels import SelectionPlan, compact_blocks, merge_states, top_p_threshold

from specattn_jax.evaluation.attention import attention_read, remember
from specattn_jax.models.cache import KVCache
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.forward import Attend, Attended, Read
from specattn_jax.selection.alignment import Alignment
from specattn_jax.selection.protocol import LayerChoice, LayerRead, Opened, Opening, Seen
from specattn_jax.selection.reads import layer_shares, past_mask, plan_share

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
class StepScores:
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
        steps: what the draft steps of this window said so far.
        scores: the scores for which plans were last made.
        past: entries in the cache then.
        read: sum of the shares read.
        windows: windows so far.
        integral: of the logarithmic error of the share read.
    """

    attention: Float[Array, "B rows S"]
    steps: StepScores
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
        blend_tokens: tokens of the last window whose attention that is, from the first on, which is surely the text's.
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
    blend_tokens: int = 64
    decay: float = 1.0
    reuse: int = 1
    dense_every: int = 0
    tail: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ablation:
    """A selection made of `Ingredients`.

    Attributes:
        weights: mixture over all heads of the draft, one row per target kv head (see `head_weights`, `map_weights`).
        left_out: attention mass that each target kv head leaves out, before steering; 0 reads everything.
        wanted: share of reads to steer to, everything counted; 0 keeps `left_out` as it is.
        numbers: the ingredients as arrays.
        extras: the ingredients among them that need work of their own in every layer.
        target: shape of the target.
        draft: shape of the draft.
    """

    weights: Float[Array, "rows R"]
    left_out: Float[Array, " rows"]
    wanted: Float[Array, ""]
    numbers: dict[str, Array]
    extras: frozenset[Extra] = dataclasses.field(metadata={"static": True})
    target: ModelConfig = dataclasses.field(metadata={"static": True})
    draft: ModelConfig = dataclasses.field(metadata={"static": True})

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

    def init(self, opening: Opening) -> Opened:
        """Nothing seen yet."""
        shape, zero = (opening.batch, len(self.weights), opening.num_slots), jnp.zeros((opening.batch,), jnp.float32)
        memory = Memory(
            attention=jnp.zeros(shape, jnp.float32),
            steps=self._no_steps(shape),
            scores=self._no_steps(shape),
            past=jnp.zeros((opening.batch,), jnp.int32),
            read=zero,
            windows=jnp.zeros((), jnp.int32),
            integral=zero,
        )
        return opening.opened(memory)

    def _no_steps(self, shape: tuple[int, ...]) -> StepScores:
        """Scores before the first draft step."""
        sources = jnp.zeros((shape[0], self.draft.num_layers * self.draft.num_kv_heads, shape[2]), jnp.float32)
        return StepScores(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.bool_), sources, jnp.zeros((), jnp.int32))

    def _p(self, memory: Memory) -> Float[Array, "B rows"]:
        """Nucleus masses of this window, steered by what was read so far."""
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

    def observe(self, state: Memory, read: Callable[[Attend], Read], step: Int32[Array, ""]) -> tuple[Read, Memory]:
        """A dense step of the draft; adds what all its heads looked at, if the step counts."""

        def attend(layer: int, q: Float[Array, "B T N H"], cache: KVCache) -> Attended:
            result = cache.attend(layer, q, return_scores="newest")
            assert result.scores is not None
            return Attended(result.out, result.scores[:, -1])

        seen = read(attend)
        added = self._add(state, jnp.concatenate(seen.notes, axis=1), seen.cache.lengths)
        return seen, dataclasses.replace(state, steps=added)

    def _add(self, memory: Memory, heads: Float[Array, "B MN S"], lengths: Int32[Array, " B"]) -> StepScores:
        """The scores with one step more, made with so many entries in the draft's cache."""
        scores = memory.steps
        rows = jnp.einsum("ar,brs->bas", self.weights, heads)
        groups = jnp.mean(heads.reshape(heads.shape[0], -1, self.draft.group_size, heads.shape[-1]), axis=2)
        p = self._p(memory)

        def nucleus(method: Literal["exact", "linear"]) -> Callable[[], Bool[Array, "B rows S"]]:
            return lambda: rows >= top_p_threshold(rows, p, lengths=lengths[:, None], method=method)[..., None]

        def united() -> Bool[Array, "B rows S"]:
            return scores.union | jax.lax.cond(self.numbers["linear"], nucleus("linear"), nucleus("exact"))

        counts = scores.step < self.numbers["steps"]
        union = jax.lax.cond(self.numbers["union"] & counts, united, lambda: scores.union)
        maximum = jnp.where(counts, jnp.maximum(scores.maximum, rows), scores.maximum)
        sources = jnp.where(counts, jnp.maximum(scores.sources, groups), scores.sources)
        return StepScores(maximum, union, sources, scores.step + 1)

    def _current(self, memory: Memory, past: Int32[Array, " B"]) -> tuple[StepScores, Int32[Array, " B"]]:
        """The scores for which is selected, and the past when they were made."""
        fresh = memory.windows % self.numbers["reuse"] == 0
        chosen = jax.tree.map(lambda new, old: jnp.where(fresh, new, old), memory.steps, memory.scores)
        return chosen, jnp.where(fresh, past, memory.past)

    def plan(
        self, state: Memory, draft_cache: KVCache | None, past: Int32[Array, " B"]
    ) -> tuple[tuple[LayerChoice, ...], Memory]:
        """One choice per target layer; that of the oracle is made when the layer's queries are there."""
        current, made = self._current(state, past)
        blend, p = self.numbers["blend"], self._p(state)
        slot, end = jnp.arange(current.maximum.shape[-1]), past[:, None, None]
        inside = slot < end
        per_source = jnp.sum(self.weights.reshape(len(self.weights), -1, self.draft.group_size), axis=2)
        predicted = jax.lax.cond(
            self.numbers["mix_last"],
            lambda: jnp.einsum("ar,brs->bas", per_source, current.sources),
            lambda: current.maximum,
        )
        mixed = (1.0 - blend) * predicted + blend * state.attention
        chosen = jax.lax.cond(
            self.numbers["union"],
            lambda: current.union,
            lambda: jax.lax.switch(self.numbers["grain"], _SELECT, jnp.where(inside, mixed, 0.0), p),
        )
        # What was written since the scores were made has none.
        forced = (slot < self.numbers["num_sink"]) | (slot >= end - self.numbers["num_recent"])
        forced |= (slot >= made[:, None, None]) | (p >= 1.0)[..., None]
        heads = self.target.num_kv_heads

        def read(layer: int, q: Float[Array, "B T N H"], cache: KVCache) -> LayerRead:
            rows = slice(layer * heads, (layer + 1) * heads)
            own = chosen[:, rows]
            if "oracle" in self.extras:
                attention = attention_read(layer, q, cache, None)
                own = _slots(jnp.where(inside, attention, 0.0), p[:, rows])
            return self._read(layer, q, cache, compact_blocks((own | forced[:, rows]) & inside, block_size=1))

        empty = jax.tree.map(jnp.zeros_like, state.steps)
        return (read,) * self.target.num_layers, dataclasses.replace(state, steps=empty, scores=current, past=made)

    def _read(self, layer: int, q: Float[Array, "B T N H"], cache: KVCache, plan: SelectionPlan) -> LayerRead:
        """Sparse attention, with centroids if wanted, and the share that was fetched."""
        past, share = cache.lengths, plan_share(plan, cache.lengths, cache.num_kv_heads)
        if "inside" in self.extras:
            share = _fetched(past_mask(plan, past, cache), past, 16)
        if "tail" in self.extras:
            share += (-(-past // TAIL) / jnp.maximum(past, 1))[:, None]
            return LayerRead(attend_with_centroids(layer, q, cache, plan), plan, share)
        return LayerRead(cache.attend(layer, q, plan).out, plan, share)

    def learn(self, state: Memory, seen: Seen) -> Memory:
        """Remembers the attention of this window, where it is an ingredient, and steers by what it read."""
        attention = state.attention
        if "blend" in self.extras:
            tokens = self.numbers["blend_tokens"]
            fresh = [
                attention_read(layer, now.q, seen.cache, now.plan, tokens) for layer, now in enumerate(seen.layers)
            ]
            attention = remember(attention, jnp.concatenate(fresh, axis=1), self.numbers["decay"])
        grown = dataclasses.replace(
            state,
            attention=attention,
            read=state.read + jnp.mean(layer_shares(seen), axis=1),
            windows=state.windows + 1,
        )
        integral = state.integral + _INTEGRAL * self._error(grown)
        return dataclasses.replace(grown, integral=jnp.clip(integral, -_LARGEST_INTEGRAL, _LARGEST_INTEGRAL))


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


def _fetched(mask: Bool[Array, "B K S"], past: Int32[Array, " B"], size: int) -> Float[Array, "B K"]:
    """Share of the past in blocks that hold any slot of the mask."""
    padded = jnp.pad(mask, ((0, 0), (0, 0), (0, -mask.shape[-1] % size)))
    blocks = jnp.any(padded.reshape(*mask.shape[:2], -1, size), axis=-1)
    entries = jnp.clip(past[:, None, None] - size * jnp.arange(blocks.shape[-1]), 0, size)
    return jnp.sum(jnp.where(blocks, entries, 0), axis=-1) / jnp.maximum(past, 1)[:, None]


def attend_with_centroids(
    layer: int, q: Float[Array, "B T N H"], cache: KVCache, plan: SelectionPlan
) -> Float[Array, "B T N H"]:
    """Sparse attention that also sees, for every 256 slots, the mean of the keys and values that it did not read.

    A centroid counts as often as there are keys behind it. Its cost is one key and one value a block: the sums over
    whole blocks are kept, and what was read is subtracted from them.
    """
    past, slots, heads = cache.lengths, cache.num_slots, cache.num_kv_heads
    batch, _, _, width = q.shape
    unread = (jnp.arange(slots) < past[:, None, None]) & ~past_mask(plan, past, cache)
    unread = jnp.pad(unread, ((0, 0), (0, 0), (0, -slots % TAIL))).reshape(batch, heads, -1, TAIL)

    def mean(x: Float[Array, "B K S H"]) -> Float[Array, "B K blocks H"]:
        wide = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, 0), (0, -slots % TAIL), (0, 0)))
        blocks = jnp.where(unread[..., None], wide.reshape(batch, heads, -1, TAIL, width), 0.0)
        return jnp.sum(blocks, axis=3) / jnp.maximum(count, 1)[..., None]

    count = jnp.sum(unread, axis=-1)
    grouped = q.astype(jnp.float32).reshape(*q.shape[:2], heads, -1, width)
    logits = jnp.einsum("btkgh,bkch->btkgc", grouped, mean(cache.keys(layer)), precision="highest") * width**-0.5
    behind = count[:, None, :, None]
    logits = jnp.where(behind > 0, logits + jnp.log(jnp.maximum(behind, 1)), -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None])
    tail = jnp.einsum("btkgc,bkch->btkgh", weights, mean(cache.values(layer)), precision="highest").reshape(q.shape)
    near = cache.attend(layer, q, plan, return_lse=True)
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
