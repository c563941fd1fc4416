"""Draft, select, verify, roll back: one window of speculative decoding, and the jitted loop over windows.

Invariants between windows, for a sequence of n committed tokens (prompt and output): the target has read n - 1 of them,
the draft at least n - 2, and both caches may hold leftovers beyond that. Every draft step re-reads the second-last
token, so a window in which all drafted tokens were accepted needs no catch-up call.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray
from specattn_kernels import Implementation, SelectionPlan

from specattn_jax.decoding.drafting import Drafted, draft_window
from specattn_jax.decoding.sampling import Sampling, Verdict, choose, verify
from specattn_jax.errors import UserError
from specattn_jax.models.cache import KVCache
from specattn_jax.models.transformer import LanguageModel, LayerReader, forward
from specattn_jax.selection.policies import Selection, past_mask, read_fraction

Mode = Literal["autoregressive", "speculative", "specattn"]
# Far beyond what pays: the chance that a token is accepted falls with every one before it.
MAX_WINDOW = 64
MODES: tuple[Mode, ...] = ("autoregressive", "speculative", "specattn")


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
    """What is fixed while decoding; static under jit.

    Attributes:
        mode: `autoregressive` (target alone), `speculative` (dense verification), `specattn` (sparse verification).
        window: W, tokens drafted per window.
        sampling: how tokens are drawn.
        stop_tokens: ids that end a sequence; the id itself is kept in the output.
        implementation: backend of the attention ops of both models; None lets the library choose. That of the
            selection is `Selector.implementation`.
        imposed_acceptance: for benchmarks with random weights, which would accept nothing: drafted tokens, 0 to W, that
            count as accepted in each window of a sequence, over and over. The verdict is computed all the same, and the
            tokens are its own, so that only the count is not. Empty leaves the count to the verdict too; without
            meaning in mode `autoregressive`.
    """

    mode: Mode = "specattn"
    window: int = 5
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop_tokens: tuple[int, ...] = ()
    implementation: Implementation | None = None
    imposed_acceptance: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"mode is {self.mode!r}; expected one of {', '.join(MODES)}.")
        if not 1 <= self.window <= MAX_WINDOW:
            raise UserError(f"window is {self.window}; expected 1 to {MAX_WINDOW} drafted tokens per window.")
        if not all(0 <= count <= self.window for count in self.imposed_acceptance):
            raise UserError(
                f"imposed_acceptance is {self.imposed_acceptance}; expected counts from 0 to the window's "
                f"{self.window} drafted tokens."
            )

    @property
    def tokens_per_window(self) -> int:
        """Most tokens that one window can commit."""
        return 1 if self.mode == "autoregressive" else self.window + 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Counts per sequence, windows after its end not included.

    Attributes:
        windows: verification passes.
        drafted: drafted tokens.
        accepted: drafted tokens accepted (the target's own token not counted).
        read: sum over windows of the share of the past that each target layer read.
    """

    windows: Int32[Array, " B"]
    drafted: Int32[Array, " B"]
    accepted: Int32[Array, " B"]
    read: Float[Array, "B L"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything that decoding carries from window to window; donated to each call.

    Attributes:
        target_cache: the target's cache.
        draft_cache: the draft's cache; None in autoregressive mode.
        last: the last two committed tokens, the newest second.
        output: new tokens; valid up to `emitted`.
        emitted: number of new tokens.
        limit: most new tokens wanted.
        done: whether a sequence reached its limit or a stop token.
        keys: one random key per sequence.
        statistics: what was done and read.
        draft_plan: what the draft reads in the next window, where it reads sparsely; None before the first such window
            (see `plan_first_window`), and where it reads everything.
    """

    target_cache: KVCache
    draft_cache: KVCache | None
    last: Int32[Array, "B 2"]
    output: Int32[Array, "B room"]
    emitted: Int32[Array, " B"]
    limit: Int32[Array, " B"]
    done: Bool[Array, " B"]
    keys: PRNGKeyArray
    statistics: Statistics
    draft_plan: SelectionPlan | None = None


@functools.partial(jax.jit, static_argnames=("settings", "room"), donate_argnames=("target_cache", "draft_cache"))
def start_decoding(
    target: LanguageModel,
    hidden: Float[Array, "B D"],
    target_cache: KVCache,
    draft_cache: KVCache | None,
    last_prompt_token: Int32[Array, " B"],
    limit: Int32[Array, " B"],
    keys: PRNGKeyArray,
    *,
    settings: DecodeSettings,
    room: int,
) -> DecodeState:
    """State after prefill: the first new token is the target's own, from the prompt's last hidden state.

    Args:
        target: the target.
        hidden: the target's hidden state of each prompt's last token.
        target_cache: holds the whole prompt.
        draft_cache: holds the whole prompt too, or None.
        last_prompt_token: each prompt's last token.
        limit: most new tokens per sequence, at least 1.
        keys: one random key per sequence.
        settings: decoding settings.
        room: largest `limit`, static.
    """
    batch = limit.shape[0]
    split = jax.vmap(jax.random.split)(keys)
    first, _ = choose(split[:, 0], target.logits(hidden), settings.sampling)
    output = jnp.zeros((batch, room + settings.tokens_per_window), jnp.int32).at[:, 0].set(first)
    none = jnp.zeros((batch,), jnp.int32)
    return DecodeState(
        target_cache=target_cache,
        draft_cache=draft_cache,
        last=jnp.stack([last_prompt_token, first], axis=1),
        output=output,
        emitted=jnp.ones((batch,), jnp.int32),
        limit=limit,
        done=(limit <= 1) | _is_stop(first, settings.stop_tokens),
        keys=split[:, 1],
        statistics=Statistics(none, none, none, jnp.zeros((batch, target.config.num_layers), jnp.float32)),
    )


def _is_stop(tokens: Int32[Array, "*batch"], stop_tokens: tuple[int, ...]) -> Bool[Array, "*batch"]:
    """Whether each token is one of the stop tokens."""
    if not stop_tokens:
        return jnp.zeros(tokens.shape, jnp.bool_)
    return jnp.any(tokens[..., None] == jnp.array(stop_tokens, jnp.int32), axis=-1)


def _commit(
    state: DecodeState,
    verdict: Verdict,
    read: Float[Array, "B L"],
    settings: DecodeSettings,
) -> DecodeState:
    """Writes the decided tokens, stops at stop tokens and limits, and rolls both caches to the committed length."""
    num_places = verdict.tokens.shape[1]
    place = jnp.arange(num_places)
    decided = verdict.accepted + 1
    stops = _is_stop(verdict.tokens, settings.stop_tokens) & (place < decided[:, None])
    until_stop = jnp.where(jnp.any(stops, axis=1), jnp.argmax(stops, axis=1) + 1, num_places)
    count = jnp.minimum(jnp.minimum(decided, until_stop), state.limit - state.emitted)
    count = jnp.where(state.done, 0, count)

    write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
    output = write(state.output, verdict.tokens, state.emitted)
    emitted = state.emitted + count
    history = jnp.concatenate([state.last, verdict.tokens], axis=1)
    last = jnp.take_along_axis(history, count[:, None] + jnp.arange(2), axis=1)
    ended = jnp.any(stops & (place < count[:, None]), axis=1)

    lengths = state.target_cache.lengths + count
    active = ~state.done
    drafted = 0 if settings.mode == "autoregressive" else settings.window
    before = state.statistics
    statistics = Statistics(
        windows=before.windows + active,
        drafted=before.drafted + active * drafted,
        accepted=before.accepted + active * jnp.minimum(verdict.accepted, until_stop),
        read=before.read + active[:, None] * read,
    )
    return dataclasses.replace(
        state,
        target_cache=state.target_cache.at_lengths(lengths),
        draft_cache=None if state.draft_cache is None else state.draft_cache.at_lengths(lengths - 1),
        last=last,
        output=output,
        emitted=emitted,
        done=state.done | ended | (emitted >= state.limit),
        statistics=statistics,
    )


def autoregressive_step(target: LanguageModel, state: DecodeState, settings: DecodeSettings) -> DecodeState:
    """One token from the target alone."""
    split = jax.vmap(jax.random.split)(state.keys)
    past = state.target_cache.lengths
    out = forward(target, state.last[:, 1:], state.target_cache, implementation=settings.implementation)
    token, _ = choose(split[:, 0], target.logits(out.hidden[:, -1]), settings.sampling)
    state = dataclasses.replace(state, target_cache=out.cache.at_lengths(past), keys=split[:, 1])
    everything = jnp.ones_like(state.statistics.read)
    return _commit(state, Verdict(token[:, None], jnp.zeros_like(past)), everything, settings)


class WindowRead(NamedTuple):
    """One window, drafted and read by the target, not yet judged.

    Attributes:
        drafted: what the draft proposed, with its cache.
        hidden: the target's hidden states of the last committed token and the W drafted ones.
        cache: the target's cache, with those tokens, lengths unchanged.
        read: share of the past that each target layer read.
        plans: what each target layer read; None is everything. Empty without a selector.
        kept: what `reader` kept, one value per target layer; empty without a reader.
    """

    drafted: Drafted
    hidden: Float[Array, "B T D"]
    cache: KVCache
    read: Float[Array, "B L"]
    plans: tuple[SelectionPlan | None, ...]
    kept: tuple[Any, ...]


def plan_first_window(
    draft: LanguageModel, selector: Selection | None, state: DecodeState, settings: DecodeSettings
) -> DecodeState:
    """The state with what the draft reads in the first window, from one dense pass over its last two tokens.

    Nothing changes where there is a plan already, or where the draft reads everything.
    """
    if selector is None or not selector.drafts_sparsely or state.draft_plan is not None or state.draft_cache is None:
        return state
    past = state.target_cache.lengths
    out = forward(
        draft,
        state.last,
        state.draft_cache.at_lengths(past - 1),
        keep_looks=True,
        implementation=settings.implementation,
    )
    scores = selector.score(out.looks, out.cache, past, settings.implementation)
    return dataclasses.replace(
        state,
        draft_cache=out.cache.at_lengths(state.draft_cache.lengths),
        draft_plan=selector.draft_plan(scores, past, settings.window),
    )


def read_window(
    target: LanguageModel,
    draft: LanguageModel,
    selector: Selection | None,
    state: DecodeState,
    keys: PRNGKeyArray,
    settings: DecodeSettings,
    forced: Int32[Array, "B W"] | None = None,
    reader: LayerReader | None = None,
) -> WindowRead:
    """Drafts W tokens, selects what to read (with a selector), and reads them with the target in one pass.

    Evaluation may force the tokens, and attend in the target's place (`reader`) to see what was read.
    """
    state = plan_first_window(draft, selector, state, settings)
    if state.draft_cache is None:
        raise ValueError("state.draft_cache is None; speculative modes need the draft's cache.")
    past = state.target_cache.lengths
    drafted = draft_window(
        draft,
        state.draft_cache.at_lengths(past - 1),
        state.last,
        keys,
        selector,
        plan=state.draft_plan,
        window=settings.window,
        sampling=settings.sampling,
        vocab_size=target.config.vocab_size,
        forced=forced,
        implementation=settings.implementation,
    )
    plans = None
    if selector is not None and drafted.scores is not None:
        plans = selector.plan(drafted.scores, past, state.statistics.read, state.statistics.windows)
    tokens = jnp.concatenate([state.last[:, 1:], drafted.tokens], axis=1)
    out = forward(
        target,
        tokens,
        state.target_cache,
        plans=plans,
        reader=reader,
        implementation=settings.implementation,
    )
    read = jnp.ones_like(state.statistics.read) if plans is None else read_fraction(out.plans, past)
    return WindowRead(drafted, out.hidden, out.cache.at_lengths(past), read, out.plans, out.kept)


def speculative_step(
    target: LanguageModel,
    draft: LanguageModel,
    selector: Selection | None,
    state: DecodeState,
    settings: DecodeSettings,
) -> tuple[DecodeState, WindowRead]:
    """One window: draft, select, read, accept or reject, roll back; besides, what was read."""
    split = jax.vmap(lambda key: jax.random.split(key, 3))(state.keys)
    window = read_window(target, draft, selector, state, split[:, 0], settings)
    state = dataclasses.replace(state, keys=split[:, 2])
    return judge_window(target, state, window, split[:, 1], settings), window


def judge_window(
    target: LanguageModel, state: DecodeState, window: WindowRead, keys: PRNGKeyArray, settings: DecodeSettings
) -> DecodeState:
    """The second half of a window that was read: accept or reject, commit, roll both caches back."""
    drafted = window.drafted
    verdict = verify(keys, drafted.tokens, drafted.probs, target.logits(window.hidden), settings.sampling)
    if settings.imposed_acceptance:
        imposed = jnp.array(settings.imposed_acceptance, jnp.int32)
        verdict = verdict._replace(accepted=imposed[state.statistics.windows % len(settings.imposed_acceptance)])
    state = dataclasses.replace(
        state, target_cache=window.cache, draft_cache=drafted.cache, draft_plan=drafted.next_plan
    )
    return _commit(state, verdict, window.read, settings)


@functools.partial(jax.jit, static_argnames=("settings",), donate_argnames=("state",))
def prepare_windows(
    draft: LanguageModel, selector: Selection, state: DecodeState, *, settings: DecodeSettings
) -> DecodeState:
    """`plan_first_window` on its own: after it all calls of a run have states of one structure, and one compilation."""
    return plan_first_window(draft, selector, state, settings)


@functools.partial(jax.jit, static_argnames=("settings",), donate_argnames=("state",))
def watched_step(
    target: LanguageModel,
    draft: LanguageModel,
    selector: Selection,
    state: DecodeState,
    *,
    settings: DecodeSettings,
) -> tuple[DecodeState, Int32[Array, "B S"]]:
    """One window of `decode`, and how many pairs of a layer and a kv head read each slot of the past.

    For pictures: the host sees every window, which costs time.
    """
    past, slots = state.target_cache.lengths, state.target_cache.num_slots
    state, window = speculative_step(target, draft, selector, state, settings)
    everything = target.config.num_kv_heads * (jnp.arange(slots) < past[:, None])
    readers = [
        everything if plan is None else jnp.sum(past_mask(plan, past, slots), axis=1, dtype=jnp.int32)
        for plan in window.plans
    ]
    return state, functools.reduce(jnp.add, readers)


@functools.partial(jax.jit, static_argnames=("settings",), donate_argnames=("state",))
def decode(
    target: LanguageModel,
    draft: LanguageModel | None,
    selector: Selection | None,
    state: DecodeState,
    max_windows: Int32[Array, ""],
    *,
    settings: DecodeSettings,
) -> DecodeState:
    """Decodes until every sequence is done or `max_windows` windows have passed, without touching the host.

    Args:
        target: the target.
        draft: the draft; None in autoregressive mode.
        selector: what the target reads; only in mode `specattn`.
        state: where decoding stands; donated.
        max_windows: windows in this call; streaming uses a few, so that text appears without a host round trip per
            token, and 0 only compiles.
        settings: decoding settings.
    """
    if (selector is not None) != (settings.mode == "specattn") or (draft is None) != (
        settings.mode == "autoregressive"
    ):
        raise ValueError(f"mode {settings.mode!r} does not fit the draft and selector that were given.")

    if draft is not None:
        state = plan_first_window(draft, selector, state, settings)

    def unfinished(carry: tuple[Int32[Array, ""], DecodeState]) -> Bool[Array, ""]:
        index, state = carry
        return (index < max_windows) & ~jnp.all(state.done)

    def advance(carry: tuple[Int32[Array, ""], DecodeState]) -> tuple[Int32[Array, ""], DecodeState]:
        index, state = carry
        if draft is None:
            return index + 1, autoregressive_step(target, state, settings)
        return index + 1, speculative_step(target, draft, selector, state, settings)[0]

    return jax.lax.while_loop(unfinished, advance, (jnp.int32(0), state))[1]
