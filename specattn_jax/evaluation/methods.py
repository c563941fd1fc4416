"""The rows of the paper's table before they are measured: which selection, with which setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from specattn_jax.errors import UserError
from specattn_jax.evaluation.baselines import Oracle, Quest, Streaming, Vegas
from specattn_jax.loading.pair import ModelPair
from specattn_jax.planning.draft_reads import fit_draft_reads
from specattn_jax.reporting.provenance import alignment_digest
from specattn_jax.runtime.request import choose_reading
from specattn_jax.selection.alignment import Alignment, NucleusMass
from specattn_jax.selection.mixture import Mixture
from specattn_jax.selection.policy import SelectionPolicy, load_policy
from specattn_jax.selection.protocol import Selection

FULL, SPECATTN = "full", "specattn"
# What they read is a share of the cache, whatever the attention is; p means nothing to them.
_BY_SHARE = ("streaming", "quest")
_ORACLES = ("oracle", "oracle_layer")
VEGAS = "vegas"
METHODS = (FULL, *_BY_SHARE, VEGAS, *_ORACLES, SPECATTN)


@dataclasses.dataclass(frozen=True)
class Variant:
    """What an experiment puts in place of a preset, and of the pair's own alignment.

    Attributes:
        policy: the ingredients of the selection; None is the preset of that name.
        alignment: None is the pair's own.
    """

    policy: SelectionPolicy | None = None
    alignment: Alignment | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One method with one setting: a row of the table.

    Attributes:
        method: one of `METHODS`.
        policy: name of the selection policy; only for `specattn`.
        p: nucleus mass, the same in every layer; None where reads are set in another way.
        saving: wanted share of reads saved; None where p was given.
        alignment: name of the alignment, where it is not the pair's own; only for `specattn`.
        variant: what these two names stand for, where it is not what everybody has.
    """

    method: str
    policy: str | None = None
    p: float | None = None
    saving: float | None = None
    alignment: str | None = None
    # Arrays cannot be hashed. `describe` tells variants of the same names apart where results are kept.
    variant: Variant = dataclasses.field(default=Variant(), compare=False, repr=False)

    @property
    def line(self) -> str:
        """What its settings have in common: a line of the plots."""
        return " ".join(name for name in (self.method, self.policy, self.alignment) if name is not None)

    @property
    def ingredients(self) -> SelectionPolicy | None:
        """Its policy; None where the method has none."""
        return None if self.policy is None else self.variant.policy or load_policy(self.policy)

    @property
    def draft_reads(self) -> float | None:
        """Share of its own cache that its draft reads; None where the method has no policy."""
        policy = self.ingredients
        return None if policy is None else policy.draft_reads

    @property
    def label(self) -> str:
        """For people."""
        if self.saving is not None:
            return f"{self.line}, {self.saving:.0%} saved"
        return self.line if self.p is None else f"{self.line}, p = {self.p:g}"

    @property
    def key(self) -> str:
        """Name of the files with its results. Cases of one key read the same."""
        setting = "" if self.p is self.saving is None else f"-p{self.p!r}" if self.p else f"-saving{self.saving!r}"
        return self.line.replace(" ", "-") + setting

    @property
    def searched(self) -> bool:
        """Whether p has yet to be found for the wanted saving: budgets are calibrated for mixtures alone."""
        if self.p is not None or self.saving is None:
            return False
        policy = self.ingredients
        return self.method in (VEGAS, *_ORACLES) or (policy is not None and policy.prediction == "layer_map")

    def with_p(self, p: float) -> Case:
        """The same row with the p that was found for it."""
        return dataclasses.replace(self, p=p)

    def with_policy(self, policy: SelectionPolicy) -> Case:
        """The same row by other ingredients."""
        return dataclasses.replace(self, variant=dataclasses.replace(self.variant, policy=policy))

    def describe(self) -> dict[str, Any]:
        """All that decides what it reads, as JSON."""
        policy = {} if self.ingredients is None else dataclasses.asdict(self.ingredients)
        saving = self.saving if self.p is None else None
        # The pair's own is known by the folder that holds the results.
        digest = {} if self.variant.alignment is None else {"alignment": alignment_digest(self.variant.alignment)}
        return {"method": self.method, "policy": policy, "p": self.p, "saving": saving, **digest}


def list_cases(
    methods: Sequence[str], policies: Sequence[str], *, savings: Sequence[float] = (), masses: Sequence[float] = ()
) -> list[Case]:
    """All rows but the full target's, method by method.

    Args:
        methods: some of `METHODS`.
        policies: selection policies, each of which makes `specattn` once.
        savings: wanted shares of reads saved, or
        masses: nucleus masses p; methods that read a given share have no rows then.

    Raises:
        UserError: a method or policy is unknown, a number is out of range, not one of `savings` and `masses` is given,
            or no rows are left.
    """
    for method in methods:
        if method not in METHODS:
            raise UserError(f"methods names {method!r}; expected some of {', '.join(METHODS)}.")
    if bool(savings) == bool(masses):
        raise UserError("expected either wanted savings or nucleus masses p, not both.")
    for name, values in {"kv_reduction": savings, "p": masses}.items():
        for value in values:
            if not (0.0 < value < 1.0 or (name == "p" and value == 1.0)):
                raise UserError(f"{name} is {value}; expected a number between 0 and 1.")
    for policy in policies:
        load_policy(policy)
    lines = [(method, policy) for method in methods for policy in (policies if method == SPECATTN else (None,))]
    sparse = [(method, policy) for method, policy in lines if method != FULL]
    cases = [Case(method, policy, saving=saving) for method, policy in sparse for saving in savings]
    cases += [Case(method, policy, p=p) for method, policy in sparse if method not in _BY_SHARE for p in masses]
    if sparse and not cases:
        raise UserError(f"methods is {','.join(methods)}, which read a given share and know no p; give wanted savings.")
    return list(dict.fromkeys(cases))


def without_p(methods: Sequence[str]) -> list[str]:
    """Those of the methods that have no rows where p is given."""
    return [method for method in methods if method in _BY_SHARE]


def make_selection(pair: ModelPair, case: Case) -> Selection | None:
    """What the target reads; None is everything.

    Raises:
        UserError: the pair has no alignment, or one that was not calibrated for the wanted saving.
    """
    shape = pair.target.config
    if case.method == FULL:
        return None
    if case.method == SPECATTN:
        policy = case.variant.policy or case.policy
        assert policy is not None
        if case.variant.alignment is not None:
            pair = dataclasses.replace(pair, alignment=case.variant.alignment)
        saving = case.saving if case.p is None else None
        return choose_reading(pair, policy=policy, p=case.p, kv_reduction=saving)
    if case.method in (VEGAS, *_ORACLES):
        assert case.p is not None
        like, mass = load_policy("default"), NucleusMass.uniform(case.p, shape.num_layers)
        if case.method == VEGAS:
            return Vegas(mass, shape, num_sink=like.num_sink, num_recent=like.num_recent)
        return Oracle(
            mass,
            shape,
            per="kv_head" if case.method == "oracle" else "layer",
            num_sink=like.num_sink,
            num_recent=like.num_recent,
            dense_layers=like.dense_layers,
            block_size=like.block_size,
        )
    assert case.saving is not None
    return (Streaming if case.method == "streaming" else Quest)(jnp.asarray(case.saving, jnp.float32), shape)


def fit_case(pair: ModelPair, case: Case, *, context: int, batch: int = 1, window: int = 5) -> Case:
    """The case with what its draft reads of texts of one length, where its policy leaves that to the pair.

    It depends on shapes and on the pair's calibration alone, so that a table is the same on every device.

    Args:
        pair: the models.
        case: a row of the table.
        context: tokens of a text, or of a prompt and its answer.
        batch: texts read at a time.
        window: W.

    Raises:
        UserError: as `make_selection`.
    """
    if case.method != SPECATTN or case.ingredients is None or not case.ingredients.fits_draft_reads:
        return case
    selection = make_selection(pair, case)
    assert isinstance(selection, Mixture)
    return case.with_policy(fit_draft_reads(selection, context=context, batch=batch, window=window).policy)
