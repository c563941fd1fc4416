"""What the program gave before its parts were put in order, it gives still: see tests/recorded/record.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from recorded import record

RECORDED = json.loads((Path(record.__file__).parent / "tokens.json").read_text(encoding="utf-8"))


def measures(*groups: Callable[[], Iterator[tuple[str, Callable[[], Any]]]]) -> dict[str, Callable[[], Any]]:
    """What is recorded of these groups, with how it is measured."""
    return {name: measure for group in groups for name, measure in group() if name in RECORDED}


TINY = measures(record.tiny_tokens, record.tiny_single)
CALIBRATION = measures(record.calibration)
EMBEDDED = measures(record.embedded_tokens)
# Each compiles programs of its own; the others are run when decoding or calibration are touched.
QUICK = {"tiny/specattn/greedy", "tiny/specattn, paper/top"}


def test_everything_that_is_recorded_is_measured():
    assert {*TINY, *CALIBRATION, *EMBEDDED} == set(RECORDED)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TINY]
)
def test_tokens_of_the_tiny_pair(name):
    assert TINY[name]() == RECORDED[name]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CALIBRATION]
)
def test_calibration(name):
    found, expected = CALIBRATION[name](), RECORDED[name]
    assert found.keys() == expected.keys()
    for part, value in expected.items():
        if not isinstance(value, dict):
            assert found[part] == value
            continue
        assert found[part]["shape"] == value["shape"]
        for number in ("sum", "norm"):
            assert found[part][number] == pytest.approx(value[number], rel=1e-4)


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.parametrize("name", EMBEDDED)
def test_tokens_of_the_embedded_pair(smollm2_files, name):
    assert EMBEDDED[name]() == RECORDED[name]
