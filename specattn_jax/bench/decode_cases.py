"""What `specattn bench decode` measures: pairs of model shapes, and the grids of these and the methods."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from specattn_jax.bench.decode_methods import (
    AUTO,
    AUTOREGRESSIVE,
    DENSE_DRAFT,
    MOSAIC,
    REAL_METHODS,
    RIVAL,
    SPECATTN,
    SPECULATIVE,
    methods,
)
from specattn_jax.bench.runner import Point
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.sharding import MeshShape
from specattn_jax.planning.cost import load_shape

DecodeGrid: TypeAlias = Literal["tiny", "small", "full"]
# What is in no file of shapes: two that are made on the spot for tests, by their number of layers.
_TINY_PAIR = ("tiny", "tiny-draft")
_TINY_LAYERS = dict(zip(_TINY_PAIR, (3, 2), strict=True))
# Names of real pairs: one in memory, for tests, and two presets.
TINY, REAL, LARGER = "tiny", "smollm2", "qwen2.5-coder"


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """What is decoded, the same for every method.

    Attributes:
        target: name of a shape in `configs/shapes.toml`; or the preset of a real pair.
        draft: likewise.
        batch: B.
        slots: S, length of the cache arrays.
        room: slots that are empty when a measurement begins; the context is what is left.
        window: W.
        accepted: drafted tokens that count as accepted, window by window; empty: those that are.
        density: share of the target's cache that sparse methods read.
        dtype: of weights and caches.
        mesh: devices that share the work, such as heads=2; empty: one.
        rates: preset of the pair at whose measured acceptance each method decodes, in place of `accepted`.
        texts: of a real pair: so many batches of prompts are continued one after the other, each another part of the
            book, and times are means over them.
    """

    target: str
    draft: str
    batch: int
    slots: int
    room: int = 256
    window: int = 5
    accepted: tuple[int, ...] = (4, 3)
    density: float = 0.12
    dtype: str = "bfloat16"
    mesh: str = ""
    rates: str = ""
    texts: int = 1

    @property
    def context(self) -> int:
        """Tokens in the caches when a measurement begins."""
        return self.slots - self.room

    @property
    def real(self) -> bool:
        """Whether this is a real pair that continues a text."""
        return not self.accepted

    @property
    def mean_accepted(self) -> float:
        """Drafted tokens accepted per window."""
        return sum(self.accepted) / len(self.accepted)

    @property
    def devices(self) -> int:
        """How many share the work."""
        return MeshShape.parse(self.mesh).devices if self.mesh else 1

    @property
    def title(self) -> str:
        """The case for people, in few words."""
        return f"{self.target} B{self.batch} S{self.slots}" + (f" on {self.mesh}" if self.mesh else "")


def on_mesh(points: Sequence[Point], mesh: str | None) -> list[Point]:
    """The points on one device and then on a mesh, case by case; without a mesh as they are.

    A real pair is measured on one device alone, and so left out.
    """
    if mesh is None:
        return list(points)
    both: list[Point] = []
    for case, members in itertools.groupby((point for point in points if not point.case.real), lambda one: one.case):
        alone = list(members)
        moved = dataclasses.replace(case, mesh=mesh)
        both += [*alone, *(one._replace(case=moved, title=f"{one.title} on {mesh}") for one in alone)]
    return both


def mesh_grid(meshes: Sequence[str]) -> list[Point]:
    """Long contexts on one device and on meshes, the more telling first; `data` splits no batch of one."""
    large, long = DecodeCase(*_LLAMA3, 8, 32768), DecodeCase(*_LLAMA3, 1, 131072)
    pairs = [(case, mesh) for case in (large, long) for mesh in ("", *meshes) if case.batch > 1 or "data" not in mesh]
    cases = [dataclasses.replace(case, mesh=mesh) for case, mesh in pairs]
    return [point for case in cases for point in _points(case, (SPECATTN, SPECULATIVE))]


def case_of(point: dict[str, Any]) -> DecodeCase:
    """The case of a measured point."""
    return DecodeCase(**{**point["case"], "accepted": tuple(point["case"]["accepted"])})


def by_case(points: Sequence[dict[str, Any]]) -> dict[DecodeCase, list[dict[str, Any]]]:
    """Measured points, case by case."""
    cases: dict[DecodeCase, list[dict[str, Any]]] = defaultdict(list)
    for point in points:
        cases[case_of(point)].append(point)
    return cases


def shape(name: str) -> ModelConfig:
    """The shape of that name; its `max_context` limits nothing here, because random weights know no positions."""
    if name in _TINY_LAYERS:
        from specattn_jax.examples import tiny_pair

        return dataclasses.replace(tiny_pair().target.config, num_layers=_TINY_LAYERS[name])
    return load_shape(name)


_LLAMA3, _LLAMA2 = ("llama-3.1-8b", "llama-3.2-1b"), ("llama-2-7b", "tinyllama-1.1b")
_SMOLLM2 = ("smollm2-135m", "smollm2-draft")
_MAIN = (SPECULATIVE, SPECATTN, AUTOREGRESSIVE)


def _points(case: DecodeCase, names: Sequence[str], parts: Sequence[str] = ()) -> list[Point]:
    return [Point(case, name, case.title, name in parts) for name in names]


def _real(target: str, slots: int, room: int, names: Sequence[str] = tuple(REAL_METHODS)) -> list[Point]:
    """A real pair after a prompt of `slots - room` tokens."""
    case = DecodeCase(target, target, 1, slots, room, accepted=(), density=1.0, dtype="auto")
    return _points(case, names)


def decode_grid(grid: DecodeGrid) -> list[Point]:
    """The points of a grid, in the order in which they are measured.

    `tiny` runs anywhere in seconds, `small` has the points that matter, `full` all pairs, contexts and batches.
    """
    names = tuple(methods())
    if grid == "tiny":
        case = DecodeCase(*_TINY_PAIR, 2, 384, room=128, dtype="float32")
        return [*_points(case, names, (SPECATTN,)), *_real(TINY, 256, 16, (SPECULATIVE, SPECATTN, AUTO))]
    large = DecodeCase(*_LLAMA3, 8, 32768)
    first = (*_MAIN, RIVAL, MOSAIC)
    small = [
        *_points(large, first, (SPECATTN,)),
        *_points(DecodeCase(*_LLAMA3, 1, 131072), _MAIN, (SPECATTN,)),
        *_points(DecodeCase(*_LLAMA3, 1, 2048), _MAIN),
        *_points(DecodeCase(*_LLAMA2, 1, 32768), _MAIN),
        *_real(REAL, 6400, 256),
        *_points(DecodeCase(*_LLAMA3, 8, 8192), _MAIN, (SPECATTN,)),
        *_points(DecodeCase(*_LLAMA3, 1, 8192), _MAIN),
        *_points(large, [name for name in names if name not in first], (DENSE_DRAFT,)),
    ]
    if grid == "small":
        return small
    have = {(point.case, point.name) for point in small}
    more = itertools.product((_LLAMA3, _LLAMA2, _SMOLLM2), (2048, 8192, 32768, 131072), (1, 8, 16))
    rest = itertools.chain.from_iterable(
        _points(DecodeCase(*pair, batch, slots), names, (*_MAIN, RIVAL, DENSE_DRAFT)) for pair, slots, batch in more
    )
    return [*small, *(point for point in rest if (point.case, point.name) not in have)]
