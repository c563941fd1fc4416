"""Prompts answered by one method in batches, with what it cost: what every task is made of."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence

from specattn_jax.decoding.autoregressive import Autoregressive
from specattn_jax.decoding.protocol import DecodeSettings, Strategy
from specattn_jax.decoding.sampling import Sampling
from specattn_jax.decoding.speculative import SpecAttn, Speculative
from specattn_jax.errors import UserError
from specattn_jax.evaluation.methods import FULL, Case, make_selection
from specattn_jax.loading.pair import ModelPair
from specattn_jax.runtime.generate import generate
from specattn_jax.runtime.request import Request
from specattn_jax.runtime.results import Generation

# Drafts, and verifies densely: lossless, so that its scores are those of full attention.
SPECULATIVE = "speculative"
LOSSLESS = (FULL, SPECULATIVE)
# Batches without which a median says nothing.
_TIMED = 3


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
        window: W, of all methods that draft.

    Raises:
        UserError: the pair has no alignment or one that does not fit, or the method's p was not found yet.
    """
    if case.method == FULL:
        return Autoregressive(settings)
    if case.method == SPECULATIVE:
        return Speculative(settings=settings, window=window)
    if case.searched:
        raise UserError(f"kv_reduction is {case.saving}, but {case.line} has no budgets; give p instead.")
    selection = make_selection(pair, case)
    assert selection is not None
    return SpecAttn(selection, settings, window)


def answer(
    pair: ModelPair,
    case: Case,
    asked: Sequence[Asked],
    *,
    window: int = 5,
    batch: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """Answers prompts with one method, those of equal settings and like lengths together.

    Args:
        pair: the models.
        case: the method with its setting.
        asked: the prompts.
        window: W, of all methods that draft.
        batch: prompts answered at a time. A last batch that is not full is filled up with copies, whose answers are
            dropped: compiling another program would take longer.
        seed: of the draws; greedy answers do not depend on it.
        progress: told the prompts answered and all of them.

    Raises:
        UserError: a prompt is too long for the models, or the method cannot be had.
    """
    if batch < 1:
        raise UserError(f"batch is {batch}; expected at least 1 prompt at a time.")
    found: dict[int, Generation] = {}
    seconds = []
    for indices in _batches(asked, batch):
        like = asked[indices[0]]
        settings = DecodeSettings(like.sampling, pair.tokenizer.eos_ids)
        request = Request(
            mode=strategy_for(pair, case, settings, window), max_new_tokens=like.limit, stop=like.stop, seed=seed
        )
        run = generate(pair, [asked[index].tokens for index in indices], request)
        seconds.append(run.timing.prefill_s + run.timing.decode_s)
        found.update(zip(indices, run.results, strict=True))
        if progress is not None:
            progress(len(found), len(asked))
    return Answers([found[index] for index in range(len(asked))], seconds, batch)


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
