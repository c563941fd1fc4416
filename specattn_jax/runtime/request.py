"""What is asked of `generate`, and the strategies that may answer it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax.numpy as jnp
from jaxtyping import Array, Key

from specattn_jax.decoding.autoregressive import Autoregressive
from specattn_jax.decoding.hierarchical import Hierarchical
from specattn_jax.decoding.hierarchical_lookup import HierarchicalLookup
from specattn_jax.decoding.itself import SelfSpeculative
from specattn_jax.decoding.levels import TwoLevels
from specattn_jax.decoding.lookup import PromptLookup
from specattn_jax.decoding.protocol import DecodeSettings, Strategy, check_window
from specattn_jax.decoding.sampling import Sampling
from specattn_jax.decoding.speculative import SparselyDrafted, SpecAttn, Speculative
from specattn_jax.errors import UserError
from specattn_jax.loading.pair import NO_DRAFT, ModelPair
from specattn_jax.models.cache import Reach
from specattn_jax.planning.draft_reads import fit_draft_reads
from specattn_jax.planning.gate import WINDOWS
from specattn_jax.runtime.session import DRAFT_REACH, seed_keys
from specattn_jax.selection.alignment import NucleusMass
from specattn_jax.selection.make import DraftedSelection, make_selection
from specattn_jax.selection.own import OwnReads, SparseDraft
from specattn_jax.selection.policy import SelectionPolicy, load_policy

# Names of the strategies, the simplest first.
Mode: TypeAlias = Literal["autoregressive", "lookup", "self", "speculative", "hierarchical", "specattn"]
MODES: tuple[Mode, ...] = get_args(Mode)
AUTO = "auto"
# What asks no draft, and what does without where there is none.
NEVER_DRAFTED: tuple[Mode, ...] = ("autoregressive", "lookup", "self")
UNDRAFTED: tuple[Mode, ...] = (*NEVER_DRAFTED, "hierarchical")
DEFAULT_KV_REDUCTION = 0.75
DEFAULT_P = 0.95
DEFAULT_WINDOW, DEFAULT_PLACES = 5, 15
LEAST_REACH = 64


@dataclasses.dataclass(frozen=True)
class Request:
    """Everything that decides what `generate` writes, but for the models and the prompts.

    Attributes:
        max_new_tokens: most new tokens per prompt.
        mode: `auto`, `autoregressive`, `lookup` (proposes what the text says), `self` (the target drafts over few
            entries), `speculative` (the draft proposes, dense verification), `hierarchical` (draft, or without one the
            text, then the target over few entries, then dense verification) or `specattn` (sparse verification:
            approximate); or a `Strategy` of your own, which has its window, its selection and its sampling with it.
        window: drafted tokens per window, or `auto`, which chooses them for a mode that is named too; without it mode
            `auto` chooses, and the others take 5. `hierarchical` takes 15 in any case (three at a time, until the
            target over few entries kept up to 12 for one dense pass to verify), unless a number is given.
        draft_reads: share of its own cache that the draft reads in mode `speculative`, in (0, 1]; 1 is all of it, and
            so is None unless mode `auto` finds less to be faster.
        policy: selection policy of mode `specattn`, which `auto` may choose or not; likewise
        p: nucleus mass in every layer, or
        kv_reduction: wanted share of cache reads saved (see `choose_reading`).
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with this probability; 1 keeps all.
        min_p: keep the tokens with at least this share of the likeliest one's probability; 0 keeps all.
        repetition_penalty: makes tokens that the text holds less likely; 1 does nothing (see `Sampling`).
        seed: of the random draws; sequence i of a batch draws the same whatever the other sequences are. Or a list of
            one seed per prompt: each then draws as it would alone. Where mode or window is `auto` a seed alone does not
            fix a sampled text, because the window, which decides how draws are used, depends on measured speed.
        stop: texts that end a sequence: its text ends before the one that is complete first, its tokens with the one
            that completes it.
        stop_at_eos: whether the tokenizer's end tokens end a sequence.
        keep_selection: whether to keep which tokens each window read, for `Generation.plot_selection`; the host then
            sees every window, which costs time.
        lossless: whether `auto` leaves `specattn` out.
        draft_reach: how many tokens back, besides the first 64, the draft sees while it reads the prompt, at least 64;
            None is everything. Less makes the draft's prefill of a long prompt cheaper; what it proposes and points
            to may get worse, and the output of the lossless modes does not change.
    """

    max_new_tokens: int = 128
    mode: str | Strategy = AUTO
    window: int | Literal["auto"] | None = None
    draft_reads: float | None = None
    policy: str = "default"
    p: float | None = None
    kv_reduction: float | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | Sequence[int] = 0
    stop: Sequence[str] = ()
    stop_at_eos: bool = True
    keep_selection: bool = False
    lossless: bool = False
    draft_reach: int | None = DRAFT_REACH.recent

    def __post_init__(self) -> None:
        if isinstance(self.window, int):
            check_window(self.window)
        elif self.window not in (None, AUTO):
            raise UserError(f"window is {self.window!r}; expected a number of drafted tokens, or {AUTO}.")
        if isinstance(self.mode, str):
            check_mode(self.mode)
        if self.draft_reach is not None and self.draft_reach < LEAST_REACH:
            raise UserError(f"draft_reach is {self.draft_reach}; expected at least {LEAST_REACH} tokens.")
        if self.draft_reads is not None:
            check_draft_reads(self.draft_reads, self.mode)
        # Refuses what is out of range.
        _ = self.sampling
        if isinstance(self.stop, str):
            raise UserError(f"stop is one text, {self.stop[:40]!r}; expected a list of texts: put it into brackets.")
        if not all(self.stop):
            raise UserError("stop holds an empty text, which would end everything; expected texts of some characters.")

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn.

        Raises:
            UserError: a number is out of range.
        """
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)

    @property
    def reach(self) -> Reach | None:
        """How far back the draft sees while it prefills."""
        return None if self.draft_reach is None else Reach(self.draft_reach)

    @property
    def mode_is_fixed(self) -> bool:
        """Whether the request names its strategy."""
        return self.mode != AUTO

    @property
    def windows(self) -> tuple[int, ...]:
        """Drafted tokens of the windows that may be taken, but by mode `hierarchical`."""
        if self.window == AUTO or (self.window is None and not self.mode_is_fixed):
            return WINDOWS
        return (self.window_or(DEFAULT_WINDOW),)

    @property
    def chooses(self) -> bool:
        """Whether the mode or the window is left to what the device is measured to do."""
        return not self.mode_is_fixed or len(self.windows) > 1

    def window_or(self, usual: int) -> int:
        """The window that the request names; the usual one where it names none."""
        return self.window if isinstance(self.window, int) else usual

    @property
    def may_draft(self) -> bool:
        """Whether the draft may be needed."""
        return self.mode not in NEVER_DRAFTED

    def check_drafted(self, draft: object) -> None:
        """Refuses a mode that needs a draft where there is none.

        Args:
            draft: the draft, or its name; None or `none` where there is none.

        Raises:
            UserError: there is none, and the mode needs one.
        """
        if draft in (None, NO_DRAFT) and isinstance(self.mode, str) and self.mode not in (AUTO, *UNDRAFTED):
            raise UserError(
                f"draft is {NO_DRAFT!r}, but mode {self.mode} needs one; name a draft, or use mode auto or one of "
                f"{', '.join(UNDRAFTED)}."
            )

    @property
    def may_be_sparse(self) -> bool:
        """Whether the target may be made to read sparsely by the pair's alignment."""
        return self.mode == "specattn" or (self.mode == AUTO and not self.lossless)

    def change(self, **changes: Any) -> Request:
        """The same request, but for these attributes.

        Raises:
            UserError: there is no such attribute.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise UserError(f"{name} is no option of generate; expected some of {', '.join(known)}.")
        return dataclasses.replace(self, **changes)

    def settings(self, pair: ModelPair) -> DecodeSettings:
        """How tokens are drawn, and where sequences end.

        Raises:
            UserError: a number is out of range.
        """
        if isinstance(self.mode, str):
            stop_tokens = pair.tokenizer.eos_ids if self.stop_at_eos else ()
            return DecodeSettings(self.sampling, stop_tokens)
        return self.mode.settings


class Candidates(NamedTuple):
    """The strategies that may answer a request.

    Attributes:
        strategies: the simplest mode first; a single one where mode and window are fixed.
        selection: what mode `specattn` would read; None where it cannot be chosen.
    """

    strategies: tuple[Strategy, ...]
    selection: DraftedSelection | None


def find_candidates(pair: ModelPair, request: Request, *, context: int | None = None, batch: int = 1) -> Candidates:
    """The strategies that may answer a request: the one that it names, or all that `auto` may choose from.

    Args:
        pair: the models.
        request: what is wanted.
        context: entries in the cache of the longest sequence, at the end, where that is known already.
        batch: sequences.

    Raises:
        UserError: there is no such mode, or what is asked for does not fit it or the pair.
    """
    if not isinstance(request.mode, str):
        return Candidates((request.mode,), None)
    mode = request.mode
    if request.keep_selection and mode != "specattn":
        may = "may select nothing" if mode == AUTO else "selects nothing"
        raise UserError(f"keep_selection is set, but mode {mode} {may}; use mode='specattn'.")
    if request.lossless and mode == "specattn":
        raise UserError("lossless is set, but mode specattn is approximate; use mode auto or speculative.")
    request.check_drafted(pair.draft)
    settings, selection = request.settings(pair), None
    # Who says how much to read wants to know that it cannot be had.
    asks = pair.alignment is not None or request.p is not None or request.kv_reduction is not None
    if request.may_be_sparse and (request.mode_is_fixed or asks):
        selection = choose_reading(
            pair,
            policy=request.policy,
            p=request.p,
            kv_reduction=request.kv_reduction,
            context=context,
            batch=batch,
            window=request.window_or(DEFAULT_WINDOW),
        )
    return Candidates(tuple(strategies_of(request, settings, selection, pair.draft is not None)), selection)


def strategies_of(
    request: Request, settings: DecodeSettings, selection: DraftedSelection | None, has_draft: bool
) -> Iterator[Strategy]:
    """The strategies of a mode, or of all modes for `auto`: an entry per window.

    Args:
        request: with the mode, and what it says of windows and the draft.
        settings: how tokens are drawn, and where sequences end.
        selection: what a sparse verification reads; None where there is none.
        has_draft: whether there is a draft.
    """
    windows = request.windows
    match request.mode:
        case "autoregressive":
            yield Autoregressive(settings)
        case "lookup":
            yield from (PromptLookup(settings, window) for window in windows)
        case "self":
            yield from (SelfSpeculative(settings, window) for window in windows)
        case "speculative":
            yield from (_speculative(settings, window, request.draft_reads or 1.0) for window in windows)
        case "hierarchical":
            yield _hierarchical(settings, request.window_or(DEFAULT_PLACES), has_draft)
        case "specattn":
            assert selection is not None
            yield from (SpecAttn(selection, settings, window) for window in windows)
        case _:
            yield Autoregressive(settings)
            for undrafted in (PromptLookup, SelfSpeculative):
                yield from (undrafted(settings, window) for window in windows)
            if has_draft:
                # Where nobody says what the draft reads, it may be either.
                wanted = (1.0, OwnReads().share) if request.draft_reads is None else (request.draft_reads,)
                yield from (_speculative(settings, window, share) for share in wanted for window in windows)
            places = request.window_or(DEFAULT_PLACES)
            if places > TwoLevels.inner:
                yield _hierarchical(settings, places, has_draft)
            if selection is not None:
                yield from (SpecAttn(selection, settings, window) for window in windows)


def _speculative(settings: DecodeSettings, window: int, draft_reads: float) -> Speculative:
    """With a draft that reads so much of its cache."""
    if draft_reads >= 1.0:
        return Speculative(settings=settings, window=window)
    return SparselyDrafted(SparseDraft(OwnReads(draft_reads)), settings, window)


def _hierarchical(settings: DecodeSettings, window: int, has_draft: bool) -> Strategy:
    """Above the draft, or where there is none above the text."""
    return Hierarchical(settings, window) if has_draft else HierarchicalLookup(settings, window)


def check_mode(mode: str) -> None:
    """Raises UserError for a mode that there is not."""
    if mode not in (AUTO, *MODES):
        raise UserError(f"mode is {mode!r}; expected one of auto, {', '.join(MODES)}.")


def check_draft_reads(share: float, mode: str | Strategy) -> None:
    """Raises UserError for a share that cannot be read, or where it says nothing."""
    if not 0.0 < share <= 1.0:
        raise UserError(f"draft_reads is {share:g}; expected a share above 0, of at most 1.")
    if mode not in (AUTO, "speculative"):
        name = mode if isinstance(mode, str) else mode.name
        raise UserError(
            f"draft_reads is {share:g}, which is for modes speculative and auto, but mode is {name}; leave one of them "
            "out."
        )


def choose_reading(
    pair: ModelPair,
    *,
    policy: str | SelectionPolicy = "default",
    p: float | None = None,
    kv_reduction: float | None = None,
    context: int | None = None,
    batch: int = 1,
    window: int = DEFAULT_WINDOW,
) -> DraftedSelection:
    """What target and draft will read: a policy with its nucleus mass, and the draft's share of its own cache.

    Args:
        pair: the models and their alignment.
        policy: name of a preset in `configs/policies.toml`, or one of your own.
        p: nucleus mass, the same in every layer, in (0, 1]; 1 reads everything.
        kv_reduction: wanted share of cache reads saved, met with the per-layer masses found at calibration. Without
            either, the default policy saves 0.75 and the published one takes p = 0.95.
        context: entries in the cache of the longest sequence, at the end. With it the draft reads what pays there (see
            `planning.draft_reads`), without it what the policy says.
        batch: sequences.
        window: W.

    Raises:
        UserError: both are given, a value is out of range, or the pair has no alignment.
    """
    chosen = load_policy(policy) if isinstance(policy, str) else policy
    if pair.alignment is None:
        raise UserError(
            f"alignment: the pair {pair.name} has none, and specattn cannot choose what to read without it; make one "
            "with `specattn calibrate` and pass its folder, or use mode speculative."
        )
    if p is not None and kv_reduction is not None:
        raise UserError(f"p is {p} and kv_reduction is {kv_reduction}; expected one of them, not both.")
    if chosen.prediction == "layer_map":
        if kv_reduction is not None:
            raise UserError(f"kv_reduction is {kv_reduction}, but policy {policy} has no budgets; give p instead.")
        p = DEFAULT_P if p is None else p
    if p is None:
        mass = pair.alignment.mass_for_saving(DEFAULT_KV_REDUCTION if kv_reduction is None else kv_reduction)
    else:
        if not 0.0 < p <= 1.0:
            raise UserError(f"p is {p}; expected a number in (0, 1].")
        mass = NucleusMass.uniform(p, pair.target.config.num_layers)
    selection = make_selection(chosen, pair.alignment, mass, pair.target.config, pair.need_draft().config)
    return selection if context is None else fit_draft_reads(selection, context=context, batch=batch, window=window)


def encode_prompt(pair: ModelPair, prompt: str | Sequence[int], index: int) -> list[int]:
    """Token ids of one prompt.

    Raises:
        UserError: it is empty, or an id is outside the vocabulary.
    """
    tokens = pair.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
    if not tokens:
        raise UserError(f"prompt {index + 1} is empty; expected at least one token.")
    size = pair.target.config.vocab_size
    if not all(0 <= token < size for token in tokens):
        raise UserError(f"prompt {index + 1} has a token id outside the vocabulary; expected ids from 0 to {size - 1}.")
    return tokens


def prompt_keys(request: Request, count: int) -> Key[Array, " B"]:
    """One random key per prompt.

    Raises:
        UserError: there are more or fewer seeds than prompts.
    """
    if not isinstance(request.seed, Sequence):
        return seed_keys(int(request.seed), count)
    if len(request.seed) != count:
        raise UserError(f"seed holds {len(request.seed)} seeds for {count} prompts; expected one number, or one each.")
    # The first key of each seed: that of a prompt alone.
    return jnp.concatenate([seed_keys(seed, 1) for seed in request.seed])


def check_lengths(pair: ModelPair, encoded: list[list[int]], max_new_tokens: int) -> None:
    """Refuses what cannot fit the target's context.

    Raises:
        UserError: there are no prompts, no new tokens are wanted, or they do not fit.
    """
    if not encoded:
        raise UserError("prompts is empty; expected at least one prompt.")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; expected at least 1.")
    context = pair.target.config.max_context
    longest = max(len(tokens) for tokens in encoded)
    if longest >= context:
        raise UserError(
            f"The prompt has {longest} tokens, but the context of {pair.target_name} is {context}; shorten it."
        )
    if longest + max_new_tokens > context:
        raise UserError(
            f"max_new_tokens is {max_new_tokens}, but after a prompt of {longest} tokens the context of "
            f"{pair.target_name}, {context}, leaves room for {context - longest}; ask for fewer tokens."
        )


def draft_end(pair: ModelPair, encoded: list[list[int]], max_new_tokens: int) -> int | None:
    """Where the draft's context ends, if a request may reach beyond it; else None."""
    if pair.draft is None:
        return None
    context = pair.draft.config.max_context
    return context if max(map(len, encoded)) + max_new_tokens > context else None


def check_draft(
    pair: ModelPair, strategies: Sequence[Strategy], encoded: list[list[int]], max_new_tokens: int
) -> tuple[Strategy, ...]:
    """The strategies that can begin: a draft of a shorter context than the target's may be full before the end.

    Raises:
        UserError: the only strategy needs a draft up to the end, and its context is shorter.
    """
    context, longest = draft_end(pair, encoded, max_new_tokens), max(map(len, encoded))
    if context is None:
        return tuple(strategies)
    if len(strategies) == 1 and strategies[0].needs_draft:
        raise UserError(
            f"max_new_tokens is {max_new_tokens} after a prompt of {longest} tokens, but mode {strategies[0].name} "
            f"needs the draft, {pair.draft_name}, whose context is {context}; use mode auto, which goes on without it, "
            "or another draft."
        )
    return tuple(one for one in strategies if not one.needs_draft or longest + one.window + 1 <= context)
