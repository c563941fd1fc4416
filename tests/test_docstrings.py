"""The examples in docstrings run as they stand."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = (
    "notebook.compare", "notebook.devices", "reporting.display", "notebook.sweep", "examples", "runtime.generate",
    "loading.pair", "runtime.results",
)  # fmt: skip


def examples(name: str) -> list[doctest.DocTest]:
    module = importlib.import_module(f"specattn_jax.{name}")
    return [test for test in doctest.DocTestFinder().find(module) if test.examples]


CASES = {test.name: test for name in MODULES for test in examples(name)}


# They compile several modes each, or decode with the embedded pair.
_SLOW = (
    "specattn_jax.notebook.sweep.sweep",
    "specattn_jax.notebook.compare.compare",
    "specattn_jax.runtime.results.Generation.plot_selection",
    "specattn_jax.loading.pair.load_pair",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in _SLOW else name for name in CASES]
)
def test_example(name, request):
    case = CASES[name]
    if any('"smollm2"' in example.source for example in case.examples):
        request.getfixturevalue("smollm2_files")
    report: list[str] = []
    result = doctest.DocTestRunner().run(case, out=report.append)
    assert result.failed == 0, "".join(report)


def test_what_users_call_first_has_an_example():
    wanted = {
        "notebook.compare.compare",
        "notebook.sweep.sweep",
        "runtime.results.Generation.plot_selection",
        "runtime.results.Generation.stats",
        "runtime.generate.generate",
        "loading.pair.ModelPair.calibrate",
        "loading.pair.load_pair",
    }
    assert {f"specattn_jax.{name}" for name in wanted} <= set(CASES)
