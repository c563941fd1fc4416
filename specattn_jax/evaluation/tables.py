"""From what was read to the rows of the table, for programs and for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from specattn_jax.evaluation.methods import Case

Row = dict[str, Any]
_HEADER = ("method", "policy", "p", "reads saved", "perplexity", "increase", "KL", "top-1", "captured mass")


@dataclasses.dataclass(frozen=True)
class Measured:
    """One method over all documents, n of them, in float64.

    Attributes:
        tokens: tokens scored per document.
        nll: mean negative log-likelihood per token, in nats.
        kl: mean KL(full || this) of the next-token distributions, in nats.
        top1: how often the likeliest token is the full target's.
        head_read: share of the past that each kv head read.
        mass: share of its attention mass that each layer read.
    """

    tokens: int
    nll: Float[np.ndarray, " n"]
    kl: Float[np.ndarray, " n"]
    top1: Float[np.ndarray, " n"]
    head_read: Float[np.ndarray, "n L K"]
    mass: Float[np.ndarray, "n L"]

    @classmethod
    def join(cls, parts: Sequence[Mapping[str, Any]]) -> Measured:
        """From the parts of `Store`, one per batch of documents."""
        columns = {
            field.name: np.concatenate([np.asarray(part[field.name], np.float64) for part in parts])
            for field in dataclasses.fields(cls)
            if field.name != "tokens"
        }
        return cls(tokens=int(parts[0]["tokens"]), **columns)

    @property
    def saved(self) -> Float[np.ndarray, " n"]:
        """Share of reads saved in each document."""
        return 1.0 - self.head_read.mean(axis=(1, 2))

    @property
    def perplexity(self) -> float:
        """Over all documents."""
        return float(np.exp(self.nll.mean()))


def standard_error(values: Float[np.ndarray, " n"]) -> float | None:
    """Of the mean of independent values; None for a single one."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def _scaled(error: float | None, factor: float) -> float | None:
    return None if error is None else error * factor


def make_row(case: Case, measured: Measured, full: Measured, context: int) -> Row:
    """One row of the table.

    Standard errors are over documents; the one of the relative increase compares document by document, because
    documents differ far more than methods do.

    Args:
        case: the method, with the p that was found for it.
        measured: what it gave.
        full: what full attention gave.
        context: tokens per document.
    """
    increase = measured.perplexity / full.perplexity - 1.0
    return {
        "method": case.method,
        "policy": case.policy,
        "p": case.p,
        "context": context,
        "perplexity": measured.perplexity,
        "relative_increase": increase,
        "kv_reduction": float(measured.saved.mean()),
        "top1_fidelity": float(measured.top1.mean()),
        "kl": float(measured.kl.mean()),
        "tokens": measured.tokens * len(measured.nll),
        "documents": len(measured.nll),
        "wanted_kv_reduction": case.saving,
        "captured_mass": float(measured.mass.mean()),
        "perplexity_se": _scaled(standard_error(measured.nll), measured.perplexity),
        "relative_increase_se": _scaled(standard_error(measured.nll - full.nll), 1.0 + increase),
        "kv_reduction_se": standard_error(measured.saved),
        "top1_fidelity_se": standard_error(measured.top1),
        "kl_se": standard_error(measured.kl),
        "kv_reduction_by_layer": (1.0 - measured.head_read.mean(axis=(0, 2))).tolist(),
        "kv_reduction_by_head": (1.0 - measured.head_read.mean(axis=0)).tolist(),
        "draft_reads": case.draft_reads,
    }


def of_kind(kind: str, rows: Sequence[Row]) -> list[Row]:
    """Rows with the kind of text that they are of, and their KL over the oracle's at the same wanted saving.

    Args:
        kind: its name.
        rows: all rows of that kind.
    """
    oracle = {row["wanted_kv_reduction"]: row["kl"] for row in rows if row["method"] == "oracle"}

    def ratio(row: Row) -> float | None:
        best = oracle.get(row["wanted_kv_reduction"])
        return None if not best or row["method"] == "full" else row["kl"] / best

    return [{**row, "kind": kind, "kl_over_oracle": ratio(row)} for row in rows]


def table_cells(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table for people: its header, and one tuple of texts per row, with standard errors where there are any."""
    header = ("kind", *_HEADER[:-1], "KL / oracle's", _HEADER[-1]) if any("kind" in row for row in rows) else _HEADER
    return header, [_cells(row) for row in rows]


def _cells(row: Row) -> tuple[str, ...]:
    def with_error(name: str, style: str) -> str:
        error = row[f"{name}_se"]
        return format(row[name], style) + ("" if not error else f" ± {format(error, style.removeprefix('+'))}")

    full = row["method"] == "full"
    kind = (row["kind"],) if "kind" in row else ()
    ratio = row.get("kl_over_oracle")
    beside = ("" if ratio is None else f"{ratio:.2f}",) if "kind" in row else ()
    return (
        *kind,
        row["method"],
        row["policy"] or "",
        "" if row["p"] is None else f"{row['p']:.5g}",
        "0 %" if full else with_error("kv_reduction", ".1%"),
        with_error("perplexity", ".3f"),
        "" if full else with_error("relative_increase", "+.2%"),
        "" if full else with_error("kl", ".4f"),
        "" if full else with_error("top1_fidelity", ".1%"),
        *beside,
        "" if full else f"{row['captured_mass']:.1%}",
    )


def short_cells(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The same for a terminal: what matters most, without standard errors."""
    header, cells = table_cells(rows)
    at = header.index("method")
    return (*header[: at + 1], *header[at + 2 : -1]), [
        (*row[:at], f"{row[at]} {row[at + 1]}".strip(), *(cell.split(" ±")[0] for cell in row[at + 2 : -1]))
        for row in cells
    ]


def markdown(rows: Sequence[Row], about: str) -> str:
    """The table in Markdown, under a sentence about it."""
    header, cells = table_cells(rows)
    lines = [about, "", *(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *cells))]
    return "\n".join(lines) + "\n"
