"""What decoding carries from window to window, and how a window's tokens are committed to it.

Invariants between windows, for a sequence of n committed tokens (prompt and output): the target has read n - 1 of them,
the draft at least n - 2, and both caches may hold leftovers beyond that.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Key
from specattn_kernels import lay

from specattn_jax.decoding.sampling import Verdict
from specattn_jax.models.cache import KVCache

TARGET_FAULT, DRAFT_FAULT = 1, 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Counts per sequence, windows after its end not included.

    Attributes:
        windows: verification passes.
        drafted: drafted tokens.
        accepted: drafted tokens accepted (the target's own token not counted).
        read: sum over windows of the share of the past that each target layer read.
        inner_windows: passes over few entries that stand between who proposes and verification, where there are any.
        inner_accepted: tokens that these accepted of who proposes to them.
    """

    windows: Int32[Array, " B"]
    drafted: Int32[Array, " B"]
    accepted: Int32[Array, " B"]
    read: Float[Array, "B L"]
    inner_windows: Int32[Array, " B"]
    inner_accepted: Int32[Array, " B"]

    @classmethod
    def start(cls, batch: int, num_layers: int) -> Statistics:
        """Nothing was done yet."""
        none = jnp.zeros((batch,), jnp.int32)
        return cls(none, none, none, jnp.zeros((batch, num_layers), jnp.float32), none, none)

    def add_inner(self, windows: Int32[Array, " B"], accepted: Int32[Array, " B"]) -> Statistics:
        """With so many inner windows more, and what they accepted."""
        return dataclasses.replace(
            self,
            inner_windows=self.inner_windows + windows,
            inner_accepted=self.inner_accepted + accepted,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything that decoding carries from window to window; donated to each call.

    Its structure does not change from a strategy's `start` to the end.

    Attributes:
        target_cache: the target's cache.
        draft_cache: the draft's cache; None where nobody needs one.
        last: the last two committed tokens, the newest second.
        output: new tokens; valid up to `emitted`.
        emitted: number of new tokens.
        limit: most new tokens wanted.
        done: whether a sequence reached its limit or a stop token.
        keys: one random key per sequence.
        statistics: what was done and read.
        fault: 0, or whose logits were no numbers: `TARGET_FAULT` or `DRAFT_FAULT`. It ends a sequence.
        history: which tokens the prompt and the output hold; None where nobody minds (see `Sampling.minds_history`).
        prompt: tokens of the prompts, each in the slot that the target read it into; None where nobody looks at them.
        own: what the strategy keeps for itself; `start` makes it.
    """

    target_cache: KVCache
    draft_cache: KVCache | None
    last: Int32[Array, "B 2"]
    output: Int32[Array, "B room"]
    emitted: Int32[Array, " B"]
    limit: Int32[Array, " B"]
    done: Bool[Array, " B"]
    keys: Key[Array, " B"]
    statistics: Statistics
    fault: Int32[Array, " B"]
    history: Bool[Array, "B V"] | None = None
    prompt: Int32[Array, "B S"] | None = None
    own: Any = ()

    def waiting(self, waits: Bool[Array, " B"] | None) -> DecodeState:
        """The same state, whose caches know which sequences wait; see `KVCache.waiting`."""
        draft = None if self.draft_cache is None else self.draft_cache.waiting(waits)
        return dataclasses.replace(self, target_cache=self.target_cache.waiting(waits), draft_cache=draft)


def begin(
    target_cache: KVCache,
    draft_cache: KVCache | None,
    last: Int32[Array, "B 2"],
    limit: Int32[Array, " B"],
    keys: Key[Array, " B"],
    *,
    room: int,
    stop_tokens: tuple[int, ...] = (),
    sound: Bool[Array, " B"] | None = None,
    history: Bool[Array, "B V"] | None = None,
    prompt: Int32[Array, "B S"] | None = None,
) -> DecodeState:
    """The state after prefill, before any strategy has started.

    Args:
        target_cache: holds the whole prompt.
        draft_cache: holds the whole prompt too, or None.
        last: each prompt's last token, and the first new one, which the target chose.
        limit: most new tokens per sequence, at least 1.
        keys: one random key per sequence.
        room: places in the output: the largest limit and all tokens that one window may write beyond it.
        stop_tokens: ids that end a sequence.
        sound: whether the target's logits after each prompt were; None is all.
        history: which tokens the prompts hold; None where nobody minds.
        prompt: tokens of the prompts, with room for all that comes behind them; None where nobody looks at them.
    """
    batch = limit.shape[0]
    fault = jnp.zeros((batch,), jnp.int32) if sound is None else jnp.where(sound, 0, TARGET_FAULT)
    small = {
        "last": last,
        "output": jnp.zeros((batch, room), jnp.int32).at[:, 0].set(last[:, 1]),
        "emitted": jnp.ones((batch,), jnp.int32),
        "limit": limit,
        "done": (limit <= 1) | is_stop(last[:, 1], stop_tokens) | (fault > 0),
        "keys": keys,
        "statistics": Statistics.start(batch, target_cache.num_layers),
        "fault": fault,
        "history": None if history is None else history.at[jnp.arange(batch), last[:, 1]].set(True),
        "prompt": prompt,
    }
    # From the beginning as every window leaves them, so that all calls are one program.
    return DecodeState(target_cache=target_cache, draft_cache=draft_cache, **lay(target_cache.split, small, "B"))


def note_faults(state: DecodeState, target: Bool[Array, " B"], draft: Bool[Array, " B"] | None = None) -> DecodeState:
    """The state with whose logits were not sound; the first fault of a sequence stays, and its end counts no more.

    Args:
        state: before the window is committed.
        target: whether the target's logits were sound.
        draft: whether the draft's were; None without one.
    """
    found = jnp.where(target, 0, TARGET_FAULT)
    if draft is not None:
        found = jnp.where(target & ~draft, DRAFT_FAULT, found)
    return dataclasses.replace(state, fault=jnp.where(state.done | (state.fault > 0), state.fault, found))


def is_stop(tokens: Int32[Array, "*batch"], stop_tokens: tuple[int, ...]) -> Bool[Array, "*batch"]:
    """Whether each token is one of the stop tokens."""
    if not stop_tokens:
        return jnp.zeros(tokens.shape, jnp.bool_)
    return jnp.any(tokens[..., None] == jnp.array(stop_tokens, jnp.int32), axis=-1)


def commit(
    state: DecodeState,
    verdict: Verdict,
    read: Float[Array, "B L"],
    *,
    drafted: int | Int32[Array, " B"],
    stop_tokens: tuple[int, ...],
) -> DecodeState:
    """Writes the decided tokens, stops at stop tokens and limits, and rolls both caches back to the committed length.

    Args:
        state: its caches hold the window's tokens behind their lengths.
        verdict: what was decided.
        read: share of the past that each target layer read.
        drafted: drafted tokens of the window that could be accepted.
        stop_tokens: ids that end a sequence; the id itself is kept in the output.
    """
    num_places = verdict.tokens.shape[1]
    place = jnp.arange(num_places)
    decided = verdict.accepted + 1
    stops = is_stop(verdict.tokens, stop_tokens) & (place < decided[:, None])
    until_stop = jnp.where(jnp.any(stops, axis=1), jnp.argmax(stops, axis=1) + 1, num_places)
    count = jnp.minimum(jnp.minimum(decided, until_stop), state.limit - state.emitted)
    count = jnp.where(state.done, 0, count)

    write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
    output = write(state.output, verdict.tokens, state.emitted)
    emitted = state.emitted + count
    newest = jnp.concatenate([state.last, verdict.tokens], axis=1)
    last = jnp.take_along_axis(newest, count[:, None] + jnp.arange(2), axis=1)
    ended = jnp.any(stops & (place < count[:, None]), axis=1)

    history = state.history
    if history is not None:
        batch = jnp.arange(len(count))[:, None]
        history = history.at[batch, verdict.tokens].max(place < count[:, None])

    lengths = state.target_cache.lengths + count
    active = ~state.done
    before = state.statistics
    statistics = dataclasses.replace(
        before,
        windows=before.windows + active,
        drafted=before.drafted + active * drafted,
        accepted=before.accepted + active * jnp.minimum(verdict.accepted, until_stop),
        read=before.read + active[:, None] * read,
    )
    return dataclasses.replace(
        state,
        target_cache=state.target_cache.at(lengths),
        draft_cache=None if state.draft_cache is None else state.draft_cache.at(lengths - 1),
        last=last,
        output=output,
        emitted=emitted,
        done=state.done | ended | (emitted >= state.limit) | (state.fault > 0),
        statistics=statistics,
        history=history,
    )
