"""Selection policies: from the draft's attention to the cache entries that each target layer reads."""

from __future__ import annotations

import dataclasses
import importlib.resources
import math
import tomllib
from collections.abc import Sequence
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int32
from specattn_kernels import (
    Implementation,
    SelectionCall,
    SelectionPlan,
    choose_implementation,
    compact_blocks,
    current_device,
    plan_slots,
    score_cache,
    select_blocks,
    top_p_threshold,
)

from specattn_jax.alignment import Alignment, NucleusMass, reduce_heads
from specattn_jax.cache import KVCache
from specattn_jax.config import ModelConfig
from specattn_jax.errors import UserError
from specattn_jax.model import LayerChoice, Look

# Layers for which is selected at a time where there are no kernels.
_LAYERS_AT_ONCE = 8
# A draft that reads sparsely reads at least so many entries.
LEAST_DRAFT_ENTRIES = 256
_NO_SCORES = "scores hold neither a maximum nor a union."


@dataclasses.dataclass(frozen=True)
class SelectionPolicy:
    """Every ingredient of a selection; static under jit. Presets: `configs/policies.toml`.

    Attributes:
        prediction: `layer_map` takes the head-averaged attention of one draft layer for each target layer (published);
            `mixture` predicts each target kv head from a calibrated mixture of the draft's heads.
        combine: over the W steps of a window, `union` of the nuclei of the steps (published) or one nucleus of the
            running `maximum`.
        mixing: with a mixture and a maximum, mix at every `step` and keep the largest prediction, or once a `window`
            from the largest attention of each source. With sources that are kv heads the draft's cache is then scored
            once a window, for the queries of all its steps, and no step has to write out its attention.
        draft_reads: share of its own cache that the draft reads: for each of its kv heads the entries that the window
            before looked at most, sinks and recent window besides. 1 is all. What the target reads does not depend
            on it but through the draft's queries, as its whole cache is scored in any case.
        threshold: `exact` minimal nucleus, or `linear` bisection that over-selects (published).
        steps: halvings of the linear bisection.
        dense_layers: leading target layers that read everything.
        num_sink: first slots that are always read.
        num_recent: last slots that are always read.
        block_size: slots per block; 1 is token granular.
    """

    prediction: Literal["layer_map", "mixture"]
    combine: Literal["union", "maximum"]
    mixing: Literal["step", "window"] = "step"
    draft_reads: float = 1.0
    threshold: Literal["exact", "linear"] = "exact"
    steps: int = 10
    dense_layers: int = 0
    num_sink: int = 0
    num_recent: int = 0
    block_size: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.draft_reads <= 1.0:
            raise UserError(f"draft_reads is {self.draft_reads}; expected a share in (0, 1].")
        if self.draft_reads < 1.0 and not self.mixes_last:
            raise UserError(
                f"draft_reads is {self.draft_reads}, but the cache of a sparse draft is scored once a window: expected "
                "prediction 'mixture', combine 'maximum' and mixing 'window'."
            )

    @property
    def mixes_last(self) -> bool:
        """Whether scores are of the sources until the plan is made."""
        return self.prediction == "mixture" and self.combine == "maximum" and self.mixing == "window"


def load_policy(name: str) -> SelectionPolicy:
    """The policy preset called `name`.

    Raises:
        UserError: there is no such preset.
    """
    text = importlib.resources.files("specattn_configs").joinpath("policies.toml").read_text(encoding="utf-8")
    presets = tomllib.loads(text)
    if name not in presets:
        raise UserError(f"policy is {name!r}; expected one of {', '.join(sorted(presets))}.")
    return SelectionPolicy(**presets[name])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftScores:
    """What a window's draft steps said about the cache so far, reduced as the policy says.

    Attributes:
        maximum: largest predicted attention over the steps, one row per target kv head (`mixture`) or mapped draft
            layer (`layer_map`), or, where it is mixed once a window, largest attention of every source; None when steps
            are united instead.
        union: slots that were in the nucleus of any step; None when the maximum is kept.
    """

    maximum: Float[Array, "B rows S"] | None
    union: Bool[Array, "B rows S"] | None


class Selection(Protocol):
    """Anything that chooses what the target reads, a pytree: `Selector`, and the baselines of the evaluation."""

    @property
    def observed_layers(self) -> tuple[int, ...]:
        """Draft layers whose attention is needed."""
        ...

    def observe(self, scores: Float[Array, "B 1 N S"]) -> Float[Array, "B r S"]:
        """Keeps of one draft layer's softmax weights what is needed."""
        ...

    def start(self, batch: int, num_slots: int, dtype: DTypeLike = jnp.float32) -> DraftScores:
        """Scores before the first draft step; `dtype` is that of the draft."""
        ...

    def update(
        self, scores: DraftScores, observed: Sequence[Float[Array, "B r S"]], lengths: Int32[Array, " B"]
    ) -> DraftScores:
        """Adds one draft step."""
        ...

    @property
    def scores_windows(self) -> bool:
        """Whether scores are made once a window, from how the draft looked at its cache, and not step by step."""
        ...

    @property
    def drafts_sparsely(self) -> bool:
        """Whether the draft reads only a part of its cache."""
        ...

    def score(
        self, looks: Sequence[Look], cache: KVCache, past: Int32[Array, " B"], implementation: Implementation | None
    ) -> DraftScores:
        """Scores of a window from the looks of all its steps, one per draft layer."""
        ...

    def draft_plan(self, scores: DraftScores, past: Int32[Array, " B"], window: int) -> SelectionPlan | None:
        """What the draft reads in the next window, kv head by kv head of all its layers; None is everything."""
        ...

    def plan(
        self,
        scores: DraftScores,
        past: Int32[Array, " B"],
        read: Float[Array, "B L"] | None = None,
        windows: Int32[Array, " B"] | None = None,
    ) -> tuple[LayerChoice, ...]:
        """One choice per target layer."""
        ...


class DenseDraft:
    """The part of a selection whose draft reads everything and tells of its attention step by step, if at all."""

    @property
    def scores_windows(self) -> bool:
        """No."""
        return False

    @property
    def drafts_sparsely(self) -> bool:
        """No."""
        return False

    def score(
        self, looks: Sequence[Look], cache: KVCache, past: Int32[Array, " B"], implementation: Implementation | None
    ) -> DraftScores:
        """Is never asked."""
        raise NotImplementedError

    def draft_plan(self, scores: DraftScores, past: Int32[Array, " B"], window: int) -> SelectionPlan | None:
        """Everything."""
        return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selector:
    """The policies that learn from the draft, with all that they need to know of one model pair.

    Attributes:
        alignment: how draft attention predicts target attention.
        mass: how much attention mass each target layer keeps.
        policy: the ingredients.
        target: shape of the target.
        draft: shape of the draft.
        implementation: backend of the selection ops; None lets the library choose.
    """

    alignment: Alignment
    mass: NucleusMass
    policy: SelectionPolicy = dataclasses.field(metadata={"static": True})
    target: ModelConfig = dataclasses.field(metadata={"static": True})
    draft: ModelConfig = dataclasses.field(metadata={"static": True})
    implementation: Implementation | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        if self.policy.draft_reads < 1.0 and not self.scores_windows:
            raise UserError(
                f"draft_reads is below 1, but the alignment's sources are of granularity {self.alignment.granularity}; "
                "only kv heads can be scored once a window, so calibrate with granularity kv_head."
            )

    @property
    def observed_layers(self) -> tuple[int, ...]:
        """Draft layers whose attention is needed, step by step."""
        if self.scores_windows:
            return ()
        if self.policy.prediction == "mixture":
            return tuple(range(self.draft.num_layers))
        return tuple(sorted(set(self.alignment.layer_map[self.policy.dense_layers :])))

    def observe(self, scores: Float[Array, "B 1 N S"]) -> Float[Array, "B r S"]:
        """Keeps of one draft layer's softmax weights what the prediction uses, for the newest token."""
        granularity = self.alignment.granularity if self.policy.prediction == "mixture" else "layer"
        return reduce_heads(scores[:, -1], granularity, self.draft.num_kv_heads)

    @property
    def _rows(self) -> int:
        if self.policy.prediction == "mixture":
            return self.target.num_layers * self.target.num_kv_heads
        return len(self.observed_layers)

    @property
    def _unit(self) -> int:
        """Rows of scores for one layer of a plan: its kv heads, or one that serves for all of them."""
        return self.target.num_kv_heads if self.policy.prediction == "mixture" else 1

    def start(self, batch: int, num_slots: int, dtype: DTypeLike = jnp.float32) -> DraftScores:
        """Scores before the first draft step. They are kept in the draft's dtype: they only put entries in order."""
        shape = (batch, self.alignment.weights.shape[1] if self.policy.mixes_last else self._rows, num_slots)
        if self.policy.combine == "maximum":
            return DraftScores(maximum=jnp.zeros(shape, dtype), union=None)
        return DraftScores(maximum=None, union=jnp.zeros(shape, jnp.bool_))

    def update(
        self, scores: DraftScores, observed: Sequence[Float[Array, "B r S"]], lengths: Int32[Array, " B"]
    ) -> DraftScores:
        """Adds one draft step, made with `lengths` entries in the draft's cache."""
        rows = jnp.concatenate(observed, axis=1)
        if self.policy.prediction == "mixture" and not self.policy.mixes_last:
            rows = self._mix(self.alignment.weights, rows)
        if scores.maximum is not None:
            return DraftScores(jnp.maximum(scores.maximum, rows.astype(scores.maximum.dtype)), None)
        if scores.union is None:
            raise ValueError(_NO_SCORES)
        threshold = top_p_threshold(
            rows,
            self._row_p(lengths),
            lengths=lengths[:, None],
            method=self.policy.threshold,
            steps=self.policy.steps,
            implementation=self.implementation,
        )
        return DraftScores(None, scores.union | (rows >= threshold[..., None]))

    @property
    def scores_windows(self) -> bool:
        """Whether the draft's cache is scored once a window."""
        return self.policy.mixes_last and self.alignment.granularity == "kv_head"

    @property
    def drafts_sparsely(self) -> bool:
        """Whether the draft reads only a part of its cache."""
        return self.policy.draft_reads < 1.0

    def score(
        self, looks: Sequence[Look], cache: KVCache, past: Int32[Array, " B"], implementation: Implementation | None
    ) -> DraftScores:
        """Largest attention of every draft kv head over the steps of a window, kept in the draft's dtype.

        Args:
            looks: queries of the W steps and their log-sum-exps over what they read, one per draft layer. Where a draft
                read sparsely all weights of a query are a little too large, by what it left out, so that a step that
                left out more counts a little more.
            cache: the draft's.
            past: slots to score.
            implementation: backend of the op; None lets the library choose.
        """
        batch, heads, slots = cache.k[0].shape[:3]
        maximum = jnp.zeros((batch, heads * len(looks), slots), cache.k[0].dtype)
        for layer, (look, keys) in enumerate(zip(looks, cache.k, strict=True)):
            scores = score_cache(look.q, keys, look.lse, past, dtype=keys.dtype, implementation=implementation)
            # In place, where concatenating so many arrays would be slow.
            maximum = jax.lax.dynamic_update_slice_in_dim(maximum, scores, layer * heads, axis=1)
        return DraftScores(maximum=maximum, union=None)

    def draft_plan(self, scores: DraftScores, past: Int32[Array, " B"], window: int) -> SelectionPlan | None:
        """What the draft reads in the next window: for each of its kv heads what this window looked at most.

        The slots of all tokens that may be written until the end of that window belong to the recent window, whatever
        is accepted: they are read as soon as there is something in them.

        Args:
            scores: of this window.
            past: slots that were scored.
            window: W.
        """
        policy = self.policy
        if not self.drafts_sparsely or scores.maximum is None:
            return None
        slots = scores.maximum.shape[-1]
        new = 2 * (window + 1)
        share = jnp.maximum(policy.draft_reads, LEAST_DRAFT_ENTRIES / (past + new))
        recent = policy.num_recent + new
        return select_blocks(
            scores.maximum.reshape(past.shape[0], self.draft.num_layers, self.draft.num_kv_heads, slots),
            share[:, None, None],
            jnp.minimum(past + new, slots),
            block_size=policy.block_size,
            num_sink=policy.num_sink,
            num_recent=recent,
            measure="count",
            capacity=_draft_room(policy, slots, recent),
            implementation=self.implementation,
        )

    def _mix(self, weights: Float[Array, "rows R"], sources: Float[Array, "B R S"]) -> Float[Array, "B rows S"]:
        """Predicted attention of target kv heads, in the dtype of the sources."""
        return jnp.einsum("ar,brs->bas", weights.astype(sources.dtype), sources)

    def _row_p(
        self,
        past: Int32[Array, " B"],
        read: Float[Array, "B L"] | None = None,
        windows: Int32[Array, " B"] | None = None,
    ) -> Float[Array, "B rows"]:
        """Nucleus mass per row of the scores."""
        masses = self.mass.p(past, None if read is None else jnp.mean(read, axis=1), windows)
        if self.policy.prediction == "mixture":
            return jnp.repeat(masses, self._rows // masses.shape[1], axis=1)
        # Several target layers may share a draft layer: it takes the largest mass that any of them wants.
        pairs = list(enumerate(self.alignment.layer_map))[self.policy.dense_layers :]
        users = [[target for target, source in pairs if source == draft] for draft in self.observed_layers]
        return jnp.stack([jnp.max(masses[:, jnp.array(sharing)], axis=1) for sharing in users], axis=1)

    def plan(
        self,
        scores: DraftScores,
        past: Int32[Array, " B"],
        read: Float[Array, "B L"] | None = None,
        windows: Int32[Array, " B"] | None = None,
    ) -> tuple[SelectionPlan | None, ...]:
        """One plan per target layer (None: dense), over the first `past` slots of each sequence's cache.

        Args:
            scores: what all W draft steps said.
            past: entries in the target's cache.
            read: sum over the windows so far of the share read per layer, by which a wanted saving is met.
            windows: number of those windows.
        """
        if scores.maximum is not None:
            groups = self._select(scores.maximum, self._row_p(past, read, windows), past)
        elif scores.union is not None:
            forced = self._forced(scores.union, past)
            rows = compact_blocks(
                forced.reshape(forced.shape[0], -1, self._unit, forced.shape[-1]),
                block_size=self.policy.block_size,
                implementation=self.implementation,
            )
            groups = [rows]
        else:
            raise ValueError(_NO_SCORES)
        return tuple(
            None if layer < self.policy.dense_layers else self._layer_plan(groups, layer)
            for layer in range(self.target.num_layers)
        )

    def _select(
        self, scores: Float[Array, "B any S"], p: Float[Array, "B rows"], past: Int32[Array, " B"]
    ) -> list[SelectionPlan]:
        """Plans of all rows, in groups of equally many.

        Without kernels one group is selected after the other, because that takes several arrays of the size of the
        group's scores.
        """
        unit = self._unit
        units = self._rows // unit
        most = units if self._has_kernels(scores.shape) else _LAYERS_AT_ONCE
        size = unit * max(count for count in range(1, min(most, units) + 1) if units % count == 0)

        def select(first: Int32[Array, ""] | int) -> SelectionPlan:
            share = jax.lax.dynamic_slice_in_dim(p, first, size, axis=1)
            if self.policy.mixes_last:
                part = self._mix(jax.lax.dynamic_slice_in_dim(self.alignment.weights, first, size), scores)
            else:
                part = jax.lax.dynamic_slice_in_dim(scores, first, size, axis=1)
            batch, _, slots = part.shape
            return select_blocks(
                part.reshape(batch, -1, unit, slots),
                share.reshape(batch, -1, unit),
                past,
                block_size=self.policy.block_size,
                num_sink=self.policy.num_sink,
                num_recent=self.policy.num_recent,
                method=self.policy.threshold,
                steps=self.policy.steps,
                implementation=self.implementation,
            )

        if size == self._rows:
            return [select(0)]
        groups = jax.lax.map(select, jnp.arange(0, self._rows, size))
        return [jax.tree.map(lambda x, i=i: x[i], groups) for i in range(self._rows // size)]

    def _has_kernels(self, shape: tuple[int, ...]) -> bool:
        """Whether kernels select from all rows at once; they hold no arrays besides scores and ids.

        Args:
            shape: [B, any, S] of the scores, or of the sources that they are mixed from.
        """
        policy = self.policy
        call = SelectionCall("select_blocks", shape[0] * self._rows, shape[-1], policy.block_size, policy.threshold)
        chosen = self.implementation or choose_implementation(call, current_device()).name
        return chosen != "xla"

    def _forced(self, union: Bool[Array, "B rows S"], past: Int32[Array, " B"]) -> Bool[Array, "B rows blocks"]:
        """Blocks of a union of nuclei, with sinks and recent window, without what lies beyond the past."""
        slot, size = jnp.arange(union.shape[-1]), self.policy.block_size
        past = past[:, None, None]
        keep = union | (slot < self.policy.num_sink) | (slot >= past - self.policy.num_recent)
        keep &= slot < past
        padded = jnp.pad(keep, ((0, 0), (0, 0), (0, -keep.shape[-1] % size)))
        return jnp.any(padded.reshape(*keep.shape[:2], -1, size), axis=-1)

    def _layer_plan(self, groups: Sequence[SelectionPlan], layer: int) -> SelectionPlan:
        """The rows of one target layer, from plans of all rows in groups."""
        size = groups[0].counts.shape[1]
        if self.policy.prediction == "mixture":
            return groups[layer // size].at_layer(layer % size)
        row = self.observed_layers.index(self.alignment.layer_map[layer])
        one = groups[row // size].at_layer(row % size).take_layer()
        return jax.tree.map(lambda x: jnp.repeat(x, self.target.num_kv_heads, axis=1), one)


def _draft_room(policy: SelectionPolicy, slots: int, recent: int) -> int:
    """Most blocks that the draft reads of so many slots, of which so many belong to the recent window."""
    size = policy.block_size
    blocks = -(-slots // size)
    share = max(math.ceil(policy.draft_reads * blocks), -(-LEAST_DRAFT_ENTRIES // size)) + 1
    # Blocks that sinks and recent window touch come on top of the share.
    forced = -(-policy.num_sink // size) + -(-recent // size) + 1
    return min(blocks, share + forced)


def head_fraction(
    plans: Sequence[SelectionPlan | None], past: Int32[Array, " B"], num_kv_heads: int
) -> Float[Array, "B L K"]:
    """Share of the past that each kv head of each layer reads; where there is no plan, all of it."""
    whole = jnp.ones((past.shape[0], num_kv_heads), jnp.float32)
    return jnp.stack([whole if plan is None else _plan_fraction(plan, past) for plan in plans], axis=1)


def read_fraction(plans: Sequence[SelectionPlan | None], past: Int32[Array, " B"]) -> Float[Array, "B L"]:
    """Share of the past that each layer reads, averaged over kv heads; dense layers read all of it.

    `1 - mean` of this over layers and windows is the number called `kv_reduction`.
    """
    whole = jnp.ones(past.shape, jnp.float32)
    return jnp.stack(
        [whole if plan is None else jnp.mean(_plan_fraction(plan, past), axis=-1) for plan in plans], axis=1
    )


def _plan_fraction(plan: SelectionPlan, past: Int32[Array, " B"]) -> Float[Array, "B K"]:
    """Entries of the plan's blocks that lie in the past, over the past."""
    plan, size = plan.take_layer(), plan.block_size
    entries = plan.counts
    # Selected slots are of the past; of a block a part may be.
    if size > 1:
        listed = jnp.arange(plan.block_ids.shape[-1]) < plan.counts[..., None]
        inside = jnp.clip(past[:, None, None] - plan.block_ids * size, 0, size)
        entries = jnp.sum(jnp.where(listed, inside, 0), axis=-1)
    return entries / jnp.maximum(past[:, None], 1)


def past_mask(plan: SelectionPlan, past: Int32[Array, " B"], num_slots: int) -> Bool[Array, "B K S"]:
    """The slots of the past that a plan reads."""
    return plan_slots(plan, num_slots) & (jnp.arange(num_slots) < past[:, None, None])
