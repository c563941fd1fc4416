"""Orbax folders: complete model references, all or nothing."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loading.tiny_models import save, tiny
from loading.tiny_tokenizer import tiny_tokenizer
from specattn_jax.errors import UserError
from specattn_jax.loading import load_model, resolve, save_checkpoint
from specattn_jax.loading.hf import open_hf
from specattn_jax.loading.tensors import build_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(open_hf(save(tiny("llama-llama3"), tmp_path_factory.mktemp("hf"))), "float32")


@pytest.fixture
def folder(tmp_path, model):
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(folder, model, dtype):
    files = resolve(str(folder))
    assert (files.kind, files.config) == ("orbax", model.config)
    loaded, tokenizer = load_model(str(folder), dtype=dtype)
    assert loaded.config == model.config
    assert loaded.graphdef == model.graphdef or dtype != "float32"
    for ours, theirs in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(model.params), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_array_equal(ours, theirs.astype(dtype))
    assert tokenizer.fingerprint() == tiny_tokenizer().fingerprint()
    assert tokenizer.eos_ids == tiny_tokenizer().eos_ids


def test_missing_weights(folder):
    (folder / "weights").rename(folder / "elsewhere")
    with pytest.raises(UserError, match=r"checkpoint/weights/.*: is missing; copy or convert"):
        load_model(str(folder), dtype="float32")


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_weights(folder, damage):
    largest = max((folder / "weights").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    if damage == "truncated":
        del data[1000:]
    else:
        data[len(data) // 2] ^= 0xFF
    largest.write_bytes(data)
    with pytest.raises(UserError, match=rf"{largest.name}: is damaged .*; copy or convert the model again\."):
        load_model(str(folder), dtype="float32")


def test_weights_that_are_no_numbers_are_not_written(model, tmp_path):
    broken = dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), model.params))
    with pytest.raises(UserError, match="contains NaN or infinity"):
        save_checkpoint(broken, tiny_tokenizer(), tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


def test_what_orbax_cannot_write_is_one_sentence(model, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("OUT_OF_RANGE: Failed writing\nmany more lines")

    monkeypatch.setattr("orbax.checkpoint.StandardCheckpointer.save", fail)
    with pytest.raises(UserError, match=r"out: cannot be written \(OUT_OF_RANGE: Failed writing\); free some room"):
        save_checkpoint(model, tiny_tokenizer(), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_what_orbax_cannot_read_is_one_sentence(folder, monkeypatch):
    def fail(*_args):
        raise ValueError("corrupt\nand forty more lines")

    monkeypatch.setattr("orbax.checkpoint.StandardCheckpointer.restore", fail)
    with pytest.raises(UserError, match=r"checkpoint: weights cannot be read \(corrupt\); convert the model again\."):
        load_model(str(folder), dtype="float32")


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ('{"format": 99}', r"format is 99; expected 1"),
        ('{"format": 1, "config": {"family": "llama"}}', r"has no valid configuration"),
        ("[]", r"expected a JSON object"),
        ("{", r"is not valid JSON"),
    ],
)
def test_marker_of_another_kind(folder, marker, message):
    (folder / "specattn_model.json").write_text(marker)
    with pytest.raises(UserError, match=message):
        resolve(str(folder))
