"""All tasks with all methods, cell by cell: what is finished is kept, so the same command goes on where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from specattn_jax.errors import UserError
from specattn_jax.evaluation.forced import read_documents
from specattn_jax.evaluation.methods import FULL, METHODS, Case, fit_case, list_cases, make_selection
from specattn_jax.evaluation.search import find_left_out
from specattn_jax.evaluation.store import Store, identify
from specattn_jax.evaluation.tasks.answering import LOSSLESS, LOSSLESS_MODES, Answering, Answers, Asked
from specattn_jax.evaluation.tasks.own import OWN_TASKS, Sample, make_samples
from specattn_jax.loading.pair import ModelPair
from specattn_jax.runtime.session import DRAFT_REACH

# Those of the harness' tasks that are made without the internet.
RULER = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
TASKS = (*RULER, *OWN_TASKS)
_EXTRA = ("lm_eval", "wonderwords", "nltk", "scipy")
# Told the cells done and all of them, the cell at hand, and what was just measured (or nothing).
Progress = Callable[[int, int, str, str], None]
# Of the texts that p is searched on: documents, and the share that is prefilled, or the tokens that are not.
_SEARCH_DOCUMENTS, _SEARCH_PREFILL, _SEARCH_TOKENS = 2, 0.9, 512


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """How tasks are run.

    Attributes:
        samples: questions of each task and length.
        window: W, of all methods that draft.
        batch: questions at a time.
        chat: whether questions are messages in the model's chat format.
        draft_reach: how many tokens back the draft sees while it reads the prompt; None is everything.
    """

    samples: int = 50
    window: int = 5
    batch: int = 1
    chat: bool = False
    draft_reach: int | None = DRAFT_REACH.recent

    def __post_init__(self) -> None:
        for name in ("samples", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected at least 1.")


def check_tasks(names: Sequence[str]) -> None:
    """Refuses tasks that there are not, and RULER's without the packages that make them.

    Raises:
        UserError: says what to do.
    """
    for name in names:
        if name not in TASKS:
            raise UserError(f"tasks names {name!r}; expected some of {', '.join(TASKS)}.")
    missing = [package for package in _EXTRA if importlib.util.find_spec(package) is None]
    if missing and set(names) & set(RULER):
        raise UserError(
            f"tasks names some of RULER's, but {', '.join(missing)} is not installed; run "
            "`pip install 'specattn-jax[eval]'`, or choose tasks of our own: " + ", ".join(OWN_TASKS) + "."
        )


def list_task_cases(
    methods: Sequence[str], policies: Sequence[str], *, savings: Sequence[float] = (), masses: Sequence[float] = ()
) -> list[Case]:
    """The methods with their settings, full attention first: those of `specattn perplexity`, and lossless modes.

    Raises:
        UserError: a method or policy is unknown, or a number is out of range.
    """
    for method in methods:
        if method not in (*METHODS, *LOSSLESS_MODES):
            raise UserError(f"methods names {method!r}; expected some of {', '.join((*METHODS, *LOSSLESS_MODES))}.")
    sparse = [method for method in methods if method not in LOSSLESS]
    cases = list_cases(sparse, policies, savings=savings, masses=masses) if sparse else []
    return [Case(FULL), *(Case(mode) for mode in LOSSLESS_MODES if mode in methods), *cases]


def open_task_store(out: Path, pair: ModelPair, settings: TaskSettings) -> Store:
    """The folder for all that depends on these models and settings; tasks, lengths and methods may be added later.

    Raises:
        UserError: it belongs to something else.
    """
    configuration = {**identify(pair), **dataclasses.asdict(settings)}
    reach = configuration.pop("draft_reach")
    # Folders from before it could be chosen do not name it.
    named = {} if reach == DRAFT_REACH.recent else {"draft_reach": reach or "all"}
    return Store(out, {**configuration, **named})


class TaskRun:
    """Runs one task with one method after the other; what was run before comes from the store."""

    def __init__(
        self,
        pair: ModelPair,
        settings: TaskSettings,
        store: Store,
        progress: Progress | None = None,
        *,
        slots: int = 0,
    ) -> None:
        """Runs nothing yet.

        Args:
            pair: the models.
            settings: how tasks are run.
            store: from `open_task_store`.
            progress: told about every cell.
            slots: room in the caches for so many tokens, if that is more than a length: lengths that have the same room
                share their programs.
        """
        self.pair, self.settings, self.store, self._slots = pair, settings, store, slots
        self._progress = progress
        self._done, self._all = 0, 0

    def run(self, tasks: Sequence[str], lengths: Sequence[int], cases: Sequence[Case]) -> list[dict[str, Any]]:
        """One row per task, length and method.

        Args:
            tasks: some of `TASKS`.
            lengths: most tokens of a prompt and its answer.
            cases: from `list_task_cases`. Those that want a saving and have no means to meet it get the p that saves it
                on prompts of our own at the same length.

        Raises:
            UserError: a task or method cannot be had, a length does not fit the models, or results cannot be written.
        """
        check_tasks(tasks)
        context = min(model.config.max_context for model in (self.pair.target, self.pair.need_draft()))
        for length in lengths:
            if not 1 < length <= context:
                raise UserError(f"lengths names {length}; expected 2 to {context}, the context of both models.")
        for case in cases:  # what cannot work fails before anything slow
            if case.method not in LOSSLESS and not case.searched:
                make_selection(self.pair, case)
        self._done, self._all = 0, len(tasks) * len(lengths) * len(cases)
        rows = []
        for length in lengths:
            known: dict[str, dict[float, float]] = {}
            how = {"context": length, "batch": self.settings.batch, "window": self.settings.window}
            fitted = [fit_case(self.pair, case, **how) for case in cases]
            resolved = [self._resolve(case, length, known.setdefault(case.line, {})) for case in fitted]
            for task in tasks:
                rows += self._task(task, length, resolved)
        return rows

    def _task(self, task: str, length: int, cases: Sequence[Case]) -> list[dict[str, Any]]:
        """One task with every method; its samples are made only if a method was not run yet.

        All methods that were not are asked together, so that prompts are read once.
        """
        kept = {case: self.store.load(_cell(task, length, case), case.describe()) for case in cases}
        missing = [case for case in cases if kept[case] is None]

        def progress(done: int, asked: int) -> None:
            self._tell(f"{task}, {length} tokens, {done} of {asked} questions", "")

        settings = self.settings
        answering = Answering(
            self.pair,
            missing,
            window=settings.window,
            batch=settings.batch,
            slots=max(length, self._slots),
            draft_reach=settings.draft_reach,
            progress=progress,
        )
        make = _Ruler if task in RULER else _Own
        source = None
        rows = []
        for case in cases:
            values = kept[case]
            self._tell(f"{task}, {length} tokens, {case.label}", "")
            measured = values is None
            if values is None:
                source = source or make(task, length, self.pair, settings, answering)
                values = self.store.save(_cell(task, length, case), case.describe(), source.measure(case))
            self._done += 1
            row = _row(task, length, case, values, settings.draft_reach)
            rows.append(row)
            result = f"score {row['score']:.3f}, {row['kv_reduction']:.1%} saved, {row['windows']:.1f} windows"
            self._tell(f"{task}, {length} tokens, {case.label}", result if measured else "")
        return rows

    def _resolve(self, case: Case, length: int, known: dict[float, float]) -> Case:
        """The case with the p that meets its saving on prompts of this length."""
        if not case.searched:
            return case
        assert case.saving is not None
        name, header = f"p-{length}-{case.key}", case.describe()
        found = self.store.load(name, header)
        if found is None:
            samples = make_samples("book_needles_all", length, _SEARCH_DOCUMENTS, self.pair.tokenizer)
            tokens = [self.pair.tokenizer.encode(sample.prompt) for sample in samples]
            shortest = min(map(len, tokens))
            documents = [row[-shortest:] for row in tokens]
            prefill_share = max(_SEARCH_PREFILL, 1.0 - _SEARCH_TOKENS / shortest)

            def saving(left_out: float) -> float:
                selection = make_selection(self.pair, case.with_p(round(1.0 - left_out, 10)))
                reading = read_documents(
                    self.pair.target, self.pair.need_draft(), selection, documents,
                    prefill_share=prefill_share, window=self.settings.window,
                )  # fmt: skip
                return reading.kv_reduction

            self._tell(f"p of {case.label} at {length} tokens", "")
            left_out = find_left_out(saving, case.saving, known)
            found = self.store.save(name, header, {"p": round(1.0 - left_out, 10)})
        return case.with_p(float(found["p"]))

    def _tell(self, cell: str, result: str) -> None:
        if self._progress is not None:
            self._progress(self._done, self._all, cell, result)


def _cell(task: str, length: int, case: Case) -> str:
    """Name of the file with a cell's results."""
    return f"{task}-{length}-{case.key}"


class _Own:
    """A task of our own with its samples."""

    def __init__(self, name: str, length: int, pair: ModelPair, settings: TaskSettings, answering: Answering) -> None:
        self._task, self._pair, self._settings, self._answering = OWN_TASKS[name], pair, settings, answering
        self._samples = make_samples(name, length, settings.samples, pair.tokenizer)

    def measure(self, case: Case) -> dict[str, Any]:
        """Answers all questions."""
        prompts = [self._prompt(sample) for sample in self._samples]
        asked = [
            Asked(tuple(self._pair.tokenizer.encode(prompt)), sample.limit, sample.stop)
            for prompt, sample in zip(prompts, self._samples, strict=True)
        ]
        answers = self._answering(case, asked)
        texts = [result.text for result in answers.results]
        scores = [self._task.score(sample, text) for sample, text in zip(self._samples, texts, strict=True)]
        names = list(scores[0])
        others = {name: [score[name] for score in scores] for name in names[1:]}
        return _values([score[names[0]] for score in scores], answers, prompts, texts, others)

    def _prompt(self, sample: Sample) -> str:
        """The question, in the chat format where that is wanted."""
        if not self._settings.chat:
            return sample.prompt
        return self._pair.tokenizer.apply_chat([{"role": "user", "content": sample.prompt}])


class _Ruler:
    """A task of the harness with its samples."""

    def __init__(self, name: str, length: int, pair: ModelPair, settings: TaskSettings, answering: Answering) -> None:
        from specattn_jax.evaluation.tasks.ruler import load_task

        self._name, self._length, self._pair, self._settings = name, length, pair, settings
        self._answering, self._task = answering, load_task(name, length, pair.tokenizer, settings.samples)

    def measure(self, case: Case) -> dict[str, Any]:
        """Lets the harness ask, and score what was answered."""
        from specattn_jax.evaluation.tasks.harness import SpecAttnLM
        from specattn_jax.evaluation.tasks.ruler import run_task

        settings = self._settings
        model = SpecAttnLM(self._pair, case, window=settings.window, answering=self._answering)
        scored = run_task(model, self._name, self._task, self._length, settings.samples, settings.chat)
        assert model.answers is not None
        return _values(scored.scores, model.answers, scored.prompts, scored.texts, {})


def _values(
    scores: Sequence[float],
    answers: Answers,
    prompts: Sequence[str],
    texts: Sequence[str],
    others: dict[str, list[float]],
) -> dict[str, Any]:
    """What is kept of a cell, as JSON."""
    results = answers.results
    return {
        "scores": list(scores),
        "others": others,
        "texts": list(texts),
        "prompts": hashlib.sha256("\0".join(prompts).encode()).hexdigest()[:16],
        "prompt_tokens": [one.prompt_tokens for one in results],
        "new_tokens": [len(one.tokens) for one in results],
        "windows": [one.windows for one in results],
        "kv_reduction": [one.kv_reduction for one in results],
        "accepted_per_window": [one.accepted_per_window for one in results],
        "requests_per_minute": answers.requests_per_minute,
        "device": jax.devices()[0].device_kind,
    }


def _row(task: str, length: int, case: Case, values: dict[str, Any], draft_reach: int | None) -> dict[str, Any]:
    """A row of the table: means over the samples, and the standard error of the score."""
    scores = np.asarray(values["scores"], np.float64)
    reach = None if case.method == FULL else draft_reach or "all"
    means = ("prompt_tokens", "new_tokens", "windows", "kv_reduction", "accepted_per_window")
    return {
        "task": task,
        "length": length,
        "method": case.method,
        "policy": case.policy,
        "alignment": case.alignment,
        "draft_reads": case.draft_reads,
        "draft_reach": reach,
        "line": case.line if reach in (None, DRAFT_REACH.recent) else f"{case.line}, reach {reach}",
        "wanted_kv_reduction": case.saving,
        "p": case.p,
        "score": float(scores.mean()),
        "score_se": float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else None,
        "samples": len(scores),
        **{name: float(np.mean(values[name])) for name in means},
        **{name: float(np.mean(each)) for name, each in values["others"].items()},
        "requests_per_minute": values["requests_per_minute"],
        "prompts": values["prompts"],
        "device": values["device"],
    }
