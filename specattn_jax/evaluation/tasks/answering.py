"""Prompts answered by one method in batches, with what it cost: what every task is made of."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence

from specattn_jax.decoding.protocol import DecodeSettings, Strategy
from specattn_jax.decoding.sampling import Sampling
from specattn_jax.decoding.speculative import SpecAttn
from specattn_jax.errors import UserError
from specattn_jax.evaluation.methods import FULL, Case, make_selection
from specattn_jax.loading.pair import ModelPair
from specattn_jax.models.cache import round_up
from specattn_jax.runtime.generate import generate
from specattn_jax.runtime.request import DEFAULT_PLACES, NEVER_DRAFTED, Request, strategies_of
from specattn_jax.runtime.results import Generation
from specattn_jax.runtime.session import CHUNK_STEP, DRAFT_REACH, Memory

# Modes whose output is the target's own, so that their scores are those of full attention.
SPECULATIVE, _HIERARCHICAL = "speculative", "hierarchical"
LOSSLESS_MODES = (SPECULATIVE, "lookup", "self", _HIERARCHICAL)
LOSSLESS = (FULL, *LOSSLESS_MODES)
# Batches without which a median says nothing.
_TIMED = 3
# Answers of up to so many tokens, or a multiple, share their programs.
_LIMIT_STEP = 256


@dataclasses.dataclass(frozen=True)
class Asked:
    """One prompt and how it is to be answered.

    Attributes:
        tokens: ids of the prompt.
        limit: most new tokens.
        stop: texts that end the answer, themselves left out.
        sampling: how tokens are drawn.
    """

    tokens: tuple[int, ...]
    limit: int
    stop: tuple[str, ...] = ()
    sampling: Sampling = dataclasses.field(default_factory=Sampling)


@dataclasses.dataclass(frozen=True)
class Answers:
    """What was answered.

    Attributes:
        results: one per prompt, in the order in which they were asked.
        seconds: prefill and decoding of each batch.
        batch: prompts in each.
    """

    results: list[Generation]
    seconds: list[float]
    batch: int

    @property
    def requests_per_minute(self) -> float | None:
        """Of the median batch; None where too few were timed, because the first ones compile their programs."""
        if len(self.seconds) < _TIMED:
            return None
        return 60.0 * self.batch / statistics.median(self.seconds)


def strategy_for(pair: ModelPair, case: Case, settings: DecodeSettings, window: int) -> Strategy:
    """The strategy that carries a method out.

    Args:
        pair: the models.
        case: the method with its setting.
        settings: how tokens are drawn, and where sequences end.
        window: W, of all methods that draft but `hierarchical`, which decides for itself.

    Raises:
        UserError: the pair has no alignment or one that does not fit, or the method's p was not found yet.
    """
    if case.method in LOSSLESS:
        mode = "autoregressive" if case.method == FULL else case.method
        asked = Request(mode=mode, window=None if mode == _HIERARCHICAL else window)
        return next(strategies_of(asked, settings, None, pair.draft is not None))
    if case.searched:
        raise UserError(f"kv_reduction is {case.saving}, but {case.line} has no budgets; give p instead.")
    selection = make_selection(pair, case)
    assert selection is not None
    return SpecAttn(selection, settings, window)


def needs_draft(case: Case) -> bool:
    """Whether a method decodes with a draft."""
    return case.method not in (FULL, *NEVER_DRAFTED)


class Answering:
    """Answers prompts with one method after another. What several methods are asked is read once for all of them."""

    def __init__(
        self,
        pair: ModelPair,
        cases: Sequence[Case],
        *,
        window: int = 5,
        batch: int = 1,
        seed: int = 0,
        slots: int = 0,
        draft_reach: int | None = DRAFT_REACH.recent,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Answers nothing yet.

        Args:
            pair: the models.
            cases: the methods with their settings.
            window: W, of all methods that draft.
            batch: prompts answered at a time. A last batch that is not full is filled up with copies, whose answers are
                dropped: compiling another program would take longer.
            seed: of the draws; greedy answers do not depend on it.
            slots: tokens of a prompt and its answer for which there is room in any case: what needs no more shares
                programs.
            draft_reach: as in `Request`.
            progress: told the prompts answered by all methods and all of them.

        Raises:
            UserError: no prompt at a time is wanted.
        """
        if batch < 1:
            raise UserError(f"batch is {batch}; expected at least 1 prompt at a time.")
        # Those that need no draft come first: the time of their reading is the target's alone.
        self._cases = sorted(cases, key=needs_draft)
        self._pair, self._window, self._batch, self._seed, self._progress = pair, window, batch, seed, progress
        self._slots, self._draft_reach = slots, draft_reach
        self._asked: Sequence[Asked] = ()
        self._answers: dict[Case, Answers] = {}

    def __call__(self, case: Case, asked: Sequence[Asked]) -> Answers:
        """What a method answers; prompts of equal settings and like lengths are answered together.

        Args:
            case: one of the methods. The first one that is asked these prompts waits for all of them.
            asked: the prompts.

        Raises:
            UserError: a prompt is too long for the models, or a method cannot be had.
        """
        if not self._answers or list(asked) != list(self._asked):
            self._asked, self._answers = asked, self._answer(asked)
        return self._answers[case]

    def _answer(self, asked: Sequence[Asked]) -> dict[Case, Answers]:
        """What all methods answer."""
        found = {case: dict[int, Generation]() for case in self._cases}
        seconds = {case: list[float]() for case in self._cases}
        # Where a prompt is read already, a chunk of the least length is read on.
        most = max((len(one.tokens) + one.limit for one in asked), default=1)
        widest = max([self._window, *(DEFAULT_PLACES for case in self._cases if case.method == _HIERARCHICAL)])
        slots = _bucket(max(most, self._slots) + widest + CHUNK_STEP)
        done = 0
        for indices in _batches(asked, self._batch):
            like = asked[indices[0]]
            settings = DecodeSettings(like.sampling, self._pair.tokenizer.eos_ids)
            memory, reading = Memory(slots, round_up(like.limit, _LIMIT_STEP)), 0.0
            for case in self._cases:
                strategy = strategy_for(self._pair, case, settings, self._window)
                run = generate(
                    self._pair,
                    [asked[index].tokens for index in indices],
                    Request(
                        mode=strategy,
                        max_new_tokens=like.limit,
                        stop=like.stop,
                        seed=self._seed,
                        draft_reach=self._draft_reach,
                    ),
                    memory=memory,
                )
                if strategy.needs_draft or not reading:
                    # Later ones read a token of each prompt: what the others needed is theirs too.
                    reading += run.timing.prefill_s
                seconds[case].append(reading + run.timing.decode_s)
                found[case].update(zip(indices, run.results, strict=True))
            done += len(set(indices))
            if self._progress is not None:
                self._progress(done, len(asked))
        return {
            case: Answers([found[case][index] for index in range(len(asked))], seconds[case], self._batch)
            for case in self._cases
        }


def _bucket(slots: int) -> int:
    """Slots for which prompts of about this length share their programs: at most a sixteenth more."""
    return round_up(slots, max(_LIMIT_STEP, 1 << (slots.bit_length() - 5)))


def _batches(asked: Sequence[Asked], batch: int) -> Iterator[list[int]]:
    """Indices of the prompts, batch by batch, the longest first: what does not fit into memory fails at once."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, one in enumerate(asked):
        groups.setdefault((one.limit, one.stop, one.sampling), []).append(index)
    for group in groups.values():
        order = sorted(group, key=lambda index: -len(asked[index].tokens))
        for at in range(0, len(order), batch):
            part = order[at : at + batch]
            full = batch if at else len(part)
            yield part + part[-1:] * (full - len(part))
