"""RULER's tasks (Hsieh et al. 2024) that need no internet, made and scored by an unmodified lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from specattn_jax.errors import UserError
from specattn_jax.loading.tokenizer import Tokenizer

# The harness' own defaults, so that its own command makes the same samples.
_SEED, _NUMPY_SEED, _FEWSHOT_SEED = 0, 1234, 1234
# Below it, and for tokenizers that know no words, the harness looks for samples that fit for ever: this text, which is
# like its example of a chain of variables, must take no more than so many tokens.
_SHORTEST, _MOST_TOKENS = 1024, 400
# The modules that make samples.
_MAKERS = ("prepare_niah", "vt_utils", "cwe_utils", "fwe_utils")
_LIKE_ITS_EXAMPLE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n" * 5
    + "Memorize and track the chain of variable assignment hidden in the following text. VAR QWE = VAR RTZ " * 3
)


class Scored(NamedTuple):
    """A task's answers.

    Attributes:
        scores: of each sample, from 0 to 1.
        prompts: digestible texts of the samples.
        texts: what was answered.
    """

    scores: list[float]
    prompts: list[str]
    texts: list[str]


@contextlib.contextmanager
def without_download() -> Iterator[None]:
    """Lets RULER's module be imported offline.

    It fetches data for splitting essays into sentences as soon as it is imported. The tasks here have no essays, so an
    empty folder in its place is enough to find.
    """
    import nltk

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizers" / "punkt_tab").mkdir(parents=True)
        nltk.data.path.append(folder)
        try:
            yield
        finally:
            nltk.data.path.remove(folder)


@contextlib.contextmanager
def first_samples(count: int) -> Iterator[None]:
    """Lets RULER's modules make only the first of their 500 samples, which are the same ones: they are drawn in turn.

    Five hundred prompts of 30,000 tokens take minutes. The modules count them by `tqdm`, whatever is asked for.
    """
    modules = [importlib.import_module(f"lm_eval.tasks.ruler.{name}") for name in _MAKERS]
    for module in modules:
        # By this the harness knows a module that is loaded; without it, it would load another one, which counts to 500.
        vars(module)["__mtime__"] = Path(str(module.__file__)).stat().st_mtime_ns

    def counted(numbers: Iterable[int], **_: Any) -> Iterator[int]:
        return itertools.islice(numbers, count)

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "tqdm", counted))
        yield


def load_task(name: str, length: int, tokenizer: Tokenizer, samples: int) -> Any:
    """One task of the harness with its samples, the same ones every time.

    Args:
        name: of the task.
        length: most tokens of a prompt and its answer.
        tokenizer: that measures it.
        samples: how many are made.

    Raises:
        UserError: samples of this length cannot be made.
    """
    if length < _SHORTEST:
        raise UserError(f"lengths names {length}; expected at least {_SHORTEST} for RULER's tasks.")
    if (count := len(tokenizer.encode(_LIKE_ITS_EXAMPLE))) > _MOST_TOKENS:
        raise UserError(
            f"tasks names {name}, but the pair's tokenizer cuts {len(_LIKE_ITS_EXAMPLE)} letters into {count} tokens, "
            f"where RULER's samples are made for {_MOST_TOKENS} at most; choose tasks of our own or another pair."
        )
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(without_download())
        stack.enter_context(contextlib.redirect_stdout(None))
        from lm_eval import tasks

        tokenizer.save(Path(folder))
        # As in a fresh process, whatever was made before: this module draws from a source of chance of its own.
        sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)
        random.seed(_SEED)
        np.random.seed(_NUMPY_SEED)
        stack.enter_context(first_samples(samples))
        manager = tasks.TaskManager(
            # All tasks of the harness would take long to list.
            include_path=Path(tasks.__file__).parent / "ruler",
            include_defaults=False,
            metadata={"max_seq_lengths": [length], "tokenizer": folder},
        )
        task = manager.load([name])["tasks"][name]
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    if not all(task.dataset["test"]["outputs"]):
        raise UserError(f"lengths names {length}, which has no room for a question of {name}; give a larger one.")
    return task


def run_task(model: Any, name: str, task: Any, length: int, samples: int, chat: bool = False) -> Scored:
    """Scores of a task's first samples, by the harness.

    Args:
        model: one of the harness, such as `SpecAttnLM`.
        name: of the task.
        task: from `load_task`.
        length: for which it was loaded.
        samples: how many.
        chat: whether prompts are messages in the model's chat format.
    """
    from lm_eval import evaluate

    found = evaluate(
        model,
        {"tasks": {name: task}, "groups": {}},
        limit=samples,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=chat,
    )
    logged: Sequence[dict[str, Any]] = sorted(found["samples"][name], key=lambda one: one["doc_id"])
    return Scored(
        [float(one[str(length)]) for one in logged],
        [str(one["arguments"][0][0]) for one in logged],
        [str(one["resps"][0][0]) for one in logged],
    )
