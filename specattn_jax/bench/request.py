"""The request benchmark: what a user waits for, from the prompt to the last new token, and where the time goes."""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from specattn_jax.bench.decode_auto import report_profile
from specattn_jax.bench.decode_cases import LARGER, REAL, TINY, DecodeCase, by_case, on_mesh, shape
from specattn_jax.bench.decode_methods import (
    ALONE,
    AUTO,
    AUTO_LOSSLESS,
    AUTOREGRESSIVE,
    CHOICES,
    HIERARCHY,
    HIERARCHY_OF_TEXT,
    LOOKUP,
    REAL_METHODS,
    SPARSE_DRAFT,
    SPECATTN,
    SPECULATIVE,
    ImposedAcceptance,
    methods,
)
from specattn_jax.bench.decode_real import measure_real
from specattn_jax.bench.decode_roofline import predict
from specattn_jax.bench.decode_workload import link_facts, peak_bytes, random_alignment, random_models
from specattn_jax.bench.imposed import RATES, impose, lossless_strategy
from specattn_jax.bench.request_report import draw_requests, request_table
from specattn_jax.bench.runner import Benchmark, Point, Report
from specattn_jax.decoding.protocol import Models, Strategy
from specattn_jax.decoding.state import DecodeState, begin
from specattn_jax.files import read_json
from specattn_jax.models.cache import Reach
from specattn_jax.planning.acceptance import Acceptance
from specattn_jax.planning.cost import prefill_arithmetic
from specattn_jax.planning.device import measure_profile
from specattn_jax.planning.gate import Situation, choose_strategy
from specattn_jax.runtime.clock import Clock
from specattn_jax.runtime.request import DEFAULT_PLACES
from specattn_jax.runtime.session import DRAFT_REACH, Session, seed_keys
from specattn_jax.selection.alignment import NucleusMass
from specattn_jax.selection.make import make_selection
from specattn_jax.selection.protocol import Selection
from specattn_jax.selection.reads import ReadEverything
from specattn_jax.timing import TimingSettings, time_calls

RequestGrid: TypeAlias = Literal["tiny", "small", "real", "lossless"]
HF_RESULTS = "hf.json"
_QWEN = "qwen2.5-coder-1.5b"
_LLAMA3, _TINY_PAIR = ("llama-3.1-8b", "llama-3.2-1b"), ("tiny", "tiny-draft")
# Width of the square product by which the rate of matrices is measured.
_PRODUCT = {"cpu": 512}
_PROBES, _PROBE_WINDOWS, _CLOSE = 8, 2, 0.05
# Runs of so many sequences in all, where acceptance is a matter of luck.
_LEAST_LUCK = 4
# Short requests are repeated more often: two of the same differ by more than two ways of decoding them.
_LEAST_REPEATS, _MOST_REPEATS, _REPEATED_TOKENS = 2, 7, 250_000


def request_benchmark(grid: RequestGrid = "small", mesh: str | None = None) -> Benchmark:
    """What `specattn bench request` measures: whole requests with random weights and with a real pair.

    A file hf.json that scripts/bench_request_hf.py wrote into the folder becomes part of the table.

    Args:
        grid: which points.
        mesh: devices that share the work, such as heads=2, which are compared with one of them; None: one alone.
    """
    return Benchmark(
        file="request",
        compared="method",
        points=on_mesh(_points(grid), mesh),
        open=lambda _: _Bench(once=grid == "tiny").measure,
        conclude=_conclude,
        files=_files,
        facts=lambda: {
            "matrix_flops": _matrix_flops(),
            # For what `auto` would choose; of accelerators it is a constant.
            "flops": measure_profile().flops if jax.default_backend() == "cpu" else None,
            **({} if mesh is None else {"links": link_facts((mesh,))}),
        },
    )


def _points(grid: RequestGrid) -> list[Point]:
    """Cases by their importance; a slot is a token of the prompt or a new one."""

    def case(batch: int, prompt: int, new: int, pair: tuple[str, str] = _LLAMA3, dtype: str = "bfloat16") -> DecodeCase:
        return DecodeCase(*pair, batch, prompt + new, room=new, dtype=dtype)

    def real(name: str, prompt: int, new: int, batch: int = 1, texts: int = 1) -> DecodeCase:
        slots = prompt + new
        return DecodeCase(name, name, batch, slots, new, accepted=(), density=1.0, dtype="auto", texts=texts)

    if grid == "tiny":
        wanted = [(case(2, 150, 40, _TINY_PAIR, "float32"), CHOICES), (real(TINY, 150, 16), (*CHOICES, AUTO))]
    elif grid == "real":
        every = tuple(name for name in REAL_METHODS if name != "specattn paper")
        # What one text accepts is luck: single sequences are several, one after the other.
        cases = [
            real(LARGER, prompt, 256, batch, 4 if batch == 1 else 1)
            for prompt in (30000, 8000)
            for batch in (1, 8, 16, 32)
        ]
        wanted = [(one, every) for one in (*cases, real(REAL, 6144, 256, texts=4))]
    elif grid == "lossless":
        # What needs no draft comes first: the prompts are read once by the target, and once more by both models.
        chosen = (AUTOREGRESSIVE, LOOKUP, ALONE, HIERARCHY_OF_TEXT, SPECULATIVE, SPARSE_DRAFT, HIERARCHY)
        wanted = [
            (dataclasses.replace(case(*size, 256), rates=LARGER), (*chosen, SPECATTN, AUTO_LOSSLESS))
            for size in ((8, 32768), (1, 131072), (1, 32768))
        ]
        # A draft of few layers beside the one of the pair: what is asked of both is how long a window takes.
        wanted += [
            (dataclasses.replace(case(1, 30000, 256, (_QWEN, draft)), rates=LARGER), (SPECULATIVE,))
            for draft in ("qwen2.5-coder-0.5b", "qwen2.5-coder-five-layers")
        ]
    else:
        alone, without_loss = CHOICES[:1], (*CHOICES, ALONE, SPARSE_DRAFT)
        wanted = [
            (case(1, 32768, 256), without_loss), (case(8, 32768, 256), without_loss), (case(1, 2048, 64), CHOICES),
            (case(1, 131072, 256), without_loss), (case(8, 8192, 64), alone), (case(1, 8192, 64), alone),
            (real(REAL, 6144, 256), (*CHOICES, AUTO)),
        ]  # fmt: skip
    return [
        Point(one, name, f"{one.target} B{one.batch} {one.context}+{one.room}")
        for one, names in wanted
        for name in names
    ]


def _matrix_flops() -> float:
    """Arithmetic per second in a large product of matrices in bfloat16, by which prefill is judged."""
    width = _PRODUCT.get(jax.default_backend(), 8192)

    def make(seed: int) -> tuple[jax.Array, ...]:
        keys = jax.random.split(jax.random.key(seed))
        return tuple(jax.random.normal(key, (width, width), jnp.bfloat16) for key in keys)

    timed = time_calls(jnp.matmul, make, 6 * width * width, TimingSettings(seconds=0.02, repeats=3))
    return 2.0 * width**3 / timed.seconds


class _Bench:
    """Measures points, keeping the models from one to the next."""

    def __init__(self, *, once: bool) -> None:
        self._once = once
        self._models: tuple[tuple[str, ...], Models] | None = None
        self._request: _Request | None = None

    def measure(self, point: Point, beside: Sequence[str]) -> dict[str, Any]:
        """One point, of whose case the methods `beside` are wanted."""
        case = point.case
        repeats = 1 if self._once else _repeats(case)
        if case.rates:
            return self._at_rates(case, point.name, repeats)
        self._request = None
        if case.real:
            self._models = None
            found = measure_real(case, point.name, beside, repeats)
            decode = statistics.median(found["decode_seconds"])
            return found | _whole(case, found["prefill_seconds"], decode)
        gc.collect()
        request = _Request(case, self._session(case))
        make = functools.partial(_strategy, case, request.session.models, point.name)
        strategy = make(1.0)
        request.prefill(strategy)
        prefills = [request.prefill(strategy) for _ in range(repeats)]
        # Of the process, so that it tells of the first case alone.
        facts: dict[str, Any] = {"prefill_repeats": prefills, "peak_bytes": peak_bytes()}
        if point.name == SPECULATIVE:
            request.prefill(strategy, None)
            facts["prefill_seconds_draft_sees_all"] = request.prefill(strategy, None)
            request.prefill(strategy)
        if not strategy.lossless:
            strategy, facts["p"] = _tune(request, make)
        # The first run of a program may be slow, whatever was compiled.
        request.decode(strategy, case.room)
        runs = [request.decode(strategy, case.room) for _ in range(repeats)]
        state = request.state
        windows = float(np.mean(state.statistics.windows))
        facts["windows"] = windows
        facts["density"] = float(np.mean(state.statistics.read)) / max(windows, 1.0)
        weights, attention = prefill_arithmetic(shape(case.target), case.batch, case.context)
        facts["arithmetic"] = {"weights": weights, "attention": attention}
        return facts | _whole(case, statistics.median(prefills), statistics.median(runs))

    def _at_rates(self, case: DecodeCase, name: str, repeats: int) -> dict[str, Any]:
        """One method at the acceptance of a real pair. The prompts are read for all that need the same models."""
        if self._request is None or self._request.case != case:
            self._request = None
            gc.collect()
            self._request = _Request(case, self._session(case))
        request, rates, facts = self._request, RATES[case.rates], dict[str, Any]()
        if name == SPECATTN:
            make = functools.partial(_strategy, case, request.session.models, name)
            request.read(make(1.0))
            tuned, facts["p"] = _tune(request, make)
            strategy = impose(tuned, rates)
        else:
            strategy, decision = lossless_strategy(case, name, rates, measure_profile())
            if decision is not None:
                facts |= {"plan": str(decision.choice), "reason": decision.reason}
        prefill = request.read(strategy)
        request.decode(strategy, case.room)
        runs, windows, accepted, longest = list[float](), 0.0, 0.0, 0
        # Each with other luck, of which the mean counts.
        for seed in range(1 if self._once else max(repeats, _LEAST_LUCK // case.batch)):
            runs.append(request.decode(strategy, case.room, seed))
            done = jax.device_get(request.state.statistics)
            windows, accepted = windows + float(np.sum(done.windows)), accepted + float(np.sum(done.accepted))
            longest += int(np.max(done.windows))
        facts |= {"windows": windows / len(runs) / case.batch, "accepted_per_window": accepted / windows}
        facts["window_seconds"] = sum(runs) / longest
        return facts | {"decode_repeats": runs} | _whole(case, prefill, statistics.mean(runs))

    def _session(self, case: DecodeCase) -> Session:
        """The case's models, random ones."""
        names = case.target, case.draft, case.dtype, case.mesh
        if self._models is None or self._models[0] != names:
            self._models = None
            gc.collect()
            self._models = names, random_models(case)
        return Session(self._models[1])


def _repeats(case: DecodeCase) -> int:
    """How often a case is measured."""
    return min(_MOST_REPEATS, max(_LEAST_REPEATS, _REPEATED_TOKENS // (case.batch * case.slots * case.texts)))


def _whole(case: DecodeCase, prefill: float, decode: float) -> dict[str, Any]:
    """The request in seconds, and in parts."""
    return {
        "prefill_seconds": prefill,
        "decode_seconds_median": decode,
        "request_seconds": prefill + decode,
        "seconds_per_token": decode / max(case.room - 1, 1),
    }


class _Request:
    """One request: prompts that are prefilled, and decoded as often as is wanted.

    Attributes:
        session: the models.
        case: what is asked for.
        state: where decoding ended.
    """

    def __init__(self, case: DecodeCase, session: Session) -> None:
        self.session = session
        self.case = case
        rng = np.random.default_rng(0)
        self._prompts = rng.integers(0, shape(case.target).vocab_size, (case.batch, case.context)).tolist()
        self._seconds = dict[bool, float]()
        self.state: Any = None

    def prefill(self, strategy: Strategy, draft_reach: Reach | None = DRAFT_REACH) -> float:
        """Reads the prompts with the models of a strategy; the seconds that reading took."""
        # Two pairs of caches would not fit.
        self.state = None
        clock = Clock()
        self.state = dataclasses.replace(self.session, draft_reach=draft_reach).prefill(
            self._prompts,
            self.case.room,
            window=DEFAULT_PLACES if self.case.rates else self.case.window,
            with_draft=strategy.needs_draft,
            clock=clock,
        )
        return clock.seconds["prefill_s"]

    def read(self, strategy: Strategy) -> float:
        """Sees to it that the models of a strategy have read the prompts; the seconds that it takes, measured once."""
        needed = strategy.needs_draft
        if needed not in self._seconds:
            self.prefill(strategy)
            self._seconds[needed] = self.prefill(strategy)
        elif self.state is None or (needed and self.state.draft_cache is None):
            self.prefill(strategy)
        return self._seconds[needed]

    def decode(self, strategy: Strategy, windows: int, seed: int = 0) -> float:
        """Decodes from the end of the prompts on, with keys of a seed; the seconds that it took."""
        room = self.case.room + max(self.case.window, strategy.window) + 1
        state = _again(
            self.state,
            jnp.int32(self.case.context),
            jnp.int32(self.case.room),
            seed_keys(seed, self.case.batch),
            room=room,
            with_prompt=strategy.needs_text,
        )
        self.state = None
        state = jax.block_until_ready(self.session.start(strategy, state))
        clock = Clock()
        self.state = self.session.decode(strategy, state, windows)
        return clock.lap("decode", self.state)


@functools.partial(jax.jit, static_argnames=("room", "with_prompt"), donate_argnames=("state",))
def _again(
    state: DecodeState, context: jax.Array, new: jax.Array, keys: jax.Array, *, room: int, with_prompt: bool
) -> DecodeState:
    """The state right after prefill: what was decoded since is forgotten. Of the prompts' text nothing is kept."""
    batch, slots = state.limit.shape[0], state.target_cache.num_slots
    full = jnp.full((batch,), context)
    draft = None if state.draft_cache is None else state.draft_cache.at(full)
    last = jnp.tile(jnp.arange(1, 3, dtype=jnp.int32), (batch, 1))
    return begin(
        state.target_cache.at(full),
        draft,
        last,
        jnp.full((batch,), new),
        keys,
        room=room,
        prompt=jnp.zeros((batch, slots), jnp.int32) if with_prompt else None,
    )


def _strategy(case: DecodeCase, models: Models, name: str, p: float) -> Strategy:
    """A method's strategy at a nucleus mass, with the acceptance of the case."""
    method, selection = methods()[name], None
    if method.policy is not None:
        assert models.draft is not None
        target, draft = models.target.config, models.draft.config
        mass = NucleusMass.uniform(p, target.num_layers)
        selection = make_selection(method.policy, random_alignment(target, draft), mass, target, draft)
    chosen: Selection = ReadEverything() if selection is None else selection
    return method.make(chosen, case.window, ImposedAcceptance(case.accepted))


def _tune(request: _Request, make: Callable[[float], Strategy]) -> tuple[Strategy, float]:
    """The strategy at the nucleus mass that reads about the share of the case, and that mass."""
    low, high, wanted, p = 0.0, 1.0, request.case.density, 0.5
    for _ in range(_PROBES):
        p = (low + high) / 2
        request.decode(make(p), _PROBE_WINDOWS)
        found = float(np.mean(request.state.statistics.read)) / _PROBE_WINDOWS
        if abs(found / wanted - 1.0) < _CLOSE:
            break
        low, high = (low, p) if found > wanted else (p, high)
    return make(p), p


def _conclude(report: Report) -> None:
    """Adds to each case what `auto` would choose, and how near to the best fixed method that comes."""
    good = [point for point in report["points"] if point["failure"] is None]
    report["auto"] = []
    for case, points in by_case(good).items():
        if case.real or case.rates:
            report["auto"] += _chosen_by_itself(points)
            continue
        times = {point["method"]: point["request_seconds"] for point in points}
        fixed = {name: seconds for name, seconds in times.items() if name in CHOICES}
        if len(fixed) < len(CHOICES) or case.mesh:
            continue
        asked = {name: predict(case, methods()[name], None) for name in CHOICES}
        acceptance = Acceptance().at_mean(case.window, case.mean_accepted)
        situation = Situation(case.context, case.room, acceptance, draft_reach=DRAFT_REACH)
        strategies = tuple(one.strategy for one in asked.values())
        decision = choose_strategy(asked[SPECATTN].scenario, report_profile(report), situation, strategies)
        report["auto"].append(
            _beside_the_best(points[0]["case"], decision.mode, decision.reason, times[decision.mode], fixed)
        )


def _chosen_by_itself(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `auto` did of a real pair, with and without the approximate mode, beside the best of the others."""
    times = {point["method"]: point["request_seconds"] for point in points}
    found = []
    for point in points:
        asked = REAL_METHODS[point["method"]]
        if asked["mode"] != AUTO:
            continue
        fixed = {
            name: seconds
            for name, seconds in times.items()
            if (other := REAL_METHODS[name]["mode"]) != AUTO and not (asked.get("lossless") and other == SPECATTN)
        }
        if fixed:
            reason = " ".join(point["decisions"]) if "decisions" in point else point["reason"]
            found.append(_beside_the_best(point["case"], point["method"], reason, times[point["method"]], fixed))
    return found


def _beside_the_best(
    case: dict[str, Any], chosen: str, reason: str, seconds: float, fixed: Mapping[str, float]
) -> dict[str, Any]:
    """What was chosen, why, and how near its seconds come to the best of the fixed methods."""
    best = min(fixed, key=lambda name: fixed[name])
    return {"case": case, "chosen": chosen, "reason": reason, "best": best, "of_best": fixed[best] / seconds}


def _files(report: Report, folder: Path) -> dict[str, bytes]:
    """The table, and a plot."""
    peers = read_json(folder / HF_RESULTS) if (folder / HF_RESULTS).exists() else None
    return {"request.md": request_table(report, peers).encode(), "request.png": draw_requests(report["points"])}
