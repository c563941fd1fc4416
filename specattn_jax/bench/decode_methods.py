"""The ways of decoding that `specattn bench decode` compares, and the pieces of theirs that only a benchmark needs."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key

from specattn_jax.decoding.autoregressive import Autoregressive
from specattn_jax.decoding.itself import SelfSpeculative
from specattn_jax.decoding.judging import Judge, judge_exactly
from specattn_jax.decoding.protocol import Strategy
from specattn_jax.decoding.sampling import Sampling, Verdict
from specattn_jax.decoding.speculative import SparselyDrafted, SpecAttn, Speculative
from specattn_jax.decoding.work import Scenario, Work
from specattn_jax.errors import UserError
from specattn_jax.loading.pair import NO_DRAFT
from specattn_jax.models.cache import KVCache
from specattn_jax.models.forward import Attend, Read
from specattn_jax.selection.policy import SelectionPolicy, load_policy
from specattn_jax.selection.protocol import Opened, Opening, Seen, Selection

AUTOREGRESSIVE, SPECULATIVE, SPECATTN = "autoregressive", "speculative", "specattn"
RIVAL, DENSE_DRAFT = "sparse draft, dense verification", "specattn, dense draft"
MOSAIC = "speculative (mosaic gpu)"
ALONE, LOOKUP, SPARSE_DRAFT = "self", "lookup", "speculative, sparse draft"
HIERARCHY, HIERARCHY_OF_TEXT = "hierarchical", "hierarchical, no draft"
# Of what `--mode auto` chooses from, those that every case of a benchmark has, the simplest first.
CHOICES = (AUTOREGRESSIVE, SPECULATIVE, SPECATTN)
AUTO, AUTO_LOSSLESS = "auto", "auto, lossless"
# The implementation that is the fastest of ours on the device.
BEST = "best"


class Imposed(abc.ABC):
    """A judge for random weights, which would accept nothing: it says how many drafted tokens are accepted.

    The verdict is worked out all the same, and the tokens are its own, so that only the count is not.
    """

    @abc.abstractmethod
    def accepted(self, keys: Key[Array, " B"], window: int, windows: Int32[Array, " B"]) -> Int32[Array, " B"]:
        """How many of W drafted tokens are accepted in the next window of each sequence."""

    def __call__(
        self,
        keys: Key[Array, " B"],
        drafted: Int32[Array, "B W"],
        probs: Float[Array, "B W V"] | None,
        logits: Float[Array, "B T V"],
        sampling: Sampling,
        windows: Int32[Array, " B"],
        count: Int32[Array, " B"] | None = None,
    ) -> Verdict:
        """The exact verdict, but for the count, which is at most that of the proposed tokens."""
        verdict = judge_exactly(keys, drafted, probs, logits, sampling, windows, count)
        accepted = self.accepted(keys, drafted.shape[1], windows)
        return verdict._replace(accepted=accepted if count is None else jnp.minimum(accepted, count))


@dataclasses.dataclass(frozen=True)
class ImposedAcceptance(Imposed):
    """Counts that are given.

    Attributes:
        counts: accepted tokens, 0 to W, window by window of a sequence, over and over.
    """

    counts: tuple[int, ...]

    def accepted(self, keys: Key[Array, " B"], window: int, windows: Int32[Array, " B"]) -> Int32[Array, " B"]:
        """The next count.

        Raises:
            UserError: a count is none of a window.
        """
        if not all(0 <= count <= window for count in self.counts):
            raise UserError(f"counts is {self.counts}; expected counts from 0 to the window's {window} drafted tokens.")
        return jnp.array(self.counts, jnp.int32)[windows % len(self.counts)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftOnly:
    """As another selection, but what it chooses is for the draft alone: the target reads everything.

    Attributes:
        inner: the other.
    """

    inner: Selection

    def init(self, opening: Opening) -> Opened:
        """That of the other."""
        return self.inner.init(opening)

    def observe(self, state: Any, read: Callable[[Attend], Read], step: Int32[Array, ""]) -> tuple[Read, Any]:
        """As the other."""
        return self.inner.observe(state, read, step)

    def plan(self, state: Any, draft_cache: KVCache | None, past: Int32[Array, " B"]) -> tuple[None, Any]:
        """Everything; the compiler leaves out what only the target's plans would need."""
        return None, self.inner.plan(state, draft_cache, past)[1]

    def learn(self, state: Any, seen: Seen) -> Any:
        """As the other."""
        return self.inner.learn(state, seen)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseDraft(Speculative):
    """The rival: the draft reads sparsely, the target everything, so that it is lossless."""

    name: ClassVar[str] = RIVAL

    def cost(self, scenario: Scenario) -> Work:
        """As `Speculative`, but with sparse steps of the draft, and the scores that these need."""
        return super().cost(scenario)._replace(draft_reads=scenario.draft_share, scores=True)


# Makes a strategy of what is selected, W, and who judges.
MakeStrategy: TypeAlias = Callable[[Selection, int, Judge], Strategy]


class Method(NamedTuple):
    """One way of decoding.

    Attributes:
        make: makes its strategy.
        policy: by which draft or target read sparsely; None where both read everything.
        implementation: backend of all ops, or `BEST`.
        platform: the only one where it can run; None is everywhere.
    """

    make: MakeStrategy
    policy: SelectionPolicy | None = None
    implementation: str = BEST
    platform: str | None = None


def _alone(selection: Selection, window: int, judge: Judge) -> Strategy:
    return Autoregressive()


def _dense(selection: Selection, window: int, judge: Judge) -> Strategy:
    return Speculative(window=window, judge=judge)


def _sparse(selection: Selection, window: int, judge: Judge) -> Strategy:
    return SpecAttn(selection, window=window, judge=judge)


def _rival(selection: Selection, window: int, judge: Judge) -> Strategy:
    return SparseDraft(DraftOnly(selection), window=window, judge=judge)


def _itself(selection: Selection, window: int, judge: Judge) -> Strategy:
    return SelfSpeculative(window=window, judge=judge)


def _sparse_draft(selection: Selection, window: int, judge: Judge) -> Strategy:
    return SparselyDrafted(window=window, judge=judge)


def methods() -> dict[str, Method]:
    """The ways of decoding with random weights, by name; the most telling first."""
    default = load_policy("default")
    return {
        SPECULATIVE: Method(_dense),
        SPECATTN: Method(_sparse, default),
        AUTOREGRESSIVE: Method(_alone),
        RIVAL: Method(_rival, default),
        SPARSE_DRAFT: Method(_sparse_draft),
        ALONE: Method(_itself),
        DENSE_DRAFT: Method(_sparse, dataclasses.replace(default, draft_reads=1.0)),
        MOSAIC: Method(_dense, implementation="pallas_mosaic_gpu", platform="gpu"),
        "speculative (xla)": Method(_dense, implementation="xla"),
        "specattn paper": Method(_sparse, load_policy("paper")),
    }


# Of a real pair: what is asked of `generate`, and `draft` where it is asked of a pair without one.
REAL_METHODS: dict[str, dict[str, Any]] = {
    AUTOREGRESSIVE: {"mode": AUTOREGRESSIVE},
    SPECULATIVE: {"mode": SPECULATIVE},
    SPECATTN: {"mode": SPECATTN, "kv_reduction": 0.75},
    "specattn, 90 % saved": {"mode": SPECATTN, "kv_reduction": 0.9},
    # Where a step of the draft takes nearly as long as one of the target, fewer steps a window pay.
    "speculative, window 3": {"mode": SPECULATIVE, "window": 3},
    "specattn, window 3": {"mode": SPECATTN, "kv_reduction": 0.75, "window": 3},
    "specattn, 90 % saved, window 3": {"mode": SPECATTN, "kv_reduction": 0.9, "window": 3},
    "speculative, window auto": {"mode": SPECULATIVE, "window": AUTO},
    "specattn, window auto": {"mode": SPECATTN, "kv_reduction": 0.75, "window": AUTO},
    "specattn, 90 % saved, window auto": {"mode": SPECATTN, "kv_reduction": 0.9, "window": AUTO},
    # As it is without any option: the window is chosen too.
    AUTO: {"mode": AUTO, "window": None},
    AUTO_LOSSLESS: {"mode": AUTO, "window": None, "lossless": True},
    LOOKUP: {"mode": LOOKUP},
    ALONE: {"mode": ALONE},
    SPARSE_DRAFT: {"mode": SPECULATIVE, "draft_reads": 0.1},
    HIERARCHY: {"mode": "hierarchical", "window": None},
    HIERARCHY_OF_TEXT: {"mode": "hierarchical", "window": None, "draft": NO_DRAFT},
    "specattn paper": {"mode": SPECATTN, "policy": "paper"},
}
