"""What is asked of `generate`, and the strategies that may answer it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax.numpy as jnp
from jaxtyping import Array, Key

from specattn_jax.decoding.autoregressive import Autoregressive
from specattn_jax.decoding.protocol import DecodeSettings, Strategy, check_window
from specattn_jax.decoding.sampling import Sampling
from specattn_jax.decoding.speculative import SpecAttn, Speculative
from specattn_jax.errors import UserError
from specattn_jax.loading.pair import ModelPair
from specattn_jax.planning.gate import WINDOWS
from specattn_jax.runtime.session import seed_keys
from specattn_jax.selection.alignment import NucleusMass
from specattn_jax.selection.make import DraftedSelection, make_selection
from specattn_jax.selection.policy import load_policy

# Names of the strategies, the simplest first.
Mode: TypeAlias = Literal["autoregressive", "speculative", "specattn"]
MODES: tuple[Mode, ...] = get_args(Mode)
AUTO = "auto"
DEFAULT_KV_REDUCTION = 0.75
DEFAULT_P = 0.95
DEFAULT_WINDOW = 5
LEAST_REACH = 64


@dataclasses.dataclass(frozen=True)
class Request:
    """Everything that decides what `generate` writes, but for the models and the prompts.

    Attributes:
        max_new_tokens: most new tokens per prompt.
        mode: `auto`, `autoregressive`, `speculative` (dense verification) or `specattn` (sparse verification); or a
            `Strategy` of your own, which has its window, its selection and its sampling with it.
        window: drafted tokens per window; without it mode `auto` chooses, and the others take 5.
        policy: selection policy of mode `specattn`, which `auto` may choose or not; likewise
        p: nucleus mass in every layer, or
        kv_reduction: wanted share of cache reads saved (see `choose_reading`).
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with this probability; 1 keeps all.
        min_p: keep the tokens with at least this share of the likeliest one's probability; 0 keeps all.
        repetition_penalty: makes tokens that the text holds less likely; 1 does nothing (see `Sampling`).
        seed: of the random draws; sequence i of a batch draws the same whatever the other sequences are. Or a list of
            one seed per prompt: each then draws as it would alone. In mode `auto` a seed alone does not fix a sampled
            text, because the window, which decides how draws are used, depends on measured speed: fix mode and window.
        stop: texts that end a sequence: its text ends before the first of them, its tokens with the one that completes
            it.
        stop_at_eos: whether the tokenizer's end tokens end a sequence.
        keep_selection: whether to keep which tokens each window read, for `Generation.plot_selection`; the host then
            sees every window, which costs time.
        lossless: whether `auto` leaves `specattn` out.
        draft_reach: how many tokens back, besides the first 64, the draft sees while it reads the prompt, at least 64;
            everything without it. Less makes the draft's prefill of a long prompt cheaper; what it proposes and points
            to may get worse, and the output of the lossless modes does not change.
    """

    max_new_tokens: int = 128
    mode: str | Strategy = AUTO
    window: int | None = None
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
    draft_reach: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None:
            check_window(self.window)
        if isinstance(self.mode, str):
            check_mode(self.mode)
        if self.draft_reach is not None and self.draft_reach < LEAST_REACH:
            raise UserError(f"draft_reach is {self.draft_reach}; expected at least {LEAST_REACH} tokens.")
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
    def mode_is_fixed(self) -> bool:
        """Whether the request names its strategy."""
        return self.mode != AUTO

    @property
    def may_draft(self) -> bool:
        """Whether the draft may be needed."""
        return self.mode != "autoregressive"

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
        strategies: the simplest mode first; a single one where the mode is fixed.
        selection: what mode `specattn` would read; None where it cannot be chosen.
    """

    strategies: tuple[Strategy, ...]
    selection: DraftedSelection | None


def find_candidates(pair: ModelPair, request: Request) -> Candidates:
    """The strategies that may answer a request: the one that it names, or all that `auto` may choose from.

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
    settings, selection = request.settings(pair), None
    # Who says how much to read wants to know that it cannot be had.
    asks = pair.alignment is not None or request.p is not None or request.kv_reduction is not None
    if request.may_be_sparse and (request.mode_is_fixed or asks):
        selection = choose_reading(pair, policy=request.policy, p=request.p, kv_reduction=request.kv_reduction)
    windows = (DEFAULT_WINDOW,) if request.mode_is_fixed else WINDOWS
    if request.window is not None:
        windows = (request.window,)
    found: list[Strategy] = [Autoregressive(settings)]
    found += [Speculative(settings=settings, window=window) for window in windows]
    if selection is not None:
        found += [SpecAttn(selection, settings, window) for window in windows]
    return Candidates(tuple(one for one in found if mode in (AUTO, one.name)), selection)


def check_mode(mode: str) -> None:
    """Raises UserError for a mode that there is not."""
    if mode not in (AUTO, *MODES):
        raise UserError(f"mode is {mode!r}; expected one of auto, {', '.join(MODES)}.")


def choose_reading(
    pair: ModelPair, *, policy: str = "default", p: float | None = None, kv_reduction: float | None = None
) -> DraftedSelection:
    """What the target will read: a policy with its nucleus mass.

    Args:
        pair: the models and their alignment.
        policy: name of a preset in `configs/policies.toml`.
        p: nucleus mass, the same in every layer, in (0, 1]; 1 reads everything.
        kv_reduction: wanted share of cache reads saved, met with the per-layer masses found at calibration. Without
            either, the default policy saves 0.75 and the published one takes p = 0.95.

    Raises:
        UserError: both are given, a value is out of range, or the pair has no alignment.
    """
    chosen = load_policy(policy)
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
    return make_selection(chosen, pair.alignment, mass, pair.target.config, pair.draft.config)


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
