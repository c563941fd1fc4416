"""A whole evaluation in one folder: the table, its pictures, and where the numbers come from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specattn_jax.errors import UserError
from specattn_jax.evaluation.drift import drift_row, measure_drift
from specattn_jax.evaluation.methods import FULL, SPECATTN, VEGAS, Case, make_selection
from specattn_jax.evaluation.perplexity import Evaluation, EvaluationSettings, Progress, open_store, write_tables
from specattn_jax.evaluation.pictures import drift_curves, pareto, selection_picture, slots_read
from specattn_jax.evaluation.store import SETTINGS, Store
from specattn_jax.evaluation.tables import Row, of_kind
from specattn_jax.files import atomic_file, exists
from specattn_jax.loading.pair import ModelPair
from specattn_jax.reporting.plots import mixture_heatmap, short_name
from specattn_jax.reporting.provenance import commit, hardware, versions

RUN, PARETO, ALIGNMENT, SELECTION = "run.json", "pareto.png", "alignment.png", "selection.png"
DRIFT, DRIFT_PICTURE = "drift.json", "drift.png"
# A line of the drift plot is not worth much without a text that is longer than what is generated.
_LEAST_PROMPT = 0.25


def evaluate_into(
    out: Path,
    pair: ModelPair,
    documents: Sequence[Sequence[int]],
    cases: Sequence[Case],
    settings: EvaluationSettings,
    *,
    names: Mapping[str, str],
    command: Mapping[str, Any],
    drift_tokens: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluates a pair, or goes on with an interrupted evaluation, and writes all results.

    Args:
        out: new, empty, or of an evaluation of the same models, documents and settings. Methods may be added to one
            that is finished: the table is of the cases asked for.
        pair: the models.
        documents: token ids, all of one length.
        cases: rows of the table besides full attention, from `methods.list_cases`.
        settings: how documents are read.
        names: of `target`, `draft` and `texts`, for titles.
        command: what was asked for, as JSON, noted in `run.json`.
        drift_tokens: tokens to generate freely after the beginning of each document; 0 measures no drift.
        seed: of those draws.
        progress: told about every reading.

    Returns:
        `rows` of the table and `drift`, lines of the drift plot (empty without).

    Raises:
        UserError: `out` belongs to something else or cannot be written, the documents do not fit the models, the pair
            has no alignment or one that does not fit.
    """
    context = len(documents[0])
    if drift_tokens and not 2 <= drift_tokens <= (1 - _LEAST_PROMPT) * context:
        raise UserError(
            f"drift_tokens is {drift_tokens}; expected 2 to {int((1 - _LEAST_PROMPT) * context)}, so that a quarter of "
            f"the context of {context} is left for the prompt, or 0 for none."
        )
    store = open_store(out, pair, documents, settings)
    run = Evaluation(pair, documents, settings, store, progress)
    results = run.run(cases)
    rows = [row for _, row in results]
    about = (
        f"{names['target']}, drafted by {names['draft']}, on {len(documents)} documents of {context} tokens "
        f"({names['texts']}), {_how_read(settings)}"
    )
    write_tables(out, rows, about)
    shares = {case.label: case.draft_reads for case, _ in results if case.draft_reads is not None}
    about_run = {"command": command, "versions": versions(), "commit": commit(), "hardware": hardware()}
    _write(out / RUN, {**about_run, "draft_reads": shares})
    _draw(out, pair, documents, results, store, names, settings.window)
    drift: list[dict[str, Any]] = []
    if drift_tokens:
        selected = [(case, row) for case, row in results if case.method == SPECATTN]
        drift = _measure_drift(run, selected, drift_tokens, seed, progress)
        _write(out / DRIFT, drift)
        if drift:
            _write(out / DRIFT_PICTURE, drift_curves(drift))
    return {"rows": rows, "drift": drift}


def evaluate_kinds_into(
    out: Path,
    pair: ModelPair,
    documents: Mapping[str, Sequence[Sequence[int]]],
    cases: Sequence[Case],
    settings: EvaluationSettings,
    *,
    names: Mapping[str, str],
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluates every kind of text apart, as `evaluate_into` does, in a folder of its name.

    Every method is steered to the same saving on every kind, so that a row can be compared with the oracle's of its
    kind. The table of all kinds lies in `out`, written anew after each.

    Args:
        out: new, empty, or of such an evaluation.
        pair: the models.
        documents: token ids by kind, all of one length.
        cases: as for `evaluate_into`.
        settings: how documents are read.
        names: of `target` and `draft`.
        progress: told about every reading.
        options: further ones of `evaluate_into`.

    Returns:
        `rows` and `drift`, as `evaluate_into` does; each has its `kind`.

    Raises:
        UserError: as `evaluate_into`.
    """
    if exists(out / SETTINGS):
        raise UserError(f"out: {out} holds an evaluation of texts without kinds; choose another folder.")
    rows: list[Row] = []
    drift: list[dict[str, Any]] = []
    for number, (kind, texts) in enumerate(documents.items()):

        def tell(done: int, total: int, case: str, result: str, number: int = number, kind: str = kind) -> None:
            if progress is not None:
                progress(number * total + done, len(documents) * total, f"{kind}, {case}", result)

        named = {**names, "texts": kind}
        found = evaluate_into(out / kind, pair, texts, cases, settings, names=named, progress=tell, **options)
        rows += of_kind(kind, found["rows"])
        drift += [{"kind": kind, **line} for line in found["drift"]]
        about = (
            f"{names['target']}, drafted by {names['draft']}: every kind of text apart, each on {len(texts)} documents "
            f"of {len(texts[0])} tokens, {_how_read(settings)}"
        )
        write_tables(out, rows, about)
    return {"rows": rows, "drift": drift}


def _how_read(settings: EvaluationSettings) -> str:
    """The end of what is said of a table."""
    return (
        f"{settings.prefill:.0%} prefilled, the rest read in teacher-forced windows of {settings.window}; ± is one "
        "standard error over documents."
    )


def _write(path: Path, content: bytes | object) -> None:
    """A picture, or something as JSON; complete or not at all."""
    data = content if isinstance(content, bytes) else (json.dumps(content, indent=1) + "\n").encode()
    with atomic_file(path) as work:
        work.write_bytes(data)


def _draw(
    out: Path,
    pair: ModelPair,
    documents: Sequence[Sequence[int]],
    results: Sequence[tuple[Case, Row]],
    store: Store,
    names: Mapping[str, str],
    window: int,
) -> None:
    """The pictures of the table."""
    target, draft = short_name(names["target"]), short_name(names["draft"])
    title = f"{target} drafted by {draft}: {len(documents)} documents of {len(documents[0])} tokens"
    sparse = [case for case, _ in results if case.method != FULL]
    if not sparse:
        return
    _write(out / PARETO, pareto(results, title))
    if pair.alignment is not None:
        layers = pair.need_draft().config.num_layers
        picture = mixture_heatmap(pair.alignment, layers, target=names["target"], draft=names["draft"])
        _write(out / ALIGNMENT, picture)
    # At its first window, of which the picture is, Vegas reads everything.
    shown = sorted((case for case in sparse if case.method != VEGAS), key=lambda case: case.method != SPECATTN)
    if not shown:
        return
    case = shown[0]
    mask = _load_mask(pair, documents[len(documents) // 2], case, store, window)
    saved = 1 - mask.mean()
    title = f"What one window in the middle of a document reads: {case.label} ({saved:.1%} here)"
    _write(out / SELECTION, selection_picture(mask, title))


def _load_mask(pair: ModelPair, document: Sequence[int], case: Case, store: Store, window: int) -> np.ndarray:
    """What a case reads in one window `[L, K, past]`; measured once."""
    name, header = f"mask-{case.key}", case.describe()
    found = store.load(name, header)
    if found is None:
        selection = make_selection(pair, case)
        assert selection is not None
        mask = slots_read(pair, selection, document, window)
        packed = np.packbits(mask, axis=-1).tolist()
        found = store.save(name, header, {"past": mask.shape[-1], "packed": packed})
    return np.unpackbits(np.asarray(found["packed"], np.uint8), axis=-1, count=found["past"]).astype(bool)


def _measure_drift(
    run: Evaluation, results: Sequence[tuple[Case, Row]], tokens: int, seed: int, progress: Progress | None
) -> list[dict[str, Any]]:
    """One line of the drift plot per case."""
    context = len(run.batches[0][0])
    lines = []
    for number, (case, row) in enumerate(results):
        parts = []
        for index, batch in enumerate(run.batches):
            if progress is not None:
                done, total = number * len(run.batches) + index, len(results) * len(run.batches)
                progress(done, total, f"drift of {case.label}", "")
            name = f"drift-{case.key}-{tokens}-{seed}-{index:03d}"
            found = run.store.load(name, case.describe())
            if found is None:
                prompts = [document[: context - tokens] for document in batch]
                drift = measure_drift(
                    run.pair, make_selection(run.pair, case), prompts, tokens, window=run.settings.window, seed=seed
                )
                found = run.store.save(name, case.describe(), drift.to_json())
            parts.append(found)
        label = {"label": case.label, **dataclasses.asdict(case), "wanted_kv_reduction": row["wanted_kv_reduction"]}
        lines.append(drift_row(label, parts, context - tokens))
    return lines
