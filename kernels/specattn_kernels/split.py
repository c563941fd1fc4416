"""Arrays that lie on several devices: which axis is split over which axis of a mesh, and ops that run where they lie.

An op is local to its sequences and kv heads: each device serves those that it holds, and nobody waits for another.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

# The rule table: letters of the glossary that a mesh can split, and the part of a `Split` that says over which of its
# axes. All other axes are whole on every device.
RULES: Mapping[str, str] = {"B": "sequences", "K": "heads", "N": "heads", "F": "heads", "V": "heads"}


@dataclasses.dataclass(frozen=True)
class Split:
    """How arrays are split over a mesh; static under jit.

    Attributes:
        mesh: the devices, or their number alone to ask about shapes.
        sequences: axis of the mesh over which sequences (B) are split; None: each device has all of them.
        heads: axis over which kv heads (K), their query heads (N), the MLP's width (F) and the vocabulary (V) are
            split; None likewise.
    """

    mesh: Mesh | AbstractMesh
    sequences: str | None = "data"
    heads: str | None = "heads"

    def parts(self, letter: str) -> int:
        """Into how many parts an axis is split."""
        name = self._over(letter)
        return 1 if name is None else int(self.mesh.shape[name])

    def fitting(self, **sizes: int) -> Split:
        """The same, but whole where the axes of these letters do not divide into equal parts."""
        whole: dict[str, Any] = {RULES[letter]: None for letter, size in sizes.items() if size % self.parts(letter)}
        return dataclasses.replace(self, **whole)

    def spec(self, axes: str) -> PartitionSpec:
        """How an array of these axes is split, e.g. "B K S H"; what is no letter of the rule table stays whole."""
        return PartitionSpec(*(self._over(letter) for letter in axes.split()))

    def sharding(self, axes: str, shape: tuple[int, ...] | None = None) -> NamedSharding:
        """Likewise, with the devices; of a shape whose axes may be fewer, or not divide and then stay whole."""
        letters = axes.split()[: None if shape is None else len(shape)]
        sizes = {} if shape is None else {a: size for a, size in zip(letters, shape, strict=False) if a in RULES}
        return NamedSharding(self.mesh, self.fitting(**sizes).spec(" ".join(letters)))

    def _over(self, letter: str) -> str | None:
        rule = RULES.get(letter)
        name: str | None = None if rule is None else getattr(self, rule)
        return name

    def run(self, op: Callable[..., Any], arguments: tuple[Any, ...], axes: tuple[Any, ...], result: Any) -> Any:
        """Runs an op on every device, on what it holds.

        Args:
            op: takes the arguments, each with the device's part of the split axes.
            arguments: arrays, or trees of them.
            axes: theirs, of the same structure.
            result: the axes of what comes out, in its structure; None where nothing does.
        """
        told = functools.partial(jax.tree.map, self.spec)
        # Kernels do not say along which axes what they write differs.
        mapped = jax.shard_map(op, mesh=self.mesh, in_specs=told(axes), out_specs=told(result), check_vma=False)
        return mapped(*arguments)


def lay(split: Split | None, tree: Any, axes: str) -> Any:
    """Arrays that lie as a split says, inside or outside of a traced function; as they lie without one.

    Args:
        split: how.
        tree: arrays, or trees of them.
        axes: the first axes of each of them, as far as it has so many; those that follow stay whole.
    """
    if split is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, split.sharding(axes, x.shape)), tree)
