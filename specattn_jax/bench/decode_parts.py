"""Time of the parts of a window, each alone in a jitted loop: draft, select, verify."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, PRNGKeyArray
from specattn_kernels import SelectionPlan

from specattn_jax.bench.decode_workload import Workload
from specattn_jax.decoding.drafting import Drafted, draft_window
from specattn_jax.decoding.speculative import (
    DecodeSettings,
    DecodeState,
    WindowRead,
    judge_window,
)
from specattn_jax.models.cache import KVCache
from specattn_jax.models.forward import forward
from specattn_jax.models.transformer import LanguageModel, LayerChoice
from specattn_jax.selection.TODO import DraftScores, Selector, read_fraction
from specattn_jax.timing import TimingSettings

# More calls of a part in one loop tell nothing more.
_MAX_ROUNDS = 64
PARTS = ("draft", "select", "verify", "rest")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Shared:
    """Values of which several hold the same arrays, such as the plans of all layers; each array is there once."""

    arrays: tuple[Array, ...]
    places: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    structure: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, values: Any) -> _Shared:
        leaves, structure = jax.tree.flatten(values)
        unique = {id(leaf): leaf for leaf in leaves}
        order = list(unique)
        return cls(tuple(unique.values()), tuple(order.index(id(leaf)) for leaf in leaves), structure)

    def values(self) -> Any:
        return jax.tree.unflatten(self.structure, [self.arrays[place] for place in self.places])


def time_parts(
    workload: Workload, selector: Selector | None, settings: DecodeSettings, timing: TimingSettings
) -> dict[str, float]:
    """Seconds of each part of a window at the case's context.

    `draft` is all W draft steps, the scores of its cache, and the choice of what it reads in the next window; `select`
    the plans of all target layers, and what share they read; `verify` the target's pass, its logits, the verdict and
    the commitment. Each is measured in a loop of its own, one round waiting for the other.

    Args:
        workload: models and caches, which are borrowed.
        selector: what is read; None is everything.
        settings: of the method.
        timing: how long to measure.
    """
    seconds = {}
    state = workload.start(settings, selector)
    assert state.draft_cache is not None
    past = state.target_cache.lengths
    box = {"cache": state.draft_cache.at_lengths(past - 1)}
    draft, target = workload.pair.draft, workload.pair.target
    scores = None

    def draft_rounds(rounds: int) -> None:
        nonlocal scores
        box["cache"], last, scores = _draft_rounds(
            draft,
            box["cache"],
            state.last,
            state.keys,
            selector,
            state.draft_plan,
            jnp.int32(rounds),
            settings=settings,
            vocab_size=target.config.vocab_size,
        )
        jax.block_until_ready(last)

    seconds["draft"] = _time_rounds(draft_rounds, timing)
    workload.give_back(draft_cache=box["cache"])

    plans, read = None, jnp.ones_like(state.statistics.read)
    seconds["select"] = 0.0
    if selector is not None and scores is not None:
        plans, read = _select_rounds(selector, scores, past, jnp.int32(1))
        if plans.arrays:

            def select_rounds(rounds: int) -> None:
                jax.block_until_ready(_select_rounds(selector, scores, past, jnp.int32(rounds))[1])

            seconds["select"] = _time_rounds(select_rounds, timing)
    seconds["verify"] = _time_verification(workload, plans, read, settings, timing)
    return seconds


def _time_verification(
    workload: Workload, plans: _Shared | None, read: Array, settings: DecodeSettings, timing: TimingSettings
) -> float:
    """Seconds of the target's part of a window."""
    state = dataclasses.replace(workload.start(settings), draft_cache=None)
    drafted = jnp.tile(jnp.arange(settings.window, dtype=jnp.int32), (state.last.shape[0], 1))

    def rounds(count: int) -> None:
        nonlocal state
        state = _verify_rounds(workload.pair.target, state, drafted, plans, read, jnp.int32(count), settings=settings)
        jax.block_until_ready(state.last)

    seconds = _time_rounds(rounds, timing)
    workload.give_back(state.target_cache)
    return seconds


def _time_rounds(call: Callable[[int], None], timing: TimingSettings) -> float:
    """Median seconds of one round."""

    def seconds(rounds: int) -> float:
        began = time.perf_counter()
        call(rounds)
        return time.perf_counter() - began

    call(1)
    rounds = max(1, min(_MAX_ROUNDS, round(timing.seconds / seconds(1))))
    call(rounds)
    return statistics.median(seconds(rounds) / rounds for _ in range(timing.repeats))


@functools.partial(jax.jit, static_argnames=("settings", "vocab_size"), donate_argnames=("cache",))
def _draft_rounds(
    draft: LanguageModel,
    cache: KVCache,
    last: Int32[Array, "B 2"],
    keys: PRNGKeyArray,
    selector: Selector | None,
    plan: SelectionPlan | None,
    rounds: Int32[Array, ""],
    *,
    settings: DecodeSettings,
    vocab_size: int,
) -> tuple[KVCache, Int32[Array, "B 2"], DraftScores | None]:
    """Drafts the same window over and over, each from the tokens of the one before; scores of the last."""

    def once(carry: _DraftCarry) -> _DraftCarry:
        drafted = draft_window(
            draft,
            carry.cache,
            carry.last,
            keys,
            selector,
            window=settings.window,
            sampling=settings.sampling,
            vocab_size=vocab_size,
            plan=carry.plan,
            implementation=settings.implementation,
        )
        last = jnp.concatenate([carry.last, drafted.tokens], axis=1)[:, -2:]
        return _DraftCarry(drafted.cache, last, drafted.next_plan, drafted.scores)

    # Scores are carried along, or none of them would be computed but the last.
    begin = _DraftCarry(cache, last, plan, None)
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(once, begin).scores)
    end = lax.fori_loop(0, rounds, lambda _, carry: once(carry), begin._replace(scores=empty))
    return end.cache, end.last, end.scores


class _DraftCarry(NamedTuple):
    """What goes from one drafted window to the next."""

    cache: KVCache
    last: Int32[Array, "B 2"]
    plan: SelectionPlan | None
    scores: DraftScores | None


@jax.jit
def _select_rounds(
    selector: Selector, scores: DraftScores, past: Int32[Array, " B"], rounds: Int32[Array, ""]
) -> tuple[_Shared, Float[Array, "B L"]]:
    """Selects over and over, from the same scores."""

    def once(scores: DraftScores) -> tuple[_Shared, Float[Array, "B L"]]:
        plans = selector.plan(scores, past)
        return _Shared.of(plans), read_fraction(plans, past)

    def again(_: Array, carry: Any) -> Any:
        # The compiler must not know that the scores are the same.
        scores, _ = lax.optimization_barrier(carry)
        return scores, once(scores)

    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(once, scores))
    return lax.fori_loop(0, rounds, again, (scores, empty))[1]


@functools.partial(jax.jit, static_argnames=("settings",), donate_argnames=("state",))
def _verify_rounds(
    target: LanguageModel,
    state: DecodeState,
    drafted: Int32[Array, "B W"],
    plans: _Shared | None,
    read: Float[Array, "B L"],
    rounds: Int32[Array, ""],
    *,
    settings: DecodeSettings,
) -> DecodeState:
    """Verifies the same drafted tokens over and over, each time after other committed ones, at the same lengths."""
    past, emitted = state.target_cache.lengths, state.emitted

    def once(_: Array, state: DecodeState) -> DecodeState:
        last, shared = lax.optimization_barrier((state.last, plans))
        choices: tuple[LayerChoice, ...] | None = None if shared is None else shared.values()
        out = forward(
            target,
            jnp.concatenate([last[:, 1:], drafted], axis=1),
            state.target_cache,
            plans=choices,
            implementation=settings.implementation,
        )
        proposed = Drafted(drafted, None, state.draft_cache, None)  # type: ignore[arg-type]
        window = WindowRead(proposed, out.hidden, out.cache.at_lengths(past), read, out.plans, out.kept)
        state = judge_window(target, state, window, state.keys, settings)
        return dataclasses.replace(state, target_cache=state.target_cache.at_lengths(past), emitted=emitted)

    return lax.fori_loop(0, rounds, once, state)
