"""The one loop over windows, whatever the strategy: to the end, or watched window by window."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from specattn_jax.decoding.protocol import Models, Strategy, WindowRecord
from specattn_jax.decoding.state import DecodeState

# Says what to keep of a window, made of arrays; is a pytree itself (by `register_static` where it has no arrays).
Keep: TypeAlias = Callable[[WindowRecord], Any]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class KeepHidden:
    """Keeps the hidden states that a window was verified with: of the last committed token, and of the drafted ones."""

    def __call__(self, record: WindowRecord) -> Float[Array, "B T D"]:
        """The target's hidden states of all T tokens that it read."""
        return record.hidden


@functools.partial(jax.jit, donate_argnames=("state",))
def start(strategy: Strategy, models: Models, state: DecodeState) -> DecodeState:
    """The strategy's own start, as a program of its own: after it all calls of a run have states of one structure."""
    return strategy.start(models, state)


@functools.partial(jax.jit, donate_argnames=("state",))
def decode(strategy: Strategy, models: Models, state: DecodeState, max_windows: Int32[Array, ""]) -> DecodeState:
    """Decodes until every sequence is done or `max_windows` windows have passed, without touching the host.

    Args:
        strategy: how.
        models: with what.
        state: where decoding stands, after `start`; donated.
        max_windows: windows in this call; streaming uses a few, so that text appears without a host round trip per
            token, and 0 only compiles.
    """

    def unfinished(carry: tuple[Int32[Array, ""], DecodeState]) -> Bool[Array, ""]:
        index, state = carry
        return (index < max_windows) & ~jnp.all(state.done)

    def advance(carry: tuple[Int32[Array, ""], DecodeState]) -> tuple[Int32[Array, ""], DecodeState]:
        index, state = carry
        return index + 1, _step(strategy, models, state)[0]

    return jax.lax.while_loop(unfinished, advance, (jnp.int32(0), state))[1]


@functools.partial(jax.jit, static_argnames=("windows",), donate_argnames=("state",))
def watch(
    strategy: Strategy, models: Models, state: DecodeState, keep: Keep, *, windows: int
) -> tuple[DecodeState, Any]:
    """Decodes so many windows, and keeps something of each; sequences that are done stay as they are.

    Args:
        strategy: how.
        models: with what.
        state: where decoding stands, after `start`; donated.
        keep: what to keep of each window.
        windows: how many.

    Returns:
        The state then, and what was kept, with the windows as the first axis of every array.
    """

    def advance(state: DecodeState, _: None) -> tuple[DecodeState, Any]:
        state, record = _step(strategy, models, state)
        return state, keep(record)

    return jax.lax.scan(advance, state, length=windows)


def _step(strategy: Strategy, models: Models, state: DecodeState) -> tuple[DecodeState, WindowRecord]:
    """One window. A batch goes on until its last sequence is done; for those that are, hardly anything is read."""
    state, record = strategy.step(models, state.waiting(state.done))
    return state.waiting(None), record
