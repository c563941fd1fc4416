"""Measures what each ingredient of a selection is worth: the ablation table, all rows at equal savings.

Known text from held-out books is read in teacher-forced windows (`evaluation/forced.py`); every row is steered to read
the same share of the cache. Each row is written when it is there, so the same command goes on after a kill.

    python scripts/ablate_selection.py --out DIR                              all rows, minutes each on two cores
    python scripts/ablate_selection.py --out DIR --together 40 --jobs 8       an accelerator: many rows in one batch
    python scripts/ablate_selection.py --out DIR --rows default "oracle, budgets" --savings 0.9
    python scripts/ablate_selection.py --out DIR --pair qwen2.5-coder --dtype bfloat16 --text kinds/train --passages 80
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from specattn_jax.calibration.passages import CalibrationSettings, usual_passages
from specattn_jax.errors import UserError
from specattn_jax.evaluation.ablations import Ablation, Ingredients, head_weights, map_weights
from specattn_jax.evaluation.baselines import Quest, Streaming
from specattn_jax.evaluation.documents import cut_documents
from specattn_jax.evaluation.forced import Reading, read_documents, read_together
from specattn_jax.files import atomic_file, exists, read_json, write_json
from specattn_jax.loading.pair import ModelPair, load_pair
from specattn_jax.reporting.provenance import commit, hardware, versions
from specattn_jax.selection import make
from specattn_jax.selection.alignment import Alignment, load_alignment
from specattn_jax.selection.policy import load_policy
from specattn_jax.selection.protocol import Selection
from specattn_jax.texts import UNNAMED, find_kinds, name_texts, read_text, shipped_books

# Savings are equal if they differ by less.
TOLERANCE = 0.005
Weights: TypeAlias = Literal["mixture", "one mask a layer", "layer map", "heaviest source"]
Kind: TypeAlias = Literal["ablation", "streaming", "quest", "policy"]


class Row(NamedTuple):
    """One row of the table.

    Attributes:
        kind: which class reads it: `Ablation`, a baseline, or the shipped policy as it is, with its own steering.
        alignment: which alignment (see `ALIGNMENTS`).
        weights: how the draft predicts the target.
        budgets: the fitted masses, or the same in every layer.
        dense_layers: leading layers that read everything.
        draft_reads: of the shipped policy, share of its cache that the draft reads; None is the policy's own.
        ingredients: the rest.
    """

    kind: Kind = "ablation"
    alignment: str = "shipped"
    weights: Weights = "mixture"
    budgets: bool = True
    dense_layers: int = 0
    draft_reads: float | None = None
    ingredients: Ingredients = Ingredients()


PLAIN = Row(budgets=False)
PUBLISHED = Row(
    weights="layer map",
    budgets=False,
    ingredients=Ingredients(union=True, linear=True, num_sink=0, num_recent=0),
)
EXACT = PUBLISHED._replace(ingredients=PUBLISHED.ingredients._replace(linear=False))
# Calibrations beside the shipped one, which has kv-head sources and a budget for each kv head.
ALIGNMENTS: dict[str, CalibrationSettings | None] = {
    "shipped": None,
    "layer sources": CalibrationSettings(granularity="layer"),
    "head sources": CalibrationSettings(granularity="head"),
    "budgets per layer": CalibrationSettings(budgets="layer"),
    "head sources, budgets per layer": CalibrationSettings(granularity="head", budgets="layer"),
}


def _with(base: Row = Row(), **changes: Any) -> Row:  # noqa: B008 - a tuple
    """A row that differs in its ingredients."""
    return base._replace(ingredients=base.ingredients._replace(**changes))


ROWS: dict[str, Row] = {
    "streaming, dl2": Row("streaming", dense_layers=2),
    "streaming, dl0": Row("streaming"),
    "quest, dl2": Row("quest", dense_layers=2),
    "quest, dl0": Row("quest"),
    "published, dl2": PUBLISHED._replace(dense_layers=2),
    "published, dl0": PUBLISHED,
    "published with exact nucleus, dl2": EXACT._replace(dense_layers=2),
    "published with exact nucleus, dl0": EXACT,
    "heaviest draft kv head for each target kv head, union, dl2": EXACT._replace(
        weights="heaviest source", dense_layers=2
    ),
    "mixture, one mask a layer, dl2": PLAIN._replace(weights="one mask a layer", dense_layers=2),
    "mixture per target kv head, dl2": PLAIN._replace(dense_layers=2),
    "mixture per target kv head, dl1": PLAIN._replace(dense_layers=1),
    "mixture per target kv head, dl0": PLAIN,
    "default": Row(),
    "default as shipped": Row("policy"),
    **{f"draft reads {share:.0%}": Row("policy", draft_reads=share) for share in (1.0, 0.5, 0.25, 0.15, 0.1, 0.05)},
    "oracle, dl2": _with(PLAIN, oracle=True)._replace(dense_layers=2),
    "oracle, dl0": _with(PLAIN, oracle=True),
    "oracle, budgets": _with(oracle=True),
    "last verification alone": _with(blend=1.0),
    "last verification blended, 1/4": _with(blend=0.25),
    "last verification's first token blended, 1/4": _with(blend=0.25, blend_tokens=1),
    "last verification blended, 1/2": _with(blend=0.5),
    "last verification blended, 1/2, decayed": _with(blend=0.5, decay=0.9),
    "centroids of 256 unread keys": _with(tail=True),
    **{name: Row(alignment=name) for name in ALIGNMENTS if name != "shipped"},
    "blocks of 4, sum": _with(grain="sum 4"),
    "blocks of 8, sum": _with(grain="sum 8"),
    "blocks of 16, sum": _with(grain="sum 16"),
    "blocks of 16, maximum": _with(grain="max 16"),
    "blocks of 16, token mask inside": _with(grain="inside 16"),
    "mixture of the largest attention, one a window": _with(mix_last=True),
    "first draft step only": _with(steps=1),
    "selection reused for 2 windows": _with(reuse=2),
    "selection reused for 4 windows": _with(reuse=4),
    "dense verification every 16 windows": _with(dense_every=16),
    "dense verification every 32 windows": _with(dense_every=32),
    "dense verification every 64 windows": _with(dense_every=64),
    "no sinks, no recent window": _with(num_sink=0, num_recent=0),
    "head sources, last verification 1/2": _with(Row(alignment="head sources"), blend=0.5),
}


class Task(NamedTuple):
    """One row at one saving."""

    name: str
    saving: float

    @property
    def file(self) -> str:
        """Name of its file."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") + f"_{self.saving:g}.json"


def make_selection(row: Row, saving: float, pair: ModelPair, alignments: dict[str, Alignment]) -> Selection:
    """The selection of a row, for a wanted saving."""
    target, draft = pair.target.config, pair.need_draft().config
    wanted = jnp.asarray(saving, jnp.float32)
    if row.kind == "streaming":
        return Streaming(wanted, target, dense_layers=row.dense_layers)
    if row.kind == "quest":
        return Quest(wanted, target, dense_layers=row.dense_layers)
    alignment = alignments[row.alignment]
    if row.kind == "policy":
        policy = load_policy("default")
        if row.draft_reads is not None:
            policy = policy.with_draft_reads(row.draft_reads)
        return make.make_selection(policy, alignment, alignment.mass_for_saving(saving), target, draft)
    rows = target.num_layers * target.num_kv_heads
    # Steering only needs a start that is about right: that of the saving where reads can be saved.
    sparse = 1.0 - row.dense_layers / target.num_layers
    if row.ingredients.dense_every:
        sparse *= 1.0 - 1.0 / row.ingredients.dense_every
    fitted = alignment.mass_for_saving(min(saving / sparse, float(alignment.savings[-1])))
    flat = jnp.full((rows,), jnp.exp(jnp.mean(jnp.log(fitted.left_out))))
    left_out = jnp.repeat(fitted.left_out, rows // len(fitted.left_out)) if row.budgets else flat
    left_out = jnp.where(jnp.arange(rows) < row.dense_layers * target.num_kv_heads, 0.0, left_out)
    weights = make_weights(row.weights, alignment, pair)
    return Ablation.make(weights, left_out, 1.0 - saving, row.ingredients, target, draft)


def make_weights(kind: Weights, alignment: Alignment, pair: ModelPair) -> Float[Array, "rows R"]:
    """Mixture weights over all heads of the draft."""
    target, draft = pair.target.config, pair.need_draft().config
    if kind == "layer map":
        return map_weights(alignment, target, draft)
    if kind == "heaviest source":
        heaviest = jax.nn.one_hot(jnp.argmax(alignment.weights, axis=1), alignment.weights.shape[1])
        return head_weights(dataclasses.replace(alignment, weights=heaviest), draft)
    weights = head_weights(alignment, draft)
    if kind == "one mask a layer":
        shared = weights.reshape(target.num_layers, target.num_kv_heads, -1).mean(axis=1)
        return jnp.repeat(shared, target.num_kv_heads, axis=0)
    return weights


def find_alignments(
    folder: Path, names: Sequence[str], pair: ModelPair, texts: Mapping[str, Sequence[Path]], passages: int, jobs: int
) -> dict[str, Alignment]:
    """The alignments that the rows need; those that are not in the folder yet are calibrated on the texts."""
    assert pair.alignment is not None
    places = {name: folder / name.replace(",", "").replace(" ", "_") for name in names if ALIGNMENTS[name] is not None}
    missing = [name for name, place in places.items() if not exists(place)]

    def make(name: str) -> None:
        settings = ALIGNMENTS[name]
        assert settings is not None
        pair.calibrate(
            texts,
            out=places[name],
            settings=dataclasses.replace(settings, passages=passages),
            progress=lambda *step: print(name, *step, file=sys.stderr, flush=True),
        )

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(make, missing))
    return {"shipped": pair.alignment, **{name: load_alignment(place) for name, place in places.items()}}


class Chosen(NamedTuple):
    """A task and its selection."""

    task: Task
    selection: Selection


def batches(tasks: Sequence[Chosen], together: int) -> Iterator[list[Chosen]]:
    """Tasks in groups that one compiled function serves, at most `together` each."""
    groups: dict[jax.tree_util.PyTreeDef, list[Chosen]] = {}
    for task in tasks:
        groups.setdefault(jax.tree.structure(task.selection), []).append(task)
    for group in groups.values():
        # Of equal sizes as far as possible, because each size is compiled.
        size = math.ceil(len(group) / math.ceil(len(group) / together))
        for begin in range(0, len(group), size):
            yield group[begin : begin + size]


def result(task: Task, reading: Reading, dense: Reading, seconds: float) -> dict[str, Any]:
    """One row of the table, with each document's numbers."""
    assert reading.kl is not None
    assert reading.top1 is not None
    documents = len(reading.kl)
    return {
        "row": task.name,
        "wanted_saving": task.saving,
        "kv_reduction": reading.kv_reduction,
        "equal_savings": abs(reading.kv_reduction - task.saving) <= TOLERANCE,
        "kl": float(reading.kl.mean()),
        "kl_standard_error": float(reading.kl.std(ddof=1) / math.sqrt(documents)) if documents > 1 else None,
        "top1_fidelity": float(reading.top1.mean()),
        "perplexity": reading.perplexity,
        "relative_increase": reading.perplexity / dense.perplexity - 1,
        "tokens": reading.tokens * documents,
        "documents": {
            "kl": reading.kl.tolist(),
            "top1_fidelity": reading.top1.tolist(),
            "nll": reading.nll.tolist(),
            "kv_reduction": (1 - reading.read.mean(axis=1)).tolist(),
        },
        "seconds": seconds,
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
    }


def table(results: Sequence[dict[str, Any]], savings: Sequence[float]) -> str:
    """Markdown: one line a row, the savings side by side."""
    head = "".join(f" saved | KL at {saving:.0%} | top-1 | perplexity |" for saving in savings)
    lines = [f"| row |{head}", "|---|" + "---|" * 4 * len(savings)]
    by_task = {(one["row"], one["wanted_saving"]): one for one in results}
    for name in ROWS:
        cells = [_cells(by_task.get((name, saving))) for saving in savings]
        if any(cells):
            lines.append(f"| {name} |" + "".join(cell or " | | | |" for cell in cells))
    return "\n".join(lines) + "\n"


def _cells(one: dict[str, Any] | None) -> str:
    """The four cells of one row at one saving; savings that are not the wanted ones are marked."""
    if one is None:
        return ""
    mark = "" if one["equal_savings"] else " (!)"
    error = one["kl_standard_error"]
    spread = "" if error is None else f" ± {error:.4f}"
    return (
        f" {one['kv_reduction']:.1%}{mark} | {one['kl']:.4f}{spread} | {one['top1_fidelity']:.3f} |"
        f" {one['relative_increase']:+.2%} |"
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pair", default="smollm2", help="a preset with an alignment")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--text", nargs="+", help="of other calibrations, kinds as for `specattn calibrate`; the books")
    parser.add_argument("--passages", type=int, help="of other calibrations; as many as is usual")
    parser.add_argument("--rows", nargs="+", metavar="ROW", default=list(ROWS), help="names of rows; all by default")
    parser.add_argument("--savings", type=float, nargs="+", default=[0.75, 0.9])
    parser.add_argument("--alignments", type=Path, help="folder of other calibrations; OUT/alignments by default")
    parser.add_argument("--together", type=int, default=1, help="rows that are read in one batch")
    parser.add_argument("--jobs", type=int, default=1, help="batches and calibrations that are compiled side by side")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--prefill", type=float, default=0.1)
    parser.add_argument("--window", type=int, default=5)
    parser.add_argument("--calibrate-only", action="store_true", help="make the alignments and stop")
    options = parser.parse_args()
    unknown = [name for name in options.rows if name not in ROWS]
    if unknown:
        parser.error(f"--rows: there is no row {unknown[0]!r}; the rows are {'; '.join(ROWS)}")
    return options


def main() -> None:
    """Reads what is missing, then writes the table."""
    options = parse()
    jax.config.update("jax_default_matmul_precision", "highest")
    pair = load_pair(options.pair, dtype=options.dtype)
    needed = list(dict.fromkeys(ROWS[name].alignment for name in options.rows))
    texts = find_kinds(options.text) if options.text else {UNNAMED: shipped_books("train")}
    passages = options.passages or usual_passages(len(texts))
    folder = options.alignments or options.out / "alignments"
    alignments = find_alignments(folder, needed, pair, texts, passages, options.jobs)
    if options.calibrate_only:
        return
    setting = {name: getattr(options, name) for name in ("pair", "dtype", "documents", "context", "prefill", "window")}
    setting |= {"calibrated_on": name_texts(texts), "passages": passages}
    noted = options.out / "setting.json"
    if exists(noted) and read_json(noted) != setting:
        raise SystemExit(f"{options.out}: holds rows of another setting, {read_json(noted)}; choose another folder.")
    with atomic_file(noted) as work:
        write_json(work, setting)

    tasks = [Task(name, saving) for saving in options.savings for name in options.rows]
    rest = [task for task in tasks if not exists(options.out / "rows" / task.file)]
    how = {"prefill_share": options.prefill, "window": options.window}
    novels = [pair.tokenizer.encode(read_text(book)) for book in shipped_books("valid")]
    documents = cut_documents(novels, options.context, options.documents)
    dense = read_documents(pair.target, pair.need_draft(), None, documents, **how)
    reference = dense.hidden
    assert reference is not None

    def read(batch: Sequence[Chosen]) -> None:
        began = time.perf_counter()
        chosen = [one.selection for one in batch]
        models = pair.target, pair.need_draft()
        if len(chosen) == 1:
            readings = [read_documents(*models, chosen[0], documents, reference=reference, **how)]
        else:
            readings = read_together(*models, chosen, documents, reference=reference, **how)
        seconds = (time.perf_counter() - began) / len(batch)
        for (task, _), reading in zip(batch, readings, strict=True):
            one = result(task, reading, dense, seconds)
            with atomic_file(options.out / "rows" / task.file) as work:
                write_json(work, one)
            line = {key: one[key] for key in ("row", "wanted_saving", "kv_reduction", "kl", "top1_fidelity")}
            print(json.dumps(line), f"{seconds:.0f} s", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        chosen = [Chosen(task, make_selection(ROWS[task.name], task.saving, pair, alignments)) for task in rest]
        list(pool.map(read, batches(chosen, options.together)))
    results = [read_json(options.out / "rows" / task.file) for task in tasks]
    report = {
        "command": shlex.join(["python", "scripts/ablate_selection.py", *sys.argv[1:]]),
        "seed": CalibrationSettings().seed,
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
        **setting,
        "books": [book.name for book in shipped_books("valid")],
        "perplexity": dense.perplexity,
        "rows": results,
    }
    with atomic_file(options.out / "ablation.json") as work:
        write_json(work, report)
    with atomic_file(options.out / "ablation.md") as work:
        work.write_text(table(results, options.savings), encoding="utf-8")
    print(table(results, options.savings))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from error
