"""How much of its cache a draft reads: by what that costs the pair, and by what it saves at the context in question."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from specattn_jax.decoding.speculative import SpecAttn
from specattn_jax.decoding.work import Scenario
from specattn_jax.planning.cost import window_bytes
from specattn_jax.planning.gate import expected_saving
from specattn_jax.selection.make import DraftedSelection

# Where windows become faster by less, everything is read, whatever it costs to leave something out.
LEAST_GAIN = 0.02
# So much faster has a window to become, at least, for each part by which the KL grows.
WORTH_OF_LOSS = 0.5
_TINY = 1e-12


def choose_draft_reads(scenario: Scenario, losses: Mapping[float, float]) -> float:
    """The share of its own cache that a draft is to read.

    The *gain* of a share is how much faster a window is than one of a draft that reads everything. It is counted in the
    bytes of `window_bytes`, which are the same on every device, so that tables do not depend on where they were
    measured. Its *loss* is how much larger the target's KL is than with such a draft, as measured at calibration; a
    sparser reading that was found to be better than a denser one counts as no worse. A share pays only where its gain
    exceeds half of its loss: the one with the smallest time * (1 + loss / 2) is taken. But where its gain is below 2 %
    (short contexts, few sequences), everything is read.

    Args:
        scenario: what is decoded; its `draft_reads` does not matter.
        losses: KL in nats by the share, from 1 on falling.
    """

    def moved(share: float) -> float:
        case = scenario._replace(draft_reads=share)
        return window_bytes(case, SpecAttn(window=case.window).cost(case)).total

    kl = np.maximum.accumulate(np.maximum(list(losses.values()), _TINY))
    times = {share: moved(share) / moved(1.0) for share in losses}
    grown = dict(zip(losses, kl / kl[0] - 1.0, strict=True))
    costs = {share: times[share] * (1.0 + WORTH_OF_LOSS * grown[share]) for share in losses}
    best = min(costs, key=lambda share: costs[share])
    return best if 1.0 / times[best] - 1.0 >= LEAST_GAIN else 1.0


def fit_draft_reads(selection: DraftedSelection, *, context: int, batch: int = 1, window: int = 5) -> DraftedSelection:
    """The selection whose draft reads what pays, if its policy leaves that to the pair; otherwise the same.

    Of a pair of which nothing was measured, the policy's own share counts as one that costs nothing.

    Args:
        selection: of a pair.
        context: entries in the cache of the longest sequence, at the end.
        batch: sequences.
        window: W.
    """
    policy = selection.policy
    if not policy.fits_draft_reads:
        return selection
    scenario = Scenario(
        selection.target,
        selection.draft,
        batch,
        context,
        window,
        accepted=0.0,
        kv_reduction=min(1.0, max(0.0, expected_saving(selection))),
    )
    losses = selection.alignment.nearest(context).draft_losses or {1.0: 0.0, policy.draft_reads: 0.0}
    return dataclasses.replace(selection, policy=policy.with_draft_reads(choose_draft_reads(scenario, losses)))
