"""The kernel benchmark runs to its end anywhere, goes on where it stopped, and outlives what fails."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import mistake, run
from hypothesis import given, settings
from hypothesis import strategies as st

from specattn_jax.bench import kernels
from specattn_jax.bench import request as requests
from specattn_jax.bench.decode_cases import LARGER, DecodeCase
from specattn_jax.bench.decode_methods import (
    ALONE,
    AUTO_LOSSLESS,
    AUTOREGRESSIVE,
    HIERARCHY,
    HIERARCHY_OF_TEXT,
    LOOKUP,
    SPARSE_DRAFT,
)
from specattn_jax.bench.imposed import ImposedRate
from specattn_jax.bench.kernel_cases import make_grid
from specattn_jax.bench.kernel_ops import make_work
from specattn_jax.bench.kernels import kernel_benchmark
from specattn_jax.bench.runner import Limits, Point, run_benchmark
from specattn_jax.decoding.sampling import Sampling

PICTURES = ("latency.png", "speedup.png", "selection.png")


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """Folder and report of the tiny grid."""
    out = tmp_path_factory.mktemp("bench")
    result = run("bench", "kernels", "--grid", "tiny", "--out", out, "--json")
    assert result.exit_code == 0
    return out, json.loads(result.stdout)


def test_every_op_is_measured_to_the_end(first_run):
    out, report = first_run
    assert report["complete"]
    assert report["failed"] == 0
    assert report["measured"] == len(report["points"])
    ops = {point["case"]["op"] for point in report["points"]}
    assert ops == {case.op for case in make_grid("tiny")}
    for point in report["points"]:
        assert point["seconds"] > 0
        assert math.isfinite(point["share_of_copy_bandwidth"])
        assert point["relative_error"] is None or point["relative_error"] < 1e-4
        if point["case"]["op"] == "sparse_decode_attention":
            assert set(point["speedup_over"]) >= {"xla", "jax.nn (xla)"}
    for name in PICTURES:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    table = (out / "kernels.md").read_text(encoding="utf-8")
    assert table.count("\n| ") == len(report["points"]) + 2


def test_goes_on_where_it_stopped(first_run, tmp_path, monkeypatch):
    report = json.loads((first_run[0] / "kernels.json").read_text(encoding="utf-8"))
    kept = report["points"][:-1]
    times = [point["seconds"] for point in kept]
    (tmp_path / "kernels.json").write_text(json.dumps({**report, "points": kept}), encoding="utf-8")
    unfinished = run_benchmark(tmp_path, kernel_benchmark("tiny"), Limits(minutes=0))
    assert not unfinished["complete"]
    assert [point["seconds"] for point in unfinished["points"]] == times

    def fail(*_):
        raise MemoryError("no room | none")

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "time_calls", fail)
        finished = run_benchmark(tmp_path, kernel_benchmark("tiny"))
    assert finished["complete"]
    assert [point["seconds"] for point in finished["points"][:-1]] == times
    assert finished["points"][-1]["failure"] == "MemoryError: no room | none"
    assert "| failed | MemoryError: no room / none |" in (tmp_path / "kernels.md").read_text(encoding="utf-8")


def test_results_of_another_device_are_refused(first_run, tmp_path):
    report = json.loads((first_run[0] / "kernels.json").read_text(encoding="utf-8"))
    (tmp_path / "kernels.json").write_text(json.dumps({**report, "device": "abacus"}), encoding="utf-8")
    assert "abacus" in mistake("bench", "kernels", "--grid", "tiny", "--out", tmp_path)


def test_bad_options(tmp_path):
    assert "--grid is 'huge'" in mistake("bench", "kernels", "--grid", "huge", "--out", tmp_path)
    assert "--minutes is 0" in mistake("bench", "kernels", "--minutes", 0, "--out", tmp_path)


@pytest.mark.parametrize("grid", ["small", "full"])
def test_grids_hold_each_case_once_and_every_case_has_rivals(grid):
    cases = make_grid(grid)
    assert len(set(cases)) == len(cases)
    for case in cases:
        work = make_work(case)
        assert "xla" in work.contenders
        assert work.nbytes > 0


@pytest.mark.slow
def test_requests_are_measured_to_the_end(tmp_path):
    report = json.loads(run("bench", "request", "--grid", "tiny", "--out", tmp_path, "--json").stdout)
    assert (report["complete"], report["failed"]) == (True, 0)
    for point in report["points"]:
        assert point["request_seconds"] == pytest.approx(point["prefill_seconds"] + point["decode_seconds_median"])
    alone, _, sparse = report["points"][:3]
    # Imposed: of five drafted tokens four and three are accepted in turns.
    assert (alone["windows"], sparse["windows"]) == (39, 9)
    assert 0 < sparse["density"] < 1 == alone["density"]
    assert all(one["of_best"] > 0 for one in report["auto"])
    assert (tmp_path / "request.png").read_bytes().startswith(b"\x89PNG")
    assert "### Prefill of the target" in (tmp_path / "request.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_lossless_modes_decode_at_the_acceptance_of_a_real_pair():
    case = DecodeCase("tiny", "tiny-draft", 2, 190, room=40, dtype="float32", rates=LARGER)
    bench, points = requests._Bench(once=True), []
    for name in (AUTOREGRESSIVE, LOOKUP, ALONE, HIERARCHY_OF_TEXT, SPARSE_DRAFT, HIERARCHY, AUTO_LOSSLESS):
        found = bench.measure(Point(case, name, case.title), ())
        points.append({"case": dataclasses.asdict(case), "method": name, "failure": None, **found})
    by_name = {point["method"]: point for point in points}
    assert by_name[AUTOREGRESSIVE]["windows"] == 39
    # What imposed rates give differs by luck, and a hierarchy proposes more than a window.
    assert 0 < by_name[LOOKUP]["accepted_per_window"] < by_name[ALONE]["accepted_per_window"] <= 5
    assert by_name[HIERARCHY]["accepted_per_window"] > 5
    report = {"points": points}
    requests._conclude(report)
    assert [one["chosen"] for one in report["auto"]] == [AUTO_LOSSLESS]
    assert report["auto"][0]["reason"] == by_name[AUTO_LOSSLESS]["reason"]


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rate=st.floats(0, 1), count=st.integers(0, 6))
def test_imposed_rates(seed, rate, count):
    batch, window, vocab = 400, 6, 5
    keys = jax.random.split(jax.random.key(seed), batch)
    drafted, logits = jnp.zeros((batch, window), jnp.int32), jnp.zeros((batch, window + 1, vocab))
    judge, before = ImposedRate(rate), jnp.zeros((batch,), jnp.int32)
    kept = judge(keys, drafted, None, logits, Sampling(), before).accepted
    wanted = sum(rate**place for place in range(1, window + 1))
    assert float(kept.mean()) == pytest.approx(wanted, abs=5 * window / 2 / math.sqrt(batch))
    most = jnp.full((batch,), count)
    np.testing.assert_array_equal(
        judge(keys, drafted, None, logits, Sampling(), before, most).accepted, np.minimum(kept, count)
    )
