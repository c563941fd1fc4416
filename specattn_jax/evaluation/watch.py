"""Which plans a selection really made: watched from inside a window, for numbers and pictures per kv head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32
from specattn_kernels import SelectionPlan

from specattn_jax.model import LayerChoice, LayerPlanner
from specattn_jax.selection import Selection


class Watched:
    """A selection that remembers the plans of one window, because a window itself returns only what they cost.

    It holds values of the trace that it was used in, so it must not outlive the function that made it.

    Attributes:
        plans: what each target layer read; None is everything.
    """

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self.plans: list[SelectionPlan | None] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._selection, name)

    def plan(self, *args: Any, **kwargs: Any) -> tuple[LayerChoice, ...]:
        """The selection's own choices."""
        choices = self._selection.plan(*args, **kwargs)
        self.plans = [None if callable(choice) else choice for choice in choices]
        return tuple(
            self._remember(layer, choice) if callable(choice) else choice for layer, choice in enumerate(choices)
        )

    def _remember(self, layer: int, choose: LayerPlanner) -> LayerPlanner:
        """The same planner, whose plan is kept."""

        def keep(q: Float[Array, "B T N H"], keys: Float[Array, "B K S H"], past: Int32[Array, " B"]) -> SelectionPlan:
            plan = choose(q, keys, past)
            self.plans[layer] = plan
            return plan

        return keep

    def as_selection(self) -> Selection:
        """Itself; everything but `plan` is passed on, which type checkers cannot see."""
        return cast(Selection, self)


def head_fraction(
    plans: Sequence[SelectionPlan | None], past: Int32[Array, " B"], num_kv_heads: int
) -> Float[Array, "B L K"]:
    """Share of the past that each kv head reads; its mean over heads is `selection.read_fraction`."""
    whole = jnp.ones((past.shape[0], num_kv_heads), jnp.float32)
    return jnp.stack([whole if plan is None else _plan_fraction(plan, past) for plan in plans], axis=1)


def _plan_fraction(plan: SelectionPlan, past: Int32[Array, " B"]) -> Float[Array, "B K"]:
    """Entries of the plan's blocks that lie in the past, over the past."""
    listed = jnp.arange(plan.block_ids.shape[-1]) < plan.counts[..., None]
    inside = jnp.clip(past[:, None, None] - plan.block_ids * plan.block_size, 0, plan.block_size)
    return jnp.sum(jnp.where(listed, inside, 0), axis=-1) / jnp.maximum(past[:, None], 1)
