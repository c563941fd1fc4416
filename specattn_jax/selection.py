"""Selection policies: from the draft's attention to the cache entries that each target layer reads."""

from __future__ import annotations

import dataclasses
import importlib.resources
import tomllib
from collections.abc import Sequence
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32
from specattn_kernels import (
    Implementation,
    SelectionPlan,
    compact_blocks,
    plan_slots,
    select_blocks,
    top_p_threshold,
)

from specattn_jax.alignment import Alignment, NucleusMass, reduce_heads
from specattn_jax.config import ModelConfig
from specattn_jax.errors import UserError
from specattn_jax.model import LayerChoice

# Layers for which is selected at a time.
_LAYERS_AT_ONCE = 8
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
            from the largest attention of each source, which moves fewer bytes.
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
    threshold: Literal["exact", "linear"] = "exact"
    steps: int = 10
    dense_layers: int = 0
    num_sink: int = 0
    num_recent: int = 0
    block_size: int = 1


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

    def observe(self, scores: Float[Array, "B T N S"]) -> Float[Array, "B r S"]:
        """Keeps of one draft layer's softmax weights what is needed."""
        ...

    def start(self, batch: int, num_slots: int) -> DraftScores:
        """Scores before the first draft step."""
        ...

    def update(
        self, scores: DraftScores, observed: Sequence[Float[Array, "B r S"]], lengths: Int32[Array, " B"]
    ) -> DraftScores:
        """Adds one draft step."""
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

    @property
    def observed_layers(self) -> tuple[int, ...]:
        """Draft layers whose attention is needed."""
        if self.policy.prediction == "mixture":
            return tuple(range(self.draft.num_layers))
        return tuple(sorted(set(self.alignment.layer_map[self.policy.dense_layers :])))

    def observe(self, scores: Float[Array, "B T N S"]) -> Float[Array, "B r S"]:
        """Keeps of one draft layer's softmax weights what the prediction uses, for the newest token."""
        granularity = self.alignment.granularity if self.policy.prediction == "mixture" else "layer"
        return reduce_heads(scores[:, -1], granularity, self.draft.num_kv_heads)

    @property
    def _rows(self) -> int:
        if self.policy.prediction == "mixture":
            return self.target.num_layers * self.target.num_kv_heads
        return len(self.observed_layers)

    @property
    def _mixes_last(self) -> bool:
        """Whether scores are of the sources until the plan is made."""
        policy = self.policy
        return policy.prediction == "mixture" and policy.combine == "maximum" and policy.mixing == "window"

    def start(self, batch: int, num_slots: int) -> DraftScores:
        """Scores before the first draft step."""
        shape = (batch, self.alignment.weights.shape[1] if self._mixes_last else self._rows, num_slots)
        if self.policy.combine == "maximum":
            return DraftScores(maximum=jnp.zeros(shape, jnp.float32), union=None)
        return DraftScores(maximum=None, union=jnp.zeros(shape, jnp.bool_))

    def update(
        self, scores: DraftScores, observed: Sequence[Float[Array, "B r S"]], lengths: Int32[Array, " B"]
    ) -> DraftScores:
        """Adds one draft step, made with `lengths` entries in the draft's cache."""
        rows = jnp.concatenate(observed, axis=1)
        if self.policy.prediction == "mixture" and not self._mixes_last:
            rows = self._mix(self.alignment.weights, rows)
        if scores.maximum is not None:
            return DraftScores(jnp.maximum(scores.maximum, rows), None)
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

    def _mix(self, weights: Float[Array, "rows R"], sources: Float[Array, "B R S"]) -> Float[Array, "B rows S"]:
        """Predicted attention of target kv heads."""
        return jnp.einsum("ar,brs->bas", weights, sources)

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
            rows = compact_blocks(
                self._forced(scores.union, past),
                block_size=self.policy.block_size,
                implementation=self.implementation,
            )
            groups = jax.tree.map(lambda x: x[None], rows)
        else:
            raise ValueError(_NO_SCORES)
        return tuple(
            None if layer < self.policy.dense_layers else self._layer_plan(groups, layer)
            for layer in range(self.target.num_layers)
        )

    def _select(
        self, scores: Float[Array, "B any S"], p: Float[Array, "B rows"], past: Int32[Array, " B"]
    ) -> SelectionPlan:
        """Plans of all rows, in groups along a new first axis.

        One group is selected after the other, because that takes several arrays of the size of the group's scores.
        """
        unit = self.target.num_kv_heads if self.policy.prediction == "mixture" else 1
        units = self._rows // unit
        size = unit * max(count for count in range(1, _LAYERS_AT_ONCE + 1) if units % count == 0)

        def select(first: Int32[Array, ""]) -> SelectionPlan:
            share = jax.lax.dynamic_slice_in_dim(p, first, size, axis=1)
            if self._mixes_last:
                part = self._mix(jax.lax.dynamic_slice_in_dim(self.alignment.weights, first, size), scores)
            else:
                part = jax.lax.dynamic_slice_in_dim(scores, first, size, axis=1)
            return select_blocks(
                part,
                share,
                past,
                block_size=self.policy.block_size,
                num_sink=self.policy.num_sink,
                num_recent=self.policy.num_recent,
                method=self.policy.threshold,
                steps=self.policy.steps,
                implementation=self.implementation,
            )

        return jax.lax.map(select, jnp.arange(0, self._rows, size))

    def _forced(self, union: Bool[Array, "B rows S"], past: Int32[Array, " B"]) -> Bool[Array, "B rows blocks"]:
        """Blocks of a union of nuclei, with sinks and recent window, without what lies beyond the past."""
        slot, size = jnp.arange(union.shape[-1]), self.policy.block_size
        past = past[:, None, None]
        keep = union | (slot < self.policy.num_sink) | (slot >= past - self.policy.num_recent)
        keep &= slot < past
        padded = jnp.pad(keep, ((0, 0), (0, 0), (0, -keep.shape[-1] % size)))
        return jnp.any(padded.reshape(*keep.shape[:2], -1, size), axis=-1)

    def _layer_plan(self, groups: SelectionPlan, layer: int) -> SelectionPlan:
        """The rows of one target layer, from plans of all rows in groups."""
        heads, size = self.target.num_kv_heads, groups.counts.shape[2]
        if self.policy.prediction == "mixture":
            begin, width, copies = layer * heads, heads, 1
        else:
            begin, width, copies = self.observed_layers.index(self.alignment.layer_map[layer]), 1, heads
        here = slice(begin % size, begin % size + width)
        ids, counts = (jnp.repeat(x[begin // size, :, here], copies, axis=1) for x in (groups.block_ids, groups.counts))
        return SelectionPlan(ids, counts, groups.block_size)


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
    size = plan.block_size
    listed = jnp.arange(plan.block_ids.shape[-1]) < plan.counts[..., None]
    inside = jnp.clip(past[:, None, None] - plan.block_ids * size, 0, size)
    return jnp.sum(jnp.where(listed, inside, 0), axis=-1) / jnp.maximum(past[:, None], 1)


def past_mask(plan: SelectionPlan, past: Int32[Array, " B"], num_slots: int) -> Bool[Array, "B K S"]:
    """The slots of the past that a plan reads."""
    return plan_slots(plan, num_slots) & (jnp.arange(num_slots) < past[:, None, None])
