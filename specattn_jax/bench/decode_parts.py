"""Time of the parts of a window, each alone in a jitted loop: draft, select, verify."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from specattn_jax.bench.decode_methods import DraftOnly
from specattn_jax.bench.decode_workload import Workload
from specattn_jax.decoding.drafting import Drafted, draft_window
from specattn_jax.decoding.protocol import newest
from specattn_jax.decoding.sampling import choose
from specattn_jax.decoding.speculative import Speculative, Verified
from specattn_jax.decoding.state import DecodeState
from specattn_jax.models.forward import forward
from specattn_jax.selection.protocol import Seen
from specattn_jax.selection.reads import attend_as_chosen
from specattn_jax.timing import TimingSettings

# More calls of a part in one loop tell nothing more.
_MAX_ROUNDS = 64


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
    workload: Workload, strategy: Speculative, state: DecodeState, timing: TimingSettings
) -> dict[str, float]:
    """Seconds of each part of a window at the case's context.

    `draft` is all W draft steps, and what the selection does for the draft: the scores of its cache, and the choice of
    what it reads in the next window; `select` the plans of all target layers, and the scores where the draft itself
    needs none; `verify` the target's pass, its logits, the verdict and the commitment. Each is measured in a loop of
    its own, one round waiting for the other.

    Args:
        workload: models and caches.
        strategy: what a window consists of.
        state: started; its caches are given back.
        timing: how long to measure.
    """
    models = workload.session.models
    # Of its own: those of the state are donated.
    past = jnp.full_like(state.target_cache.lengths, workload.case.context)
    drafting = dataclasses.replace(strategy, selection=DraftOnly(strategy.selection))
    draft, state = _time_rounds(_draft, (drafting, models), state, timing)
    plans, select = _time_selection((strategy.selection, state.own, state.draft_cache, past), timing)
    verify, state = _time_rounds(_verify, (strategy, models, plans, past), state, timing)
    workload.give_back(state)
    return {"draft": draft, "select": select, "verify": verify}


def _time_selection(fixed: tuple[Any, ...], timing: TimingSettings) -> tuple[_Shared, float]:
    """What a selection gives from its state on, and the seconds of what is for the target."""
    selection, *rest = fixed
    plans = _nothing(_plan_once, *fixed)
    if plans.values()[0] is None:
        return plans, 0.0
    whole, plans = _time_rounds(_plan, fixed, plans, timing)
    own = DraftOnly(selection), *rest
    return plans, max(0.0, whole - _time_rounds(_plan, own, _nothing(_plan_once, *own), timing)[0])


def _time_rounds(part: Callable[[Any, Any], Any], fixed: Any, carry: Any, timing: TimingSettings) -> tuple[float, Any]:
    """Median seconds of one round, and what came out of the last."""

    def seconds(rounds: int) -> float:
        nonlocal carry
        began = time.perf_counter()
        carry = jax.block_until_ready(_repeat(part, fixed, carry, jnp.int32(rounds)))
        return time.perf_counter() - began

    # Twice: on a mesh what comes out may lie otherwise than what went in, which is another program.
    seconds(1)
    seconds(1)
    rounds = max(1, min(_MAX_ROUNDS, round(timing.seconds / seconds(1))))
    seconds(rounds)
    return statistics.median(seconds(rounds) / rounds for _ in range(timing.repeats)), carry


@functools.partial(jax.jit, static_argnames=("part",), donate_argnames=("carry",))
def _repeat(part: Callable[[Any, Any], Any], fixed: Any, carry: Any, rounds: Int32[Array, ""]) -> Any:
    """A part of a window over and over; all that it gives is carried along, or none would be computed but the last."""
    return lax.fori_loop(0, rounds, lambda _, carry: part(fixed, carry), carry)


def _nothing(function: Callable[..., Any], *arguments: Any) -> Any:
    """Zeros like what a function returns."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, *arguments))


def _draft(fixed: Any, state: DecodeState) -> DecodeState:
    """Drafts the same window, from the tokens of the one before."""
    strategy, models = fixed
    past = state.target_cache.lengths
    assert state.draft_cache is not None
    drafted = draft_window(
        models.draft,
        state.draft_cache.at(past - 1),
        state.last,
        state.keys,
        strategy.selection,
        state.own,
        window=strategy.window,
        choose=lambda _, key, logits: choose(key, logits, strategy.settings.sampling),
        vocab_size=models.target.config.vocab_size,
        sampling=strategy.settings.sampling,
    )
    _, own = strategy.selection.plan(drafted.selection_state, drafted.cache, past)
    last = jnp.concatenate([state.last, drafted.tokens], axis=1)[:, -2:]
    return dataclasses.replace(state, draft_cache=drafted.cache, last=last, own=own)


def _plan_once(selection: Any, own: Any, draft_cache: Any, past: Int32[Array, " B"]) -> _Shared:
    """What is chosen, and the state of the selection after it."""
    return _Shared.of(selection.plan(own, draft_cache, past))


def _plan(fixed: Any, before: _Shared) -> _Shared:
    """Selects, from the same state each time."""
    selection, own, draft_cache, past = fixed
    # The compiler must not know that it is the same.
    (own, past), _ = lax.optimization_barrier(((own, past), before))
    return _plan_once(selection, own, draft_cache, past)


def _verify(fixed: Any, state: DecodeState) -> DecodeState:
    """Verifies the same drafted tokens, each time after other committed ones, at the same lengths."""
    strategy, models, plans, past = fixed
    emitted, keys = state.emitted, state.keys
    drafted = jnp.tile(jnp.arange(strategy.window, dtype=jnp.int32), (past.shape[0], 1))
    last, plans = lax.optimization_barrier((state.last, plans))
    state = dataclasses.replace(state, last=last)
    tokens = jnp.concatenate([newest(state), drafted], axis=1)
    read = forward(models.target, tokens, state.target_cache, attend_as_chosen(plans.values()[0]))
    seen = Seen(past, ~state.done, read.notes, read.cache.at(past))
    proposed = Drafted(drafted, None, ~state.done, state.draft_cache, state.own)  # type: ignore[arg-type]
    window = Verified(proposed, seen, read.hidden, strategy.selection.learn(state.own, seen))
    logits = models.target.logits(read.hidden)
    verdict = strategy.judge(keys, drafted, None, logits, strategy.settings.sampling, state.statistics.windows)
    state, _ = strategy.finish(state, window, verdict)
    return dataclasses.replace(state, target_cache=state.target_cache.at(past), emitted=emitted)
