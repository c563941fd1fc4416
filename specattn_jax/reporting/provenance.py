"""Where numbers come from: the code, the machine, and digests of what was measured."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from specattn_jax.models.transformer import LanguageModel
from specattn_jax.selection.alignment import Alignment

_PACKAGES = ("specattn-jax", "jax", "jaxlib", "flax", "numpy")


def commit() -> str:
    """The commit of the code that runs, marked if it was changed since; `unknown` for a copy without its history."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed package may lie inside somebody else's repository.
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=, changed since")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a source tree that was never installed
            found[name] = "unknown"
    return found


def hardware() -> dict[str, Any]:
    """The devices that JAX computes on."""
    devices = jax.devices()
    return {"backend": jax.default_backend(), "device": devices[0].device_kind, "devices": len(devices)}


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a command, as JSON holds them: paths as text."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


def _digest(parts: Iterable[bytes]) -> str:
    """Short enough to be compared by eye."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def model_digest(model: LanguageModel) -> str:
    """Digest of a model's shape and weights; the weights are summed up on the device, so that large ones are quick."""
    sums = [np.asarray(_checksum(leaf)).tobytes() for leaf in jax.tree.leaves(model.params)]
    return _digest([repr(sorted(model.config.to_json().items())).encode(), *sums])


@jax.jit
def _checksum(weights: Array) -> UInt32[Array, ""]:
    """Sum of all bits, each weight times an odd number of its own, modulo 2^32."""
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[weights.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(weights, kind).astype(jnp.uint32).ravel()
    return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)


def alignment_digest(alignment: Alignment | None) -> str | None:
    """Digest of all numbers of an alignment."""
    if alignment is None:
        return None
    arrays = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(alignment)]
    return _digest([repr((alignment.layer_map, alignment.granularity)).encode(), *arrays])


def documents_digest(documents: Sequence[Sequence[int]]) -> str:
    """Digest of all tokens, and of where each document ends."""
    return _digest(np.asarray([len(document), *document], np.int64).tobytes() for document in documents)
