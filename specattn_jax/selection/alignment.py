"""How a draft's attention predicts a target's: the published layer map and our mixture weights, fitted and saved."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from specattn_jax.errors import UserError
from specattn_jax.files import sensible

Granularity = Literal["head", "kv_head", "layer"]

FORMAT = 1
_TINY = 1e-12
_MOST_LEFT_OUT = 0.9999
# At twelve times the calibrated length KL was 1.5 to 1.8 times that of an alignment of such lengths (docs/quality.md).
_FAR = 4
# Density goes about as the inverse square root of the mass left out, so twice n as the power answers a mean that is one
# percent off with n percent of density. What remains of a text's own error e is e / (n + 1). The prior, in windows, is
# more than n, so that one window's surplus is not taken back by the next alone.
_STEER_POWER = 12.0
_STEER_PRIOR = 8.0


def reduce_heads(
    scores: Float[Array, "*batch N S"], granularity: Granularity, num_kv_heads: int
) -> Float[Array, "*batch r S"]:
    """Attention of one draft layer as sources of a mixture: its heads, the means of its kv groups, or its mean."""
    if granularity == "head":
        return scores
    groups = num_kv_heads if granularity == "kv_head" else 1
    return jnp.mean(scores.reshape(*scores.shape[:-2], groups, -1, scores.shape[-1]), axis=-2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steering:
    """What was read so far, by which a wanted saving is met.

    Attributes:
        read: sum over the windows of the share of the past that each target layer read.
        windows: number of those windows.
    """

    read: Float[Array, "B L"]
    windows: Int32[Array, " B"]

    @classmethod
    def start(cls, batch: int, num_layers: int) -> Steering:
        """Nothing was read yet."""
        return cls(jnp.zeros((batch, num_layers), jnp.float32), jnp.zeros((batch,), jnp.int32))

    def add(self, read: Float[Array, "B L"], active: Bool[Array, " B"]) -> Steering:
        """Adds one window, of the sequences that still decode."""
        return Steering(self.read + active[:, None] * read, self.windows + active)


def between_lengths(past: Int32[Array, " B"], lengths: Float[Array, " N"]) -> Float[Array, "B N"]:
    """How much each of N calibrations counts for caches of `past` entries: linear in the logarithm of the length.

    Beyond the shortest and the longest the nearest one counts alone; shares sum to 1.
    """
    at = jnp.log(jnp.maximum(past, 1).astype(jnp.float32))
    return jax.vmap(lambda own: jnp.interp(at, jnp.log(lengths), own), out_axes=1)(jnp.eye(len(lengths)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NucleusMass:
    """How much attention mass a selection keeps, per target layer or kv head, and per cache length.

    Attributes:
        left_out: mass that each of the u = L layers, or of the u = L * K kv heads, may leave out; 0 reads everything.
        length_knots: cache lengths, ascending.
        length_scale: factor on `left_out` at each of those lengths: a longer cache holds the same mass in a smaller
            share of its entries, so for equal savings it leaves out less.
        wanted_read: share of reads to steer to, or 0 to keep `left_out` as it is.
        longer: masses found on longer texts, in the order of their lengths; between two lengths they are interpolated.
    """

    left_out: Float[Array, " u"]
    length_knots: Float[Array, " C"]
    length_scale: Float[Array, " C"]
    wanted_read: Float[Array, ""]
    longer: tuple[NucleusMass, ...] = ()

    @classmethod
    def uniform(cls, p: float, num_layers: int) -> NucleusMass:
        """The same p in every layer at every length."""
        return cls(jnp.full((num_layers,), 1.0 - p, jnp.float32), jnp.ones((1,)), jnp.ones((1,)), jnp.zeros(()))

    def p(self, past: Int32[Array, " B"], steering: Steering | None = None) -> Float[Array, "B u"]:
        """Nucleus mass per layer or kv head for caches of `past` entries; beyond the knots the nearest one counts.

        Texts differ from the calibration text, so where a saving is wanted, the mean share read so far corrects the
        mass: a text that read too much leaves out more from then on.

        Args:
            past: entries in each cache.
            steering: what was read so far; None corrects nothing.
        """
        left_out = self._unsteered(past)
        if self.longer:
            every = (self, *self.longer)
            share = between_lengths(past, jnp.stack([one.length_knots[-1] for one in every]))
            logs = jnp.stack([jnp.log(one._unsteered(past)) for one in every])
            left_out = jnp.exp(jnp.einsum("bn,nbu->bu", share, logs))
        if steering is not None:
            steady = jnp.where(self.wanted_read > 0, self.wanted_read, 1.0)
            read = jnp.mean(steering.read, axis=1)
            mean = (read + _STEER_PRIOR * steady) / (steering.windows + _STEER_PRIOR)
            left_out *= jnp.where(self.wanted_read > 0, (mean / steady) ** _STEER_POWER, 1.0)[:, None]
        return 1.0 - jnp.clip(left_out, 0.0, _MOST_LEFT_OUT)

    def _unsteered(self, past: Int32[Array, " B"]) -> Float[Array, "B u"]:
        """Mass that is left out, of these texts alone."""
        length = jnp.log(jnp.maximum(past, 1).astype(jnp.float32))
        scale = jnp.exp(jnp.interp(length, jnp.log(self.length_knots), jnp.log(self.length_scale)))
        return self.left_out * scale[:, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Alignment:
    """A calibrated prediction of the target's attention.

    Attributes:
        weights: mixture weights, non-negative, rows summing to 1: row `layer * K + kv_head` of the target over the R
            sources of the draft, draft layer by draft layer.
        savings: shares of cache reads saved for which budgets were fitted, ascending.
        left_out: attention mass that each target layer (u = L) or kv head (u = L * K, as the rows of `weights`) leaves
            out to save `savings[i]` of the reads on held-out text.
        length_knots: cache lengths at which the savings were matched.
        length_scale: factor on `left_out[i]` at each of those lengths.
        layer_map: draft layer that stands for each target layer (published alignment).
        granularity: what one source is.
        longer: alignments of the same pair that were calibrated on longer texts, in the order of their lengths.
            Between two lengths weights and masses are interpolated.
        provenance: how this was made, as JSON: models, texts, context, seed, fit statistics.
        draft_shares: shares of its own cache that the draft read of held-out text, all of it first; None where that
            was not measured, as in alignments of before.
        draft_kl: mean KL(full || sparse) of the target's next-token distributions at each of those shares, in nats.
    """

    weights: Float[Array, "rows R"]
    savings: Float[Array, " Q"]
    left_out: Float[Array, "Q u"]
    length_knots: Float[Array, " C"]
    length_scale: Float[Array, "Q C"]
    layer_map: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    granularity: Granularity = dataclasses.field(metadata={"static": True})
    longer: tuple[Alignment, ...] = ()
    provenance: str = dataclasses.field(default="{}", metadata={"static": True})
    draft_shares: Float[Array, " D"] | None = None
    draft_kl: Float[Array, " D"] | None = None

    @property
    def every(self) -> tuple[Alignment, ...]:
        """This one and those of longer texts."""
        return (self, *self.longer)

    @property
    def length(self) -> int:
        """Entries of the longest cache that its own calibration looked at."""
        return int(self.length_knots[-1])

    @property
    def longest(self) -> int:
        """Entries of the longest cache that any of them looked at."""
        return self.every[-1].length

    def nearest(self, entries: int) -> Alignment:
        """The one whose own length is the nearest, in proportion, to a cache of so many entries."""
        return min(self.every, key=lambda one: abs(np.log(max(entries, 1) / one.length)))

    def weights_at(self, past: Int32[Array, " B"]) -> Float[Array, "B rows R"]:
        """Mixture weights for caches of `past` entries."""
        share = between_lengths(past, jnp.stack([one.length_knots[-1] for one in self.every]))
        return jnp.einsum("bn,nar->bar", share, jnp.stack([one.weights for one in self.every]))

    def doubt(self, tokens: int) -> str | None:
        """A sentence for people who use it on texts far longer than those it was made of; None where they are not."""
        if tokens <= _FAR * self.longest:
            return None
        return (
            f"the alignment was calibrated on texts of up to {self.longest:,} tokens, and this one has {tokens:,}; "
            "calibrate on longer ones with `specattn calibrate --context`, lest it reads what is not needed."
        )

    @property
    def draft_losses(self) -> dict[float, float]:
        """KL in nats by the share that the draft read of its own cache, all of it first; empty if not measured."""
        if self.draft_shares is None or self.draft_kl is None:
            return {}
        # To the digits that people write, whatever 32 bits make of them.
        shares = [round(share, 4) for share in np.asarray(self.draft_shares).tolist()]
        return dict(zip(shares, np.asarray(self.draft_kl).tolist(), strict=True))

    def mass_for_saving(self, saving: float) -> NucleusMass:
        """Nucleus mass that saves the wanted share of reads, interpolated between the fitted budgets.

        Raises:
            UserError: nothing was fitted near the wanted saving.
        """
        low, high = float(self.savings[0]), float(self.savings[-1])
        if not low - 1e-6 <= saving <= high + 1e-6:
            raise UserError(
                f"kv_reduction is {saving}; this alignment was calibrated for {low:.2f} to {high:.2f}, so choose a "
                "value there or calibrate again."
            )

        # Densities are nearly linear in the logarithm of the mass left out, so that is what is interpolated.
        def interpolate(table: Float[Array, "Q columns"]) -> Float[Array, " columns"]:
            return jnp.exp(jax.vmap(lambda column: jnp.interp(saving, self.savings, column), in_axes=1)(jnp.log(table)))

        wanted = jnp.asarray(1.0 - saving, jnp.float32)
        mass = NucleusMass(interpolate(self.left_out), self.length_knots, interpolate(self.length_scale), wanted)
        if not self.longer:
            return mass
        longer = tuple(one.mass_for_saving(saving) for one in self.longer)
        # Some may have a mass per layer, and others one per kv head.
        units = max(len(one.left_out) for one in (mass, *longer))
        same = [
            dataclasses.replace(one, left_out=jnp.repeat(one.left_out, units // len(one.left_out)))
            for one in (mass, *longer)
        ]
        return dataclasses.replace(same[0], longer=tuple(same[1:]))


_ARRAYS = ("weights", "savings", "left_out", "length_knots", "length_scale")
# Both or none; those who know them not leave them aside, so that the format is the same.
_MEASURED = ("draft_shares", "draft_kl")


def fit_mixture(
    target: Float[Array, "rows n S"], sources: Float[Array, "R n S"], iterations: int = 60, part: int | None = None
) -> Float[Array, "rows R"]:
    """Mixture weights w >= 0, sum 1, that minimise the mean over the n positions of KL(target || sum_r w_r source_r).

    The problem is convex; expectation-maximisation solves it from uniform weights:
    `w_r <- mean_n sum_s a w_r b_r / mix`.

    Args:
        target: attention to predict, softmax rows over S.
        sources: attention of the draft at the same positions.
        iterations: EM steps; about 60 suffice.
        part: positions that are mixed at a time, which is what memory is needed for besides the arguments; all without.
    """
    rows, count, _ = target.shape
    start = jnp.full((rows, sources.shape[0]), 1.0 / sources.shape[0], jnp.float32)

    def improve(_: Int32[Array, ""], weights: Float[Array, "rows R"]) -> Float[Array, "rows R"]:
        def share(wanted: Float[Array, "rows part S"], basis: Float[Array, "R part S"]) -> Float[Array, "rows R"]:
            mix = jnp.einsum("ar,rns->ans", weights, basis)
            return jnp.einsum("ans,rns->ar", wanted / jnp.maximum(mix, _TINY), basis)

        updated = weights * _sum_of_parts(share, target, sources, part) / count
        return updated / jnp.maximum(jnp.sum(updated, axis=-1, keepdims=True), _TINY)

    return jax.lax.fori_loop(0, iterations, improve, start)


def mixture_kl(
    target: Float[Array, "rows n S"],
    sources: Float[Array, "R n S"],
    weights: Float[Array, "rows R"],
    part: int | None = None,
) -> Float[Array, " rows"]:
    """Mean over positions of KL(target || mixture), in nats; `part` as in `fit_mixture`."""

    def summed(wanted: Float[Array, "rows part S"], basis: Float[Array, "R part S"]) -> Float[Array, " rows"]:
        return attention_kl(wanted, jnp.einsum("ar,rns->ans", weights, basis)) * wanted.shape[1]

    return _sum_of_parts(summed, target, sources, part) / target.shape[1]


def _sum_of_parts(
    of: Callable[[Array, Array], Array],
    target: Float[Array, "rows n S"],
    sources: Float[Array, "R n S"],
    part: int | None,
) -> Array:
    """What a function of some positions gives, summed over all.

    Raises:
        ValueError: the positions are no whole number of parts.
    """
    count = target.shape[1]
    size = part or count
    if count % size:
        raise ValueError(f"part is {size}; expected a divisor of the {count} positions.")

    def at(place: Array | int) -> Array:
        return of(*(jax.lax.dynamic_slice_in_dim(x, place * size, size, axis=1) for x in (target, sources)))

    return jax.lax.fori_loop(1, count // size, lambda place, sum_: sum_ + at(place), at(0))


def attention_kl(target: Float[Array, "rows n S"], predicted: Float[Array, "rows n S"]) -> Float[Array, " rows"]:
    """Mean over positions of KL(target || predicted), in nats."""
    log_ratio = jnp.log(jnp.maximum(target, _TINY)) - jnp.log(jnp.maximum(predicted, _TINY))
    return jnp.mean(jnp.sum(target * log_ratio, axis=-1), axis=-1)


def layer_similarity(target: Float[Array, "L n S"], draft: Float[Array, "M n S"]) -> Float[Array, "M L"]:
    """Published similarity of head-averaged layers: `-KL(target_j || draft_i)`, averaged over positions."""
    return -jax.lax.map(lambda source: attention_kl(target, jnp.broadcast_to(source, target.shape)), draft)


def monotone_map(similarity: np.ndarray) -> tuple[int, ...]:
    """Layer map f of largest total similarity with f non-decreasing, by dynamic programming (paper, section 3).

    Args:
        similarity: `[M, L]`, draft layer against target layer.
    """
    num_draft, num_target = similarity.shape
    best = np.empty((num_draft, num_target))
    choice = np.zeros((num_draft, num_target), np.int64)
    best[:, 0] = similarity[:, 0]
    for layer in range(1, num_target):
        # Best predecessor among draft layers up to i.
        reach = np.maximum.accumulate(best[:, layer - 1])
        where = np.maximum.accumulate(np.where(best[:, layer - 1] >= reach, np.arange(num_draft), 0))
        best[:, layer] = similarity[:, layer] + reach
        choice[:, layer] = where
    path = [int(np.argmax(best[:, -1]))]
    for layer in range(num_target - 1, 0, -1):
        path.append(int(choice[path[-1], layer]))
    return tuple(reversed(path))


def join_alignments(alignments: Sequence[Alignment]) -> Alignment:
    """One alignment of several that were calibrated on texts of different lengths, in any order.

    Raises:
        UserError: two are of one length, or they are not of one pair and kind.
    """
    single = [dataclasses.replace(one, longer=()) for several in alignments for one in several.every]
    first, *longer = sorted(single, key=lambda one: one.length)
    lengths = [one.length for one in (first, *longer)]
    if len(set(lengths)) < len(lengths):
        raise UserError(f"alignments were calibrated on caches of {lengths} entries; expected different lengths.")
    kinds = {(one.weights.shape, one.granularity) for one in (first, *longer)}
    if len(kinds) > 1:
        raise UserError("alignments are of different models or sources; expected those of one pair and granularity.")
    return dataclasses.replace(first, longer=tuple(longer))


def save_alignment(alignment: Alignment, folder: Path) -> None:
    """Writes `alignment.json` and `alignment.npz` into an existing folder (see `files.atomic_folder`).

    Those of longer texts go into folders of their own in there, named by their lengths.
    """
    header: dict[str, Any] = {
        "format": FORMAT,
        "granularity": alignment.granularity,
        "layer_map": list(alignment.layer_map),
        "longer": [f"longer_{one.length}" for one in alignment.longer],
        "provenance": json.loads(alignment.provenance),
    }
    for name, one in zip(header["longer"], alignment.longer, strict=True):
        (folder / name).mkdir()
        save_alignment(one, folder / name)
    (folder / "alignment.json").write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
    found = {name: getattr(alignment, name) for name in (*_ARRAYS, *_MEASURED)}
    arrays: dict[str, Any] = {name: np.asarray(array) for name, array in found.items() if array is not None}
    np.savez_compressed(folder / "alignment.npz", **arrays)


def load_alignment(directory: Path) -> Alignment:
    """Reads what `save_alignment` wrote.

    Raises:
        UserError: the folder is missing, damaged, or of another format.
    """
    directory = Path(directory)
    remedy = "make one with `specattn calibrate`"
    with sensible(f"alignment: {directory}", remedy):
        try:
            header: dict[str, Any] = json.loads((directory / "alignment.json").read_text(encoding="utf-8"))
            with open(directory / "alignment.npz", "rb") as file, np.load(file) as arrays:
                fitted: dict[str, Any] = {name: jnp.asarray(arrays[name]) for name in _ARRAYS}
                fitted |= {name: jnp.asarray(arrays[name]) for name in _MEASURED if name in arrays}
        except FileNotFoundError as error:
            raise UserError(f"alignment: {error.filename} does not exist; {remedy}.") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else header
        raise UserError(f"alignment: {directory} has format {found}; expected {FORMAT}; {remedy}.")
    with sensible(f"alignment: {directory}", remedy):
        alignment = Alignment(
            **fitted,
            layer_map=tuple(header["layer_map"]),
            granularity=header["granularity"],
            provenance=json.dumps(header["provenance"], sort_keys=True),
        )
        _check_sound(alignment)
        longer = [load_alignment(directory / str(name)) for name in header.get("longer", [])]
        return join_alignments([alignment, *longer])


def _check_sound(alignment: Alignment) -> None:
    """Raises ValueError for an alignment that cannot have been fitted."""
    layers, (budgets,), (knots,) = len(alignment.layer_map), alignment.savings.shape, alignment.length_knots.shape
    rows, sources = alignment.weights.shape
    per = rows if alignment.left_out.shape[-1:] == (rows,) else layers
    wanted = {"weights": (rows, sources), "left_out": (budgets, per), "length_scale": (budgets, knots)}
    for name, shape in wanted.items():
        if getattr(alignment, name).shape != shape:
            raise ValueError(f"{name} has shape {getattr(alignment, name).shape}, expected {shape}")
    for name in (*_ARRAYS, *_MEASURED):
        array = getattr(alignment, name)
        if array is not None and not bool(jnp.all(jnp.isfinite(array))):
            raise ValueError(f"{name} holds NaN or infinity")
    _check_measured(alignment)
    if rows % layers or not all(isinstance(layer, int) and 0 <= layer < sources for layer in alignment.layer_map):
        raise ValueError("layer_map does not fit the weights")
    if alignment.granularity not in get_args(Granularity):
        raise ValueError(f"granularity is {alignment.granularity!r}")


def _check_measured(alignment: Alignment) -> None:
    """Raises ValueError for what cannot have been measured of a draft."""
    shares, losses = alignment.draft_shares, alignment.draft_kl
    if shares is None and losses is None:
        return
    if shares is None or losses is None or shares.ndim != 1 or shares.shape != losses.shape or not shares.size:
        raise ValueError("draft_shares and draft_kl are not of one length")
    falls = bool(jnp.all(jnp.diff(shares) < 0)) and float(shares[0]) == 1.0 and float(shares[-1]) > 0.0
    if not falls or bool(jnp.any(losses < 0)):
        raise ValueError("draft_shares does not fall from 1, or draft_kl is negative")
