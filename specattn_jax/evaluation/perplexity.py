"""The paper's evaluation: documents read with every method through the real decode path, resumable, as one table."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from specattn_jax.errors import UserError
from specattn_jax.evaluation.forced import Reading, read_documents
from specattn_jax.evaluation.methods import FULL, Case, fit_case, make_selection
from specattn_jax.evaluation.search import find_left_out
from specattn_jax.evaluation.store import Store, identify
from specattn_jax.evaluation.tables import Measured, Row, make_row, markdown
from specattn_jax.files import atomic_file
from specattn_jax.loading.pair import ModelPair
from specattn_jax.reporting.provenance import documents_digest
from specattn_jax.runtime.session import DRAFT_REACH
from specattn_jax.selection.protocol import Selection

TABLE, MARKDOWN = "table.json", "table.md"
# Told the readings done, all that are expected, the case at hand, and what was just measured (or nothing).
Progress = Callable[[int, int, str, str], None]
# Readings of the first batch that a search usually takes.
_SEARCH_READINGS = 4


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """How documents are read.

    Attributes:
        prefill: share of each document that is prefilled densely.
        window: W.
        batch: documents read at a time; results depend on it in their last bits, so a resumed run keeps it.
    """

    prefill: float = 0.1
    window: int = 5
    batch: int = 4

    def __post_init__(self) -> None:
        if not 0.0 < self.prefill < 1.0:
            raise UserError(f"prefill is {self.prefill}; expected a share between 0 and 1.")
        if self.batch < 1:
            raise UserError(f"batch is {self.batch}; expected at least 1 document.")


def open_store(out: Path, pair: ModelPair, documents: Sequence[Sequence[int]], settings: EvaluationSettings) -> Store:
    """The folder for all that depends on these models, documents and settings.

    Raises:
        UserError: it belongs to something else.
    """
    configuration = {
        **identify(pair),
        "texts": documents_digest(documents),
        "documents": len(documents),
        "context": len(documents[0]),
        **dataclasses.asdict(settings),
    }
    return Store(out, configuration)


class Evaluation:
    """Reads documents with one method after the other; what was read before comes from the store."""

    def __init__(
        self,
        pair: ModelPair,
        documents: Sequence[Sequence[int]],
        settings: EvaluationSettings,
        store: Store,
        progress: Progress | None = None,
    ) -> None:
        """Reads nothing yet.

        Args:
            pair: the models.
            documents: token ids, all of one length.
            settings: how they are read.
            store: from `open_store`.
            progress: told about every reading.
        """
        self.pair, self.settings, self.store = pair, settings, store
        self.batches = [documents[at : at + settings.batch] for at in range(0, len(documents), settings.batch)]
        # Dense readings of this process, to compare with: [windows, B, W, D] on the host.
        self._references: dict[int, Float[np.ndarray, "windows B W D"]] = {}
        self._clock = _Estimate(progress)

    def run(self, cases: Sequence[Case]) -> list[tuple[Case, Row]]:
        """Rows of the table, full attention first.

        Args:
            cases: the others. Those that want a saving and have no means to meet it get the p that does.

        Raises:
            UserError: the pair has no alignment or one that does not fit, or results cannot be written.
        """
        count = len(self.batches)
        full_case = Case(FULL)
        how = {"context": self._context, "batch": self.settings.batch, "window": self.settings.window}
        everything = [full_case, *(fit_case(self.pair, case, **how) for case in cases if case != full_case)]
        self._clock.expect({case: count + (_SEARCH_READINGS - 1) * case.searched for case in everything})
        for case in everything:  # what cannot work fails before anything slow
            if not case.searched:
                make_selection(self.pair, case)
        known: dict[str, dict[float, float]] = {}
        self._clock.begin(full_case)
        full = self.measure(full_case)
        rows = [(full_case, make_row(full_case, full, full, self._context))]
        for case in everything[1:]:
            self._clock.begin(case)
            resolved = self._resolve(case, known.setdefault(case.line, {})) if case.searched else case
            rows.append((resolved, make_row(resolved, self.measure(resolved), full, self._context)))
        return rows

    @property
    def _context(self) -> int:
        return len(self.batches[0][0])

    def measure(self, case: Case) -> Measured:
        """One method over all documents."""
        return Measured.join([self._part(case, index) for index in range(len(self.batches))])

    def _resolve(self, case: Case, known: dict[float, float]) -> Case:
        """The case with the p that meets its saving, found on the first batch of documents."""

        def saving(left_out: float) -> float:
            return float(Measured.join([self._part(_leaving_out(case, left_out), 0)]).saved.mean())

        assert case.saving is not None
        return _leaving_out(case, find_left_out(saving, case.saving, known))

    def _part(self, case: Case, index: int) -> dict[str, Any]:
        """One method over one batch of documents."""
        name, header = f"{case.key}-{index:03d}", case.describe()
        found = self.store.load(name, header)
        if found is not None:
            self._clock.tick(case, found, measured=False)
            return found
        if case.method == FULL:
            values = _values(self._read_full(index))
        else:
            if index not in self._references:
                self._read_full(index)
            values = _values(self._read(make_selection(self.pair, case), index, self._references[index]))
        values = self.store.save(name, header, values)
        self._clock.tick(case, values, measured=True)
        return values

    def _read_full(self, index: int) -> Reading:
        """The dense reading, whose hidden states are kept."""
        reading = self._read(None, index, None)
        self._references[index] = np.asarray(jax.device_get(reading.hidden))
        return reading

    def _read(
        self, selection: Selection | None, index: int, reference: Float[np.ndarray, "windows B W D"] | None
    ) -> Reading:
        """One batch, with a draft that sees as far back as it does where people generate."""
        return read_documents(
            self.pair.target,
            self.pair.need_draft(),
            selection,
            self.batches[index],
            reference=None if reference is None else jnp.asarray(reference),
            prefill_share=self.settings.prefill,
            window=self.settings.window,
            measure_mass=True,
            draft_reach=DRAFT_REACH,
        )


def _leaving_out(case: Case, left_out: float) -> Case:
    """The case with the p that leaves a mass out, rounded so that it reads well."""
    return case.with_p(round(1.0 - left_out, 10))


def _values(reading: Reading) -> dict[str, Any]:
    """What is kept of a reading, as JSON."""
    size = len(reading.nll)
    return {
        "tokens": reading.tokens,
        "nll": reading.nll.tolist(),
        "kl": [0.0] * size if reading.kl is None else reading.kl.tolist(),
        "top1": [1.0] * size if reading.top1 is None else reading.top1.tolist(),
        "head_read": reading.head_read.tolist(),
        "mass": np.ones(reading.read.shape).tolist() if reading.mass is None else reading.mass.tolist(),
    }


class _Estimate:
    """Tells how far an evaluation is, what the case at hand gave so far, and how long the rest will take."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._weights: dict[Case, int] = {}
        self._finished, self._current, self._weight = 0, 0, 0
        self._seconds: list[float] = []
        self._last = time.perf_counter()

    def expect(self, weights: dict[Case, int]) -> None:
        """The readings that each case will probably take."""
        self._weights = weights

    def begin(self, case: Case) -> None:
        """Another case is at hand."""
        self._finished += self._weight
        self._current, self._weight = 0, self._weights[case]
        self._tell(case, "")

    def tick(self, case: Case, values: dict[str, Any], measured: bool) -> None:
        """A batch of documents was read, or found read."""
        now = time.perf_counter()
        if measured:
            self._seconds.append(now - self._last)
        self._last = now
        self._current = min(self._current + 1, max(self._weight - 1, 0))
        kl = f", KL {np.mean(values['kl']):.4f}" if case.method != FULL else ""
        saved = 1.0 - np.mean(values["head_read"])
        result = f"perplexity {np.exp(np.mean(values['nll'])):.2f}{kl}, {saved:.1%} saved{self._left()}"
        self._tell(case, result if measured else "")

    def _left(self) -> str:
        """How long the rest will take, judging by what was measured so far."""
        if not self._seconds:
            return ""
        rest = sum(self._weights.values()) - self._finished - self._current
        minutes = rest * sum(self._seconds) / len(self._seconds) / 60
        return f"; about {minutes:.0f} min left" if minutes >= 1 else "; less than a minute left"

    def _tell(self, case: Case, result: str) -> None:
        if self._progress is not None:
            self._progress(self._finished + self._current, sum(self._weights.values()), case.label, result)


def write_tables(out: Path, rows: Sequence[Row], about: str) -> None:
    """Writes `table.json` and `table.md`.

    Raises:
        UserError: they cannot be written.
    """
    data = json.dumps(rows, indent=1, allow_nan=False) + "\n"
    for name, text in {TABLE: data, MARKDOWN: markdown(rows, about)}.items():
        with atomic_file(out / name) as work:
            work.write_text(text, encoding="utf-8")
