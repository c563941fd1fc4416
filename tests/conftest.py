"""Shared fixtures. JAX runs on the CPU; pytest turns warnings into errors (see pyproject.toml)."""

from __future__ import annotations

import os
from importlib import metadata

# Before anything imports JAX.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's older emitters compile tiny programs in half the time. JAX 0.11 has them no more, and ends at an unknown flag.
if metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"

import dataclasses
import gc
import inspect
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from shapes import check_shapes

# Before anything imports ours.
check_shapes()

import jax
import pytest
from tiny import random_alignment, tiny_config

from specattn_jax.examples import byte_tokenizer
from specattn_jax.loading import get_preset, is_cached, save_hf
from specattn_jax.loading.pair import ModelPair, load_pair
from specattn_jax.models import transformer
from specattn_jax.models.transformer import init_model
from specattn_jax.selection.alignment import save_alignment

# A program for all random weights of a model takes over a second to compile. Made one by one, most weights of another
# model have a shape that was compiled before.
mock.patch.object(transformer, "_random_weights", inspect.unwrap(transformer._random_weights)).start()

MEMORY_MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def forget_what_was_compiled() -> Iterator[None]:
    """Compiled functions take several memory maps each, of which Linux gives a process 65,530.

    Until half of them are taken, modules share what they compile.
    """
    yield
    if not MEMORY_MAPS.exists() or MEMORY_MAPS.read_text().count("\n") > 32_000:
        jax.clear_caches()


@pytest.fixture(scope="module")
def own_programs() -> Iterator[None]:
    """For modules that change what is traced: neither do they get programs of others, nor do others get theirs."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def pytest_collection_finish() -> None:
    """What was imported stays; looking through it for garbage again and again takes a fifteenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tiny models compile without optimising, which halves their tests' time; the marked tests as users have it."""
    optimised = any(item.get_closest_marker(name) for name in ("optimised", "smollm2"))
    jax.config.update("jax_disable_most_optimizations", not optimised)
    # Of programs that a test starts.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(not optimised)


@dataclasses.dataclass(frozen=True)
class PairFolders:
    """A tiny random pair on disk.

    Attributes:
        target: Hugging Face folder.
        draft: likewise, of another shape.
        stranger: a model with another tokenizer.
        alignment: a random alignment of target and draft.
    """

    target: Path
    draft: Path
    stranger: Path
    alignment: Path


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> PairFolders:
    root = tmp_path_factory.mktemp("pair")
    target = init_model(tiny_config(vocab_size=257, num_layers=3, max_context=256), jax.random.key(0))
    draft = init_model(tiny_config(vocab_size=257, num_kv_heads=1, max_context=256), jax.random.key(1))
    save_hf(target, byte_tokenizer(), root / "target")
    save_hf(draft, byte_tokenizer(), root / "draft")
    save_hf(draft, byte_tokenizer(reverse=True), root / "stranger")
    (root / "alignment").mkdir()
    save_alignment(random_alignment(target.config, draft.config), root / "alignment")
    return PairFolders(root / "target", root / "draft", root / "stranger", root / "alignment")


@pytest.fixture(scope="session")
def tiny_pair(tiny_folders: PairFolders) -> ModelPair:
    return load_pair(str(tiny_folders.target), str(tiny_folders.draft), alignment=tiny_folders.alignment)


@pytest.fixture(scope="session")
def smollm2_files() -> None:
    """Skips what needs the embedded model where it is not."""
    if not is_cached(get_preset("smollm2").target):
        pytest.skip("the embedded model is not here; run `specattn fetch smollm2`")


@pytest.fixture(scope="session")
def smollm2(smollm2_files: None) -> ModelPair:
    """The embedded pair; mark tests that use it with `smollm2`."""
    return load_pair("smollm2", dtype="float32")
