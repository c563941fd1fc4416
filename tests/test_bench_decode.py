"""The decode benchmark runs to its end anywhere, goes on where it stopped, and outlives what fails."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from command import mistake, run, run_script

from specattn_jax.bench import decode as bench
from specattn_jax.bench import decode_real
from specattn_jax.bench.decode import decode_benchmark
from specattn_jax.bench.decode_auto import auto_choices
from specattn_jax.bench.decode_cases import DecodeCase, decode_grid, mesh_grid, on_mesh, shape
from specattn_jax.bench.decode_fit import FITTED, fit_profile, fit_terms
from specattn_jax.bench.decode_hlo import loop_facts
from specattn_jax.bench.decode_methods import (
    AUTO,
    AUTOREGRESSIVE,
    CHOICES,
    DENSE_DRAFT,
    REAL_METHODS,
    RIVAL,
    SPECATTN,
    SPECULATIVE,
    ImposedAcceptance,
    methods,
)
from specattn_jax.bench.decode_report import decode_table, describe_links, mesh_table
from specattn_jax.bench.decode_roofline import predict, roofline
from specattn_jax.bench.decode_workload import Workload, bench_strategy
from specattn_jax.bench.runner import Limits, rewrite_report, run_benchmark
from specattn_jax.errors import UserError
from specattn_jax.planning.device import load_profile, window_seconds
from specattn_jax.selection.policy import load_policy

# What `auto` chooses from, and itself.
FEW = (*CHOICES, AUTO)


def measure(out, *options):
    """Folder and report of the tiny grid."""
    result = run("bench", "decode", "--grid", "tiny", "--out", out, "--json", *options)
    assert result.exit_code == 0
    return out, json.loads(result.stdout)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """The tiny grid by few methods."""
    return measure(tmp_path_factory.mktemp("decode"), *(part for name in FEW for part in ("--only", name)))


def check(out, report):
    """What holds whatever is measured; the methods of random weights by name."""
    assert report["complete"]
    assert [point["failure"] for point in report["points"]] == [None] * len(report["points"])
    random = {point["method"]: point for point in report["points"] if point["case"]["accepted"]}
    for point in random.values():
        assert point["tokens_per_second"] > 0
        assert point["loop"]["launches"] > 0
        assert point["memory"]["program"] >= point["memory"]["temporaries"]
        assert (
            point["speedup_over"][SPECULATIVE] == point["tokens_per_second"] / random[SPECULATIVE]["tokens_per_second"]
        )
    assert random[AUTOREGRESSIVE]["density"] == random[SPECULATIVE]["density"] == 1.0
    assert random[SPECATTN]["density"] == pytest.approx(0.12, rel=0.15)
    assert sum(random[SPECATTN]["parts"].values()) == pytest.approx(random[SPECATTN]["window_seconds"])
    for name in ("speed.png", "parts.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    return random


def test_methods_are_measured_to_the_end(first_run):
    assert set(check(*first_run)) == set(CHOICES)


@pytest.mark.slow
def test_every_method_is_measured_to_the_end(tmp_path):
    random = check(*measure(tmp_path))
    assert set(random) == {name for name, method in methods().items() if method.platform is None}
    assert random[RIVAL]["density"] == 1.0
    assert random[DENSE_DRAFT]["density"] == pytest.approx(0.12, rel=0.15)
    assert "cannot be met" in random["specattn paper"]["note"]


def test_the_table_shows_texts_and_peers(first_run):
    out, report = first_run
    real = [point for point in report["points"] if not point["case"]["accepted"]]
    assert all(point["text"] and point["prompt_tokens"] == 240 for point in real)
    assert all(len(point["decode_seconds"]) == point["repeats"] == 2 for point in real)
    peer = {"pair": "llama", "batch": 8, "context": 100, "tokens": 6, "failure": None, "seconds": 0.01}
    broken = {**peer, "failure": "OutOfMemoryError: no | room"}
    peers = {"device": "abacus", "versions": {"transformers": "5", "torch": "2"}, "points": [peer, broken]}
    table = decode_table({**report, "complete": False}, peers)
    assert "| llama | 8 | 100 | 6 | 10.0 | 800.0 |" in table
    assert "| failed | OutOfMemoryError: no / room |" in table
    assert "stopped before its end" in table
    assert "### tiny, real weights" in table
    assert (out / "decode.md").read_text(encoding="utf-8").count("\n| specattn") >= 2


def test_goes_on_where_it_stopped(first_run, tmp_path, monkeypatch):
    report = json.loads((first_run[0] / "decode.json").read_text(encoding="utf-8"))
    kept = report["points"][:-2]
    (tmp_path / "decode.json").write_text(json.dumps({**report, "points": kept}), encoding="utf-8")
    unfinished = run_benchmark(tmp_path, decode_benchmark("tiny"), Limits(0, FEW))
    assert not unfinished["complete"]
    assert [point["tokens_per_second"] for point in unfinished["points"]] == [
        point["tokens_per_second"] for point in kept
    ]

    def fail(*_):
        raise MemoryError("no room | none")

    with monkeypatch.context() as patch:
        patch.setattr(bench, "measure_real", fail)
        finished = run_benchmark(tmp_path, decode_benchmark("tiny"), Limits(only=FEW))
    assert finished["complete"]
    assert [point["failure"] for point in finished["points"][-2:]] == ["MemoryError: no room | none"] * 2
    assert "| failed | MemoryError: no room / none |" in (tmp_path / "decode.md").read_text(encoding="utf-8")


def test_many_tokens_of_a_real_pair_are_read_once_for_all_methods(monkeypatch):
    # That of the tiny grid, whose programs are there.
    case = next(point.case for point in decode_grid("tiny") if point.case.real)
    names = AUTOREGRESSIVE, SPECULATIVE
    alone = decode_real.measure_real(case, AUTOREGRESSIVE, names, 1)
    decode_real._side_by_side.cache_clear()
    monkeypatch.setattr(decode_real, "_READ_ANEW", 0)
    shared = [decode_real.measure_real(case, name, names, 1) for name in names]
    decode_real._side_by_side.cache_clear()
    assert shared[0]["text"] == shared[1]["text"] == alone["text"]
    assert [one["leaves_autoregressive_at"] for one in shared] == [[16]] * 2
    assert 0 < shared[0]["prefill_seconds"] < shared[1]["prefill_seconds"]


def test_texts_one_after_the_other_are_those_of_a_batch(monkeypatch):
    batch = next(point.case for point in decode_grid("tiny") if point.case.real)
    batch, apart = dataclasses.replace(batch, batch=2), dataclasses.replace(batch, texts=2)
    found = []
    for case in (batch, apart):
        decode_real._side_by_side.cache_clear()
        found.append(decode_real.measure_real(case, SPECULATIVE, (AUTOREGRESSIVE, SPECULATIVE), 1))
    decode_real._side_by_side.cache_clear()
    together, alone = found
    assert together["text"] == alone["text"]
    assert together["accepted"] == alone["accepted"]
    assert alone["leaves_autoregressive_at"] == [16, 16]
    assert alone["windows"] <= together["windows"]
    # Half as many tokens in each of the two.
    assert alone["tokens_per_second"] == pytest.approx(15 / alone["decode_seconds"][0])
    assert together["tokens_per_second"] == pytest.approx(30 / together["decode_seconds"][0])


def test_results_of_other_flags_are_refused(first_run, tmp_path):
    report = json.loads((first_run[0] / "decode.json").read_text(encoding="utf-8"))
    (tmp_path / "decode.json").write_text(json.dumps({**report, "xla_flags": "--xla_abacus"}), encoding="utf-8")
    assert "--xla_abacus" in mistake("bench", "decode", "--grid", "tiny", "--out", tmp_path)


def test_bad_options(tmp_path):
    assert "--grid is 'huge'" in mistake("bench", "decode", "--grid", "huge", "--out", tmp_path)
    assert "--minutes is 0" in mistake("bench", "decode", "--minutes", 0, "--out", tmp_path)
    assert "method is 'magic'" in mistake("bench", "decode", "--only", "magic", "--out", tmp_path)
    assert "case is 'B3'" in mistake("bench", "decode", "--cases", "B8", "--cases", "B3", "--out", tmp_path)


def test_limits_leave_some_methods_of_some_cases(tmp_path, monkeypatch):
    measured = []
    point = {"tokens_per_second": 1.0, "window_seconds": 1.0, "density": 1.0, "share_of_copy_bandwidth": 1.0}

    def measure(_, wanted, beside):
        measured.append((wanted.title, beside))
        return dict(point) | {"context": 1, "compile_seconds": 1.0}

    monkeypatch.setattr(bench._Bench, "measure", measure)
    limits = Limits(only=(SPECULATIVE, RIVAL), cases=("B8 S32768", "llama-2"))
    report = run_benchmark(tmp_path, decode_benchmark("small"), limits)
    assert report["complete"]
    assert [title for title, _ in measured] == ["llama-3.1-8b B8 S32768"] * 2 + ["llama-2-7b B1 S32768"]
    assert measured[0][1] == [SPECULATIVE, RIVAL]


@pytest.mark.parametrize("grid", ["tiny", "small", "full"])
def test_grids_hold_each_point_once(grid):
    points = [(point.case, point.name) for point in decode_grid(grid)]
    assert len(set(points)) == len(points)
    for case, _ in points:
        assert case.real or shape(case.target).vocab_size == shape(case.draft).vocab_size


@pytest.mark.slow
def test_acceptance_is_imposed_alike():
    case = decode_grid("tiny")[0].case
    workload = Workload(dataclasses.replace(case, accepted=(5, 0, 2)))
    for name in (SPECULATIVE, SPECATTN):
        strategy = bench_strategy(workload, methods()[name], 0.5)
        state = workload.session.decode(strategy, workload.start(strategy, None), 4)
        assert state.statistics.accepted.tolist() == [5 + 0 + 2 + 5] * case.batch
        assert state.emitted.tolist() == [1 + 12 + 4] * case.batch
        assert state.target_cache.lengths.tolist() == [case.context + 16] * case.batch
        workload.give_back(state)
    strategy = dataclasses.replace(strategy, judge=ImposedAcceptance((9,)))
    with pytest.raises(UserError, match="counts is"):
        workload.session.decode(strategy, workload.start(strategy, None), 1)


class TestMethods:
    def test_our_own_is_what_is_shipped(self):
        found = methods()
        assert found[SPECATTN].policy == found[RIVAL].policy == load_policy("default")
        case = DecodeCase("llama-3.1-8b", "llama-3.2-1b", 8, 32768)
        assert predict(case, found[RIVAL]).strategy.lossless
        assert predict(case, found[DENSE_DRAFT]).scenario.draft_reads == 1.0
        assert set(CHOICES) <= set(found)
        assert [predict(case, found[name]).strategy.name for name in CHOICES] == list(CHOICES)
        assert REAL_METHODS[SPECATTN] == {"mode": "specattn", "kv_reduction": 0.75}

    def test_a_sparse_draft_counts_in_every_step(self):
        case = DecodeCase("llama-3.1-8b", "llama-3.2-1b", 8, 32768)
        moved = {
            name: roofline(case, methods()[name], {"window_seconds": 1.0, "density": 0.12}, 1e12)["bytes"]
            for name in (SPECATTN, DENSE_DRAFT, RIVAL)
        }
        whole, sparse = (moved[name]["draft_cache"] for name in (DENSE_DRAFT, SPECATTN))
        assert sparse / whole == load_policy("default").draft_reads
        # Who verifies densely plans for the draft alone.
        assert 0 < moved[RIVAL]["selection"] < moved[SPECATTN]["selection"]


def made_up(profile, platform="gpu"):
    """A report in which everything takes as long as a profile says."""
    points = []
    for batch, slots in ((1, 2048), (1, 131072), (8, 8192), (8, 32768)):
        case = DecodeCase("llama-3.1-8b", "llama-3.2-1b", batch, slots)
        for name in CHOICES:
            _, scenario, work = predict(case, methods()[name])
            density = work.target_reads
            took = window_seconds(scenario, work, profile)
            tokens = batch * work.tokens
            parts = {"draft": took.draft, "select": took.selection, "verify": took.verify, "rest": took.rest}
            points.append(
                {"case": json.loads(json.dumps(dataclasses.asdict(case))), "method": name, "failure": None,
                 "tokens_per_second": tokens / took.total, "window_seconds": took.total, "density": density,
                 "context": case.context, "share_of_copy_bandwidth": 0.5, "compile_seconds": 1.0}
                | ({"parts": parts} if work.steps else {})
            )  # fmt: skip
    return {
        "device": "abacus", "platform": platform, "commit": "0123456789", "versions": {"jax": "0"}, "xla_flags": "",
        "complete": True, "copy_bytes_per_second": profile.bandwidth, "flops": None, "points": points,
    }  # fmt: skip


GPU = load_profile("gpu", bandwidth=2.6e12)


class TestAuto:
    def test_the_choice_is_the_best_where_the_prediction_is_right(self):
        choices = auto_choices(made_up(GPU))
        assert [choice["case"]["slots"] for choice in choices] == [2048, 131072, 8192, 32768]
        for choice in choices:
            assert choice["of_best"] > 0.9
            assert choice["reason"]
            for times in choice["methods"].values():
                assert times["predicted_window_seconds"] == pytest.approx(times["window_seconds"])
        assert choices[0]["chosen"] == SPECULATIVE
        assert choices[3]["chosen"] == choices[3]["best"] == SPECATTN

    def test_the_choice_knows_nothing_of_measured_speeds(self):
        report = made_up(GPU)
        for point in report["points"]:
            point["tokens_per_second"] = 1.0 + (point["method"] == AUTOREGRESSIVE)
        chosen = auto_choices(report)[3]
        assert (chosen["chosen"], chosen["best"], chosen["of_best"]) == (SPECATTN, AUTOREGRESSIVE, 0.5)

    def test_what_was_not_measured_has_no_ratio(self):
        report = made_up(GPU)
        for point in report["points"]:
            if point["method"] == SPECATTN:
                point["failure"] = "MemoryError: none"
        chosen = auto_choices(report)[3]
        assert chosen["of_best"] is None
        assert chosen["methods"][SPECATTN]["window_seconds"] is None
        table = decode_table({**report, "auto": [chosen]})
        assert "### What `--mode auto` chooses" in table
        assert " / -" in table

    def test_the_report_is_made_anew(self, tmp_path):
        (tmp_path / "decode.json").write_text(json.dumps(made_up(GPU)), encoding="utf-8")
        rewrite_report(tmp_path, decode_benchmark())
        assert len(json.loads((tmp_path / "decode.json").read_text(encoding="utf-8"))["auto"]) == 4
        assert "| specattn | specattn | 1.00 |" in (tmp_path / "decode.md").read_text(encoding="utf-8")
        assert (tmp_path / "speed.png").exists()

    def test_on_the_tiny_grid(self, first_run):
        random, real = first_run[1]["auto"]
        assert set(random["methods"]) == set(CHOICES)
        assert random["of_best"] <= 1
        assert real["case"]["target"] == "tiny"
        assert real["of_best"] > 0
        assert "predicted" in real["reason"]


@pytest.mark.slow
def test_constants_are_found_again():
    true = dataclasses.replace(GPU, weights_share=0.7, sparse_share=0.5, layer_s=25e-6, selecting_layer_s=10e-6)
    terms = fit_terms([made_up(true), made_up(dataclasses.replace(true, bandwidth=4e12))])
    fitted = fit_profile(terms, GPU)
    for term in terms:
        assert term.ratio(fitted) == pytest.approx(1, abs=0.03)
    for name in FITTED[:6]:
        assert getattr(fitted, name) == pytest.approx(getattr(true, name), rel=0.1), name
    with pytest.raises(UserError, match="no measured window"):
        fit_terms([])


@pytest.mark.parametrize("command", [["fit_devices.py"], ["bench_decode.py", "--report"]], ids=["fit", "report"])
def test_scripts(tmp_path, capsys, command):
    (tmp_path / "decode.json").write_text(json.dumps(made_up(GPU)), encoding="utf-8")
    assert run_script(*command, tmp_path) == 0
    fitted = f"weights_share = {GPU.weights_share}"
    assert (fitted if command[1:] == [] else "`--mode auto` chooses") in capsys.readouterr().out
    assert run_script(*command, tmp_path / "x") != 0
    said = capsys.readouterr().err
    assert "error: " in said
    assert "there is no decode.json" in said


def test_kernels_of_a_window_are_counted():
    """Kernels that overlap are counted once for the time in which anything ran, and each for its own."""
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "profile_window.py"))
    ran = (0, 1000, "a"), (900, 2000, "b"), (3000, 4000, "a"), (3900, 5000, "b")
    kernels = [script["Kernel"](*one) for one in ran]
    assert script["busy"](kernels) == 4000
    assert script["summary"](kernels, windows=2) == {
        "busy_us": 2.0,
        "launches": 2,
        "kernels": [{"name": "b", "us": 1.1, "launches": 1.0}, {"name": "a", "us": 1.0, "launches": 1.0}],
        "in_order": [["a", 1.0], ["b", 1.1]],
    }


def test_runs_are_compared(tmp_path, capsys):
    slower = dataclasses.replace(GPU, bandwidth=0.9 * GPU.bandwidth)
    for name, profile in (("before", GPU), ("after", slower)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "decode.json").write_text(json.dumps(made_up(profile)), encoding="utf-8")
    command = ["compare_decode.py", tmp_path / "before", tmp_path / "after"]
    assert run_script(*command) == 1
    told = capsys.readouterr().out
    assert told.count("SLOWER") == int(told.splitlines()[-1].split()[0]) > 6
    assert run_script(*command, "--speed", "0.89") == 0
    assert "SLOWER" not in capsys.readouterr().out


HLO = """HloModule jit_decode, is_scheduled=true

%step.1 (arg: (s32[], f32[64,256]{1,0}, /*index=2*/f32[4])) -> (s32[], f32[64,256]) {
  %arg = (s32[], f32[64,256]{1,0}, f32[4]{0}) parameter(0)
  %part = f32[64,256]{1,0} get-tuple-element(%arg), index=1
  %loop_copy_fusion = f32[64,256]{1,0} fusion(%part), kind=kLoop, calls=%fused
  ROOT %out = (s32[], f32[64,256]{1,0}) tuple(%count, %loop_copy_fusion)
}

%window.2 (arg.2: (s32[], f32[64,256])) -> (s32[], f32[64,256]) {
  %arg.2 = (s32[], f32[64,256]{1,0}) parameter(0)
  %small = f32[4]{0} copy(%norm)
  %kernel = (f32[4]{0}, f32[2,2]{1,0}) custom-call(%small), custom_call_target="x"
  ROOT %while.3 = (s32[], f32[64,256]) while(%arg.2), body=%step.1, backend_config={"known_trip_count":{"n":"5"}}
}

ENTRY %main.9 (p: f32[64,256]) -> f32[64,256] {
  %p = f32[64,256]{1,0} parameter(0)
  %once = f32[64,256]{1,0} copy(%p)
  ROOT %while.4 = (s32[], f32[64,256]{1,0}) while(%once), condition=%c.2, body=%window.2
}
"""


def test_launches_and_copies_of_the_loop_are_counted():
    facts = loop_facts(HLO, 64 * 256 * 4)
    assert facts.cache_copies == ["loop_copy_fusion (65536 bytes)"]
    assert facts.launches == 2 + 5


def test_compiled_text_is_understood():
    compiled = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, lambda _, x: jnp.sin(x) + 1, x))
    text = compiled.lower(jnp.zeros((64, 256)), jnp.int32(3)).compile().as_text()
    assert loop_facts(text, 64 * 256 * 4).launches > 0


def test_what_a_mesh_gains_is_told():
    def point(mesh, seconds):
        case = dataclasses.asdict(DecodeCase("llama-3.1-8b", "llama-3.2-1b", 8, 32768, mesh=mesh))
        speed = {"window_seconds": seconds, "tokens_per_second": 36 / seconds, "share_of_copy_bandwidth": 0.5}
        return {"case": case, "method": "specattn", "failure": None, **speed}

    table = mesh_table({"points": [point("", 0.018), point("heads=2", 0.010), point("data=4", 0.005)]})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[-3:]]
    assert [row[2] for row in rows] == ["one device", "heads=2", "data=4"]
    assert [row[5:7] for row in rows] == [["1.00", "100%"], ["1.80", "90%"], ["3.60", "90%"]]
    links = {"heads=2": {"latency_s": 12e-6, "bandwidth": 3e11}, "data=2": None}
    assert describe_links({"links": links}).strip() == "On heads=2 devices meet in 12 us, and send 300.0 GB/s."


def test_the_grid_of_meshes():
    points = mesh_grid(("heads=2", "data=2"))
    assert {point.case.mesh for point in points if point.case.batch == 8} == {"", "heads=2", "data=2"}
    # One sequence cannot be split.
    assert {point.case.mesh for point in points if point.case.batch == 1} == {"", "heads=2"}
    moved = on_mesh(decode_grid("tiny"), "heads=2")
    assert not any(point.case.real for point in moved)
    # One run compares the two.
    half = len(moved) // 2
    assert [one.name for one in moved[:half]] == [one.name for one in moved[half:]]
    assert [one.case.devices for one in moved] == [1] * half + [2] * half
    assert {(point.case.mesh, point.title.split(" on ")[-1]) for point in moved[half:]} == {("heads=2", "heads=2")}
