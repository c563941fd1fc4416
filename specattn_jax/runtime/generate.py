"""Text in, text out: the host side of generation around the jitted loop of `speculative.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from specattn_jax.decoding.sampling import Sampling
from specattn_jax.decoding.speculative import MODES, DecodeSettings, DecodeState, Mode, prepare_windows, watched_step
from specattn_jax.errors import UserError
from specattn_jax.loading.pair import ModelPair
from specattn_jax.models.transformer import LanguageModel
from specattn_jax.planning.gate import WINDOWS, Decide, Decision, Plan, Situation, make_gate, prior_acceptance
from specattn_jax.reporting.display import Picture
from specattn_jax.reporting.shading import SelectionRecord, shade_window
from specattn_jax.runtime.segments import Decoded, Decoding, Pace, Writer, new_tokens
from specattn_jax.runtime.starting import Clock, check_lengths, encode_prompt, prefill_both
from specattn_jax.selection.alignment import NucleusMass
from specattn_jax.selection.policies import Selector, load_policy

DEFAULT_KV_REDUCTION = 0.75
DEFAULT_P = 0.95
DEFAULT_WINDOW = 5


@dataclasses.dataclass(frozen=True)
class Generation:
    """One continued prompt and what it cost.

    Attributes:
        text: the new text, stop tokens left out.
        tokens: the new token ids, a stop token at the end included.
        prompt_tokens: length of the prompt.
        mode: how it was generated; where that changed, how most tokens were.
        windows: verification passes of the target.
        accepted_per_window: mean number of drafted tokens accepted (0 to W), the target's own token not counted.
        kv_reduction: share of the target's cache reads saved, averaged over layers, heads and windows.
        layer_reads: share of the cache that each target layer read, averaged over windows.
        selection: which tokens each window read; None unless `generate` was asked to keep it.
        window: drafted tokens per window, in most of that mode's windows; None in mode `autoregressive`.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    mode: Mode
    windows: int
    accepted_per_window: float
    kv_reduction: float
    layer_reads: list[float]
    selection: SelectionRecord | None = None
    window: int | None = None

    @property
    def stats(self) -> dict[str, float | int | str | None]:
        """The numbers, by name.

        Example:
            >>> from specattn_jax.examples import tiny_pair
            >>> result = generate(tiny_pair(), ["Call me"], mode="speculative", max_new_tokens=8).results[0]
            >>> {name: result.stats[name] for name in ("mode", "prompt_tokens", "new_tokens", "kv_reduction")}
            {'mode': 'speculative', 'prompt_tokens': 7, 'new_tokens': 8, 'kv_reduction': 0.0}
        """
        return {
            "mode": self.mode,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.tokens),
            "windows": self.windows,
            "accepted_per_window": self.accepted_per_window,
            "kv_reduction": self.kv_reduction,
        }

    def plot_selection(self, window: int = -1, *, most_tokens: int = 400) -> Picture:
        """The text before a window, each word shaded by how many layers and kv heads read it.

        Args:
            window: which window; negative numbers count from the last.
            most_tokens: how much of the text before the window is shown.

        Returns:
            What a notebook shows as it is; its `html` can be written to a file.

        Raises:
            UserError: there is no such window, or the selection was not kept.

        Example:
            >>> from specattn_jax.examples import tiny_pair
            >>> run = generate(
            ...     tiny_pair(), ["Call me Ishmael."], mode="specattn", max_new_tokens=8, p=0.8, keep_selection=True
            ... )
            >>> picture = run.results[0].plot_selection(window=0)  # in a notebook, shown as it is
            >>> picture.html.startswith("<div")
            True
        """
        if self.selection is None:
            raise UserError("plot_selection: nothing was kept; call generate with keep_selection=True.")
        if not -self.windows <= window < self.windows:
            raise UserError(f"window is {window}; expected a number below {self.windows}, the windows of this text.")
        return shade_window(self.selection, window, most_tokens=most_tokens)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Where the time of one call went, in seconds; compiling is kept apart because it happens once."""

    compile_s: float
    prefill_s: float
    decode_s: float


@dataclasses.dataclass(frozen=True)
class Generations:
    """The results of one call.

    Attributes:
        results: prompt by prompt.
        timing: shared by the batch.
        decisions: in mode `auto`, each choice of mode and window with its reason, the first one included.
    """

    results: list[Generation]
    timing: Timing
    decisions: list[Decision] = dataclasses.field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """New tokens of the whole batch per second of decoding; prefill gives each sequence its first token."""
        decoded = sum(len(result.tokens) - 1 for result in self.results)
        return decoded / self.timing.decode_s if self.timing.decode_s > 0 else 0.0


def make_selector(
    pair: ModelPair, *, policy: str = "default", p: float | None = None, kv_reduction: float | None = None
) -> Selector:
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
        saving = DEFAULT_KV_REDUCTION if kv_reduction is None else kv_reduction
        mass = pair.alignment.mass_for_saving(saving)
    else:
        if not 0.0 < p <= 1.0:
            raise UserError(f"p is {p}; expected a number in (0, 1].")
        mass = NucleusMass.uniform(p, pair.target.config.num_layers)
    # Of sources that are not kv heads, what the draft should read cannot be told.
    if pair.alignment.granularity != "kv_head":
        chosen = dataclasses.replace(chosen, draft_reads=1.0)
    return Selector(
        alignment=pair.alignment,
        mass=mass,
        policy=chosen,
        target=pair.target.config,
        draft=pair.draft.config,
    )


def generate(
    pair: ModelPair,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 128,
    mode: Mode | Literal["auto"] = "auto",
    window: int | None = None,
    policy: str = "default",
    p: float | None = None,
    kv_reduction: float | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_at_eos: bool = True,
    prefill_chunk: int = 512,
    windows_per_call: int | None = None,
    keep_selection: bool = False,
    lossless: bool = False,
    on_text: Callable[[int, str], None] | None = None,
    on_prefill: Callable[[int, int], None] | None = None,
    on_decision: Callable[[Decision], None] | None = None,
    decide: Decide | None = None,
) -> Generations:
    """Continues a batch of prompts of any lengths.

    Mode `auto` predicts which of the others, with how many drafted tokens, is the fastest on this device, for these
    models, this batch and context; it looks again once some tokens were accepted or refused, and whenever the context
    has doubled. It takes `specattn`, which is approximate, only where the pair has an alignment and `lossless` is off.

    Args:
        pair: target, draft, tokenizer and alignment, from `load_pair`.
        prompts: texts, or lists of token ids.
        max_new_tokens: most new tokens per prompt.
        mode: `auto`, `autoregressive`, `speculative` (dense verification) or `specattn` (sparse verification).
        window: drafted tokens per window; without it mode `auto` chooses, and the others take 5.
        policy: selection policy of mode `specattn`, which `auto` may choose or not; likewise
        p: nucleus mass in every layer, or
        kv_reduction: wanted share of cache reads saved (see `make_selector`).
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with this probability; 1 keeps all.
        seed: of the random draws; sequence i of a batch draws the same whatever the other sequences are.
        stop_at_eos: whether the tokenizer's end tokens end a sequence.
        prefill_chunk: prompt tokens read at a time.
        windows_per_call: windows per jitted call when streaming; without it so many that text appears some five
            times a second.
        keep_selection: whether to keep which tokens each window read, for `Generation.plot_selection`; the host then
            sees every window, which costs time.
        lossless: whether `auto` leaves `specattn` out.
        on_text: receives the index of a prompt and what was added to its text, whole characters only, after each call;
            without it one call does everything.
        on_prefill: receives positions read and positions to read.
        on_decision: receives each decision of mode `auto` when it is made.
        decide: decides in mode `auto` in place of the library.

    Returns:
        One `Generation` per prompt, and timings.

    Raises:
        UserError: an argument is out of range, a prompt is empty or too long, or memory does not suffice.

    Example:
        >>> from specattn_jax.examples import tiny_pair  # load_pair() gives one that makes sense
        >>> pieces = []
        >>> run = generate(
        ...     tiny_pair(),
        ...     ["Call me Ishmael.", "Once upon a time"],
        ...     mode="specattn",
        ...     kv_reduction=0.75,
        ...     max_new_tokens=8,
        ...     on_text=lambda index, text: pieces.append((index, text)),
        ... )
        >>> [len(result.tokens) for result in run.results]
        [8, 8]
        >>> run.results[1].text == "".join(text for index, text in pieces if index == 1)
        True
    """
    if isinstance(prompts, str):
        raise UserError(f"prompts is one text, {prompts[:40]!r}; expected a list of prompts: put it into brackets.")
    for name, value in {"prefill_chunk": prefill_chunk, "windows_per_call": windows_per_call}.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; expected at least 1.")
    selector = _choose_selector(pair, mode, policy, p, kv_reduction, keep_selection, lossless)
    base = DecodeSettings(
        mode="speculative" if mode == "auto" else mode,
        # Caches and output have room for the longest window.
        window=window if window is not None else max(WINDOWS) if mode == "auto" else DEFAULT_WINDOW,
        sampling=Sampling(temperature, top_k, top_p),
        stop_tokens=pair.tokenizer.eos_ids if stop_at_eos else (),
    )
    encoded = [encode_prompt(pair, prompt, index) for index, prompt in enumerate(prompts)]
    check_lengths(pair, encoded, max_new_tokens)
    prior = prior_acceptance(pair)
    if mode == "auto":
        if decide is None:
            windows = WINDOWS if window is None else (window,)
            decide = make_gate(pair, len(encoded), selector, windows=windows)
        first = decide(Situation(sum(map(len, encoded)) // len(encoded), max_new_tokens, prior))
        if on_decision is not None:
            on_decision(first)
    else:
        first, decide = Decision(mode, base.window, is_final=True), None
    if not first.may_change:
        # Nothing longer comes: this is the program of the fixed mode, to the shape.
        base = dataclasses.replace(base, mode=first.mode, window=first.window or window or DEFAULT_WINDOW)
    draft = None if first.mode == "autoregressive" else pair.draft

    clock = Clock()
    state = prefill_both(pair.target, draft, encoded, max_new_tokens, base, seed, prefill_chunk, clock, on_prefill)
    writer = Writer(pair.tokenizer, len(encoded), on_text or (lambda index, text: None))
    if keep_selection and draft is not None and selector is not None:
        state, watched = _decode_watched(pair.target, draft, selector, state, base, writer)
        clock.lap("decode", state)
        decoded = Decoded(state, first.plan, [])
    else:
        pace = None if on_text is None else Pace(windows_per_call)
        decoding = Decoding(pair, selector, base, clock, writer, pace, decide, on_decision)
        decoded, watched = decoding.run(state, first, prior), None
    state = decoded.state
    writer.finish(new_tokens(state))
    results = _results(pair, encoded, state, decoded.plan)
    if watched is not None:
        results = [
            dataclasses.replace(result, selection=_record(pair, prompt, result.tokens, watched, index))
            for index, (prompt, result) in enumerate(zip(encoded, results, strict=True))
        ]
    return Generations(results, Timing(**clock.seconds), decoded.decisions)


def check_mode(mode: str) -> Mode | Literal["auto"]:
    """The mode of that name.

    Raises:
        UserError: there is none.
    """
    if mode == "auto":
        return "auto"
    for known in MODES:
        if mode == known:
            return known
    raise UserError(f"mode is {mode!r}; expected one of auto, {', '.join(MODES)}.")


def _choose_selector(
    pair: ModelPair,
    mode: str,
    policy: str,
    p: float | None,
    kv_reduction: float | None,
    keep_selection: bool,
    lossless: bool,
) -> Selector | None:
    """What the target will read if mode `specattn` runs; None where it cannot."""
    check_mode(mode)
    if keep_selection and mode != "specattn":
        may = "may select nothing" if mode == "auto" else "selects nothing"
        raise UserError(f"keep_selection is set, but mode {mode} {may}; use mode='specattn'.")
    if lossless and mode == "specattn":
        raise UserError("lossless is set, but mode specattn is approximate; use mode auto or speculative.")
    if lossless or mode in ("autoregressive", "speculative"):
        return None
    # Who says how much to read wants to know that it cannot be had.
    if mode == "auto" and pair.alignment is None and p is None and kv_reduction is None:
        return None
    return make_selector(pair, policy=policy, p=p, kv_reduction=kv_reduction)


class _Window(NamedTuple):
    """What the host saw of one window: the cache before it, whether a sequence still decoded, and who read what."""

    past: Int[np.ndarray, " B"]
    active: Bool[np.ndarray, " B"]
    readers: Int[np.ndarray, "B S"]


def _decode_watched(
    target: LanguageModel,
    draft: LanguageModel,
    selector: Selector,
    state: DecodeState,
    settings: DecodeSettings,
    writer: Writer,
) -> tuple[DecodeState, list[_Window]]:
    """Decodes window by window, keeping what each of them read."""
    windows = []
    state = prepare_windows(draft, selector, state, settings=settings)
    while not bool(jnp.all(state.done)):
        past, active = jax.device_get((state.target_cache.lengths, ~state.done))
        state, readers = watched_step(target, draft, selector, state, settings=settings)
        windows.append(_Window(past, active, np.asarray(readers)))
        writer.show(new_tokens(state))
    return state, windows


def _record(
    pair: ModelPair, prompt: Sequence[int], new: Sequence[int], windows: Sequence[_Window], index: int
) -> SelectionRecord:
    """What the windows read of one sequence."""
    mine = [window for window in windows if window.active[index]]
    slots = len(prompt) + len(new)
    config = pair.target.config
    return SelectionRecord(
        pieces=pair.tokenizer.pieces([*prompt, *new]),
        past=np.array([window.past[index] for window in mine], np.int64),
        readers=np.array([window.readers[index, :slots] for window in mine], np.int64).reshape(len(mine), slots),
        num_readers=config.num_layers * config.num_kv_heads,
    )


def _results(pair: ModelPair, encoded: list[list[int]], state: DecodeState, plan: Plan) -> list[Generation]:
    """What a finished state says, per prompt."""
    counts = jax.device_get(state.statistics)
    results = []
    for index, tokens in enumerate(new_tokens(state)):
        windows = int(counts.windows[index])
        reads = counts.read[index] / max(windows, 1)
        results.append(
            Generation(
                text=pair.tokenizer.decode(tokens),
                tokens=tokens,
                prompt_tokens=len(encoded[index]),
                mode=plan.mode,
                window=plan.window or None,
                windows=windows,
                accepted_per_window=float(counts.accepted[index]) / max(windows, 1),
                kv_reduction=1.0 - float(reads.mean()) if windows else 0.0,
                layer_reads=[float(read) for read in reads],
            )
        )
    return results
