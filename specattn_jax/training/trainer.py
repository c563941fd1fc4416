"""The distillation run: one jitted step with donated state, exact resume, metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int32

from specattn_jax.errors import UserError
from specattn_jax.models.forward import likeliest_next
from specattn_jax.models.transformer import LanguageModel, abstract_model
from specattn_jax.training.checkpoints import Checkpoints
from specattn_jax.training.data import TrainingData
from specattn_jax.training.objective import Losses, objective
from specattn_jax.training.settings import TrainSettings

# Share of the old mixture weights kept per step, and a floor that lets a source come back.
_MIXTURE_MEMORY = 0.95
_MIXTURE_FLOOR = 1e-4
_WINDOW = 5
METRICS = "metrics.jsonl"
# Held-out texts are read in so many parts.
_EVALUATION_PARTS = 4

Weights = dict[str, Array]


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
        weights: float32 master weights of the draft's own parts, by path.
        optimizer: optax's state.
        mixture: mixture weights `[L * K, R]` that predict the target's attention from the draft's.
        step: optimiser steps done.
    """

    weights: Weights
    optimizer: optax.OptState
    mixture: Float[Array, "rows R"]
    step: Int32[Array, ""]


def draft_layers(target: LanguageModel, num_layers: int) -> tuple[int, ...]:
    """Target layers from which the draft starts: evenly spread, first and last included.

    Raises:
        UserError: more layers are wanted than the target has.
    """
    have = target.config.num_layers
    if num_layers > have:
        raise UserError(f"num_layers is {num_layers}; expected at most the target's {have}.")
    return tuple(round(float(place)) for place in np.linspace(0, have - 1, num_layers))


def by_path(model: LanguageModel) -> dict[str, Any]:
    """All weights by path, such as `['layers'][0]['mlp']['down'].value`; of an abstract model their shapes."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)}


def _is_shared(path: str) -> bool:
    """Whether the draft uses the target's own array there."""
    return path.startswith(("['embedding']", "['output']"))


def initial_weights(target: LanguageModel, num_layers: int) -> Weights:
    """Float32 copies of the target's chosen layers and final norm, without embedding and output."""
    source = by_path(target)
    config = dataclasses.replace(target.config, num_layers=num_layers)
    layers = draft_layers(target, num_layers)
    weights = {}
    for path in by_path(abstract_model(config, jnp.float32)):
        if _is_shared(path):
            continue
        origin = path
        if path.startswith("['layers']["):
            index, rest = path.removeprefix("['layers'][").split("]", 1)
            origin = f"['layers'][{layers[int(index)]}]{rest}"
        weights[path] = jnp.array(source[origin], jnp.float32)
    return weights


def assemble(weights: Weights, target: LanguageModel) -> LanguageModel:
    """The draft, in the target's dtype: its own weights with the target's embedding and output."""
    num_layers = 1 + max(int(path.split("[")[2].split("]")[0]) for path in weights if path.startswith("['layers']"))
    shell = abstract_model(dataclasses.replace(target.config, num_layers=num_layers), target.dtype)
    shared = by_path(target)
    leaves = [shared[path] if _is_shared(path) else weights[path].astype(target.dtype) for path in by_path(shell)]
    return dataclasses.replace(shell, params=jax.tree.unflatten(jax.tree.structure(shell.params), leaves))


def make_optimizer(settings: TrainSettings) -> optax.GradientTransformation:
    """AdamW with warm-up, cosine decay to zero and clipped gradients; norms are not decayed."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, settings.peak_rate, min(settings.warmup, settings.steps - 1), settings.steps
    )
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(
            rate,
            b2=0.95,
            weight_decay=settings.decay,
            mask=lambda weights: jax.tree.map(lambda leaf: leaf.ndim > 1, weights),
        ),
    )


def init_state(target: LanguageModel, settings: TrainSettings) -> TrainState:
    """State before the first step."""
    weights = initial_weights(target, settings.num_layers)
    rows, sources = (count * target.config.num_kv_heads for count in (target.config.num_layers, settings.num_layers))
    mixture = jnp.full((rows, sources), 1.0 / sources, jnp.float32)
    return TrainState(weights, make_optimizer(settings).init(weights), mixture, jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames=("settings",), donate_argnames=("state",))
def train_step(
    target: LanguageModel, state: TrainState, tokens: Int32[Array, "rows length"], *, settings: TrainSettings
) -> tuple[TrainState, Losses]:
    """One optimiser step on one batch.

    Args:
        target: the teacher.
        state: donated.
        tokens: the batch.
        settings: static.
    """
    observed = None
    if settings.attention_weight > 0:
        # Late positions see enough past for attention to be worth pointing.
        key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
        first = settings.length // 8
        observed = jnp.sort(jax.random.randint(key, (settings.attention_rows,), first, settings.length))

    def loss(weights: Weights, part: Int32[Array, "b T"]) -> Any:
        return objective(assemble(weights, target), target, state.mixture, part, observed, settings.attention_weight)

    def accumulate(total: Any, part: Int32[Array, "b T"]) -> tuple[Any, None]:
        (_, kept), gradient = jax.value_and_grad(loss, has_aux=True)(state.weights, part)
        return jax.tree.map(jnp.add, total, (gradient, kept)), None

    parts = tokens.reshape(settings.accumulate, -1, settings.length)
    nothing = jax.tree.map(jnp.zeros_like, state.weights), (Losses(*jnp.zeros(3)), jnp.zeros_like(state.mixture))
    summed, _ = jax.lax.scan(accumulate, nothing, parts)
    gradient, (losses, improved) = jax.tree.map(lambda x: x / settings.accumulate, summed)
    updates, optimizer = make_optimizer(settings).update(gradient, state.optimizer, state.weights)
    weights = jax.tree.map(jnp.add, state.weights, updates)
    mixture = _MIXTURE_MEMORY * state.mixture + (1 - _MIXTURE_MEMORY) * improved
    mixture = jnp.maximum(mixture, _MIXTURE_FLOOR / mixture.shape[1])
    mixture = mixture / jnp.sum(mixture, axis=1, keepdims=True)
    return TrainState(weights, optimizer, mixture, state.step + 1), losses


def accepted_per_window(agrees: Bool[np.ndarray, "n T"], window: int = _WINDOW) -> float:
    """Mean drafted tokens accepted when decoding greedily along texts that the target wrote greedily.

    Exact for whole windows: along the target's own text, a drafted token is accepted while all before it agree.

    Args:
        agrees: whether the draft's likeliest token is the text's, given the text before it.
        window: W.
    """
    accepted = windows = 0
    for row in agrees:
        at = 0
        while at + window <= len(row):
            run = row[at : at + window]
            count = window if run.all() else int(np.argmin(run))
            accepted, windows, at = accepted + count, windows + 1, at + count + 1
    return accepted / max(windows, 1)


def held_out_acceptance(target: LanguageModel, weights: Weights, data: TrainingData, prompt: int) -> float:
    """Accepted per window of five along the target's own greedy continuations of held-out text."""
    draft = assemble(weights, target)
    text = data.held_out
    best = [np.asarray(likeliest_next(draft, jnp.asarray(part))) for part in np.split(text, _EVALUATION_PARTS)]
    return accepted_per_window((np.concatenate(best)[:, :-1] == text[:, 1:])[:, prompt - 1 :])


class Report(NamedTuple):
    """What is told now and then.

    Attributes:
        step: steps done.
        losses: of the last step.
        tokens_per_s: since the last report.
        accepted: held-out acceptance, where it was measured.
    """

    step: int
    losses: dict[str, float]
    tokens_per_s: float
    accepted: float | None


def _note(file: Path, report: Report) -> None:
    """Appends a report to the metrics file."""
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(report._asdict()) + "\n")
    except OSError as error:
        raise UserError(
            f"out: {file} cannot be written ({error.strerror}); free some room and run the same command again."
        ) from error


def read_metrics(file: Path) -> list[Report]:
    """The reports of a run in the order of their steps; where a resumed run went over a step again, the later one."""
    reports = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, TypeError):  # a line that a kill cut short
            reports.append(Report(**json.loads(line)))
    by_step = {report.step: report for report in reports}
    return [by_step[step] for step in sorted(by_step)]


def train(
    target: LanguageModel,
    data: TrainingData,
    settings: TrainSettings,
    folder: Path,
    *,
    report_every: int = 20,
    checkpoint_every: int = 500,
    on_report: Callable[[Report], None] | None = None,
) -> TrainState:
    """Runs, or resumes, a distillation to its end.

    Args:
        target: the teacher.
        data: what to learn from.
        settings: the run.
        folder: for checkpoints and `metrics.jsonl`.
        report_every: steps between reports.
        checkpoint_every: steps between checkpoints; acceptance is measured then too.
        on_report: receives the reports.

    Raises:
        UserError: the loss is not finite, checkpoints belong to another run, or cannot be written.
    """
    configuration = {**settings.to_json(), "texts": data.fingerprint()}
    checkpoints = Checkpoints(folder / "checkpoints", configuration)
    try:
        state = init_state(target, settings)
        if checkpoints.latest is not None:
            state = TrainState(**checkpoints.restore(state._asdict()))
        else:
            (folder / METRICS).unlink(missing_ok=True)
        # Two are kept while a third is written.
        checkpoints.check_room(state._asdict(), copies=3 if checkpoints.latest is None else 1)
        for report, reached in _steps(target, data, settings, state, checkpoints, report_every, checkpoint_every):
            state = reached
            _note(folder / METRICS, report)
            if on_report is not None:
                on_report(report)
        return state
    finally:
        checkpoints.close()


def _steps(
    target: LanguageModel,
    data: TrainingData,
    settings: TrainSettings,
    state: TrainState,
    checkpoints: Checkpoints,
    report_every: int,
    checkpoint_every: int,
) -> Iterator[tuple[Report, TrainState]]:
    """Steps until the end, yielding at every report."""
    last, clock = int(state.step), time.perf_counter()
    for step in range(last, settings.steps):
        state, losses = train_step(target, state, jnp.asarray(data.batch(step, settings)), settings=settings)
        done = step + 1
        saving = done % checkpoint_every == 0 or done == settings.steps
        if not (saving or done % report_every == 0):
            continue
        numbers = {name: float(value) for name, value in losses._asdict().items()}
        if not np.isfinite(numbers["total"]):
            raise UserError(
                f"The loss became {numbers['total']} at step {done}; the last good checkpoint is of step "
                f"{checkpoints.latest or 0}; lower the learning rate and start anew in another folder."
            )
        speed = (done - last) * settings.rows * settings.length / (time.perf_counter() - clock)
        accepted = None
        if saving:
            accepted = held_out_acceptance(target, state.weights, data, settings.prompt)
            checkpoints.save(done, state._asdict())
        yield Report(done, numbers, speed, accepted), state
        last, clock = done, time.perf_counter()
