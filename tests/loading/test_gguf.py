"""GGUF files: quantisations, row order, metadata, and what a broken file says."""

from __future__ import annotations

import dataclasses

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quantisation
from transformers import LlamaConfig, LlamaForCausalLM

from loading.tiny_gguf import hf_weights, quantised, random_blocks, write_gguf
from loading.tiny_models import CONFIGS, save, tiny
from specattn_jax.errors import UserError
from specattn_jax.loading.gguf import open_gguf
from specattn_jax.loading.hf import open_hf
from specattn_jax.loading.resolve import resolve
from specattn_jax.loading.tensors import build_model
from specattn_jax.models.config import RopeScaling


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_reads_like_its_hugging_face_folder(tmp_path, name):
    ours = open_gguf(write_gguf(tmp_path / "tiny.gguf", tiny(name)))
    theirs = open_hf(save(tiny(name), tmp_path / "hf"))
    expected = dataclasses.replace(theirs.config, family="llama" if name == "mistral" else theirs.config.family)
    assert ours.config == expected
    assert ours.names() == theirs.names()
    for key in theirs.names():
        np.testing.assert_array_equal(ours.get(key), theirs.get(key), err_msg=key)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_quantised_weights_equal_the_library_dequantising_before_the_permutation(tmp_path, kind):
    kind = Quantisation[kind]
    source = open_gguf(write_gguf(tmp_path / "tiny.gguf", tiny("llama"), kind))
    for name, tensor in hf_weights(tiny("llama")).items():
        # Quantisation works along rows, so the order of the rows does not matter to it.
        expected = gguf.quants.dequantize(*quantised(name, tensor, kind))
        found = source.get(name)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected, err_msg=name)
        assert np.abs(found - tensor).max() < 0.1 * np.abs(tensor).max() + 1e-6


def readable():
    """Every type that the installed library dequantises."""
    kinds = []
    for kind in Quantisation:
        try:
            gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            continue
        kinds.append(kind)
    return kinds


WIDE = LlamaConfig(
    hidden_size=256, num_attention_heads=2, num_hidden_layers=1, intermediate_size=64, vocab_size=32, head_dim=32
)


@pytest.fixture(scope="module")
def wide():
    return LlamaForCausalLM(WIDE)


@pytest.mark.parametrize("kind", readable(), ids=lambda kind: kind.name)
def test_every_type_that_the_library_dequantises_is_read(tmp_path, wide, kind):
    assert {"Q5_0", "Q5_1", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4"} <= {each.name for each in readable()}
    rows = random_blocks(64, 256, kind)
    overrides = {"blk.0.ffn_gate.weight": rows, "blk.0.attn_q.weight": rows}
    source = open_gguf(write_gguf(tmp_path / "tiny.gguf", wide, tensors=overrides))
    plain = gguf.quants.dequantize(*rows)
    assert plain.shape == (64, 256)
    assert plain.std() > 0
    np.testing.assert_array_equal(source.get("model.layers.0.mlp.gate_proj.weight"), plain)
    query = source.get("model.layers.0.self_attn.q_proj.weight")
    # Within a head, the file has channels 0, 16, 1, 17, ... of Hugging Face's order.
    np.testing.assert_array_equal(query[16], plain[1])
    np.testing.assert_array_equal(query[1], plain[2])
    np.testing.assert_array_equal(query[32 + 16], plain[32 + 1])
    model = build_model(source, "float32")
    np.testing.assert_array_equal(model.params["layers"][0]["mlp"]["gate_up"][...][:, 0].T, plain)


def test_rope_scaling_is_recovered(tmp_path):
    assert open_gguf(write_gguf(tmp_path / "a.gguf", tiny("llama-llama3"))).config.rope_scaling == RopeScaling(
        "llama3", 8.0, 1.0, 4.0, 8192
    )
    assert open_gguf(write_gguf(tmp_path / "b.gguf", tiny("llama-linear"))).config.rope_scaling == RopeScaling(
        "linear", 4.0
    )
    neutral = {"rope_freqs.weight": np.ones(32, np.float32)}
    path = write_gguf(tmp_path / "c.gguf", tiny("llama-llama3"), tensors=neutral)
    assert open_gguf(path).config.rope_scaling is None


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "gemma3"}, r"architecture is 'gemma3'; expected one of llama, qwen2, qwen3"),
        ({"llama.rope.scaling.type": "longrope"}, r"rope scaling is 'longrope'; expected none, linear, yarn or"),
        ({"llama.rope.scaling.type": "yarn"}, r"yarn without factor or original context"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_log_multiplier": 0.1},
            r"metadata llama\.rope\.scaling\.yarn_log_multiplier is not supported",
        ),
        ({"llama.rope.scaling.type": "linear"}, r"linear without a factor"),
        ({"llama.expert_count": 8}, r"mixture of experts"),
        ({"llama.rope.dimension_count": 8}, r"rope\.dimension_count is 8; expected the head width, 32"),
        ({"llama.block_count": None}, r"metadata llama\.block_count is missing"),
    ],
)
def test_metadata_we_cannot_follow(tmp_path, monkeypatch, metadata, message):
    if arch := metadata.get("general.architecture"):
        monkeypatch.setitem(gguf.MODEL_ARCH_NAMES, gguf.MODEL_ARCH.LLAMA, arch)
        metadata = {}
    path = write_gguf(tmp_path / "tiny.gguf", tiny("llama"), metadata=metadata)
    with pytest.raises(UserError, match=message):
        _ = open_gguf(path).config


def test_rope_divisors_of_another_form(tmp_path):
    strange = {"rope_freqs.weight": np.linspace(1, 3, 32, dtype=np.float32)}
    path = write_gguf(tmp_path / "tiny.gguf", tiny("llama-llama3"), tensors=strange)
    with pytest.raises(UserError, match=r"does not hold Llama 3\.1's rope scaling"):
        _ = open_gguf(path).config


def test_every_truncation_is_reported(tmp_path):
    whole = write_gguf(tmp_path / "tiny.gguf", tiny("llama"), metadata={"some.list": [1.5] * 50}).read_bytes()
    cut = tmp_path / "cut.gguf"
    for end in [*range(4, 2000, 97), len(whole) // 2, len(whole) - 33]:
        cut.write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"cut\.gguf: is truncated or corrupt"):
            open_gguf(cut)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"not a model", "expected a GGUF file"), (b"", "expected a GGUF file"), (b"GGUF" + b"\xff" * 64, "corrupt")],
)
def test_not_gguf(tmp_path, content, message):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_gguf(tmp_path / "x.gguf")


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"No such file or directory"):
        open_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize("kind", sorted(set(Quantisation) - set(readable())), ids=lambda kind: kind.name)
def test_what_the_library_cannot_dequantise_is_named_before_anything_is_read(tmp_path, wide, kind):
    per_block, size = gguf.GGML_QUANT_SIZES[kind]
    rows = np.zeros((64, 256 // per_block * size), np.uint8)
    plain = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
    if kind.name[0] in "IF" and kind.name[1:].isdigit():
        rows = np.zeros((64, 256), np.float64 if kind.name == "F64" else plain[size])
    path = write_gguf(tmp_path / "tiny.gguf", wide, tensors={"blk.0.ffn_up.weight": (rows, kind)})
    with pytest.raises(
        UserError, match=rf"tensor blk\.0\.ffn_up\.weight is of type {kind.name}, which the installed gguf"
    ):
        resolve(str(path))


def test_a_type_that_the_library_does_not_know_is_named_too(tmp_path, wide):
    rows = (np.zeros((64, 256), np.float32), Quantisation.F32)
    path = write_gguf(tmp_path / "tiny.gguf", wide, tensors={"blk.0.ffn_up.weight": rows})
    content = bytearray(path.read_bytes())
    name = b"blk.0.ffn_up.weight"
    # After the name: the number of dimensions (4 bytes), the dimensions (8 each), the type.
    at = content.index(name) + len(name) + 4 + 2 * 8
    assert content[at : at + 4] == bytes(4)
    content[at] = 250
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"tensor blk\.0\.ffn_up\.weight is of type number 250, which the installed gguf"
    ):
        resolve(str(path))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.1.ffn_down.weight": None}, r"tensor model\.layers\.1\.mlp\.down_proj\.weight is missing \(1 of"),
        ({"blk.0.attn_q.bias": np.zeros(128, np.float32)}, r"tensor .*q_proj\.bias has no place in a llama model"),
        ({"output_norm.weight": np.zeros(63, np.float32)}, r"model\.norm\.weight has shape \[63\]; expected \[64\]"),
        ({"token_embd.weight": None}, r"tensor token_embd\.weight is missing"),
        ({"output_norm.weight": np.full(64, np.nan, np.float32)}, r"model\.norm\.weight is damaged: .*NaN"),
    ],
)
def test_wrong_tensors(tmp_path, tensors, message):
    path = write_gguf(tmp_path / "tiny.gguf", tiny("llama"), tensors=tensors)
    with pytest.raises(UserError, match=message):
        build_model(open_gguf(path), "float32")
