"""Hugging Face folders: reading them in every spelling, writing them, and what a broken one says."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import causal_attention
from transformers import AutoModelForCausalLM, AutoTokenizer

from loading.tiny_gguf import write_gguf
from loading.tiny_models import CONFIGS, reference_logits, save, tiny, tokens, torch
from loading.tiny_tokenizer import tiny_tokenizer
from specattn_jax.errors import UserError
from specattn_jax.loading.gguf import open_gguf
from specattn_jax.loading.hf import open_hf, save_hf
from specattn_jax.loading.hf_config import parse_hf_config
from specattn_jax.loading.resolve import load_model, resolve
from specattn_jax.loading.tensors import build_model
from specattn_jax.models.config import RopeScaling
from specattn_jax.models.layers import rotation

BASE = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 8192,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 2048,
}


@pytest.fixture
def folder(tmp_path):
    return save(tiny("llama"), tmp_path / "model")


def assert_same_weights(one, other):
    assert one.config == other.config
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(one.params), jax.tree.leaves(other.params), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs, err_msg=str(path))


def test_shards_read_like_one_file(folder, tmp_path):
    sharded = save(tiny("llama"), tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert_same_weights(build_model(open_hf(sharded), "float32"), build_model(open_hf(folder), "float32"))


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({}, 1e4, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 1e4, RopeScaling("linear", 2.0)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            5e5,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 2048),
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6, None),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            5e5,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 2048),
        ),
    ],
)
def test_rope_in_every_spelling(fields, theta, scaling):
    config = parse_hf_config(BASE | fields, "x")
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 8192),
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, 8192),
        ({"model_type": "mistral", "sliding_window": 1024}, 1024),
        ({"model_type": "qwen2", "sliding_window": 1024, "use_sliding_window": False}, 8192),
        ({"model_type": "qwen2", "sliding_window": 1024, "use_sliding_window": True}, 1024),
    ],
)
def test_a_sliding_window_limits_the_context(fields, expected):
    assert parse_hf_config(BASE | fields, "x").max_context == expected


def test_defaults_are_those_of_transformers():
    config = parse_hf_config(BASE, "x")
    assert (config.num_kv_heads, config.head_dim, config.norm_eps, config.tie_embeddings) == (4, 16, 1e-6, False)
    assert parse_hf_config(BASE | {"head_dim": None}, "x").head_dim == 16
    assert parse_hf_config(BASE | {"model_type": "qwen3"}, "x").head_dim == 128


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt_neox"}, r"x: model_type is 'gpt_neox'; expected one of llama, mistral, qwen2, qwen3\."),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'; expected 'silu'"),
        ({"mlp_bias": True}, r"mlp_bias is True; expected False"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, r"rope scaling is 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, r"x \(rope scaling\): factor is missing"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, r"weights are quantised"),
        ({"hidden_size": "wide"}, r"hidden_size is 'wide'; expected a positive number"),
        ({"num_attention_heads": 0}, r"num_attention_heads is 0; expected a positive number"),
        ({"num_key_value_heads": 3}, r"num_heads is 4, which is not a multiple of num_kv_heads, 3"),
    ],
)
def test_configurations_we_cannot_follow(fields, message):
    with pytest.raises(UserError, match=message):
        parse_hf_config(BASE | fields, "x")


def test_missing_field():
    with pytest.raises(UserError, match=r"x: vocab_size is missing"):
        parse_hf_config({key: value for key, value in BASE.items() if key != "vocab_size"}, "x")


def broken_truncated(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])


def broken_header(folder):
    (folder / "model.safetensors").write_bytes(b"garbage, not safetensors")


def broken_json(folder):
    (folder / "config.json").write_text("{")


def broken_no_weights(folder):
    (folder / "model.safetensors").unlink()


def broken_old_format(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def broken_missing_shard(folder):
    (folder / "model.safetensors").unlink()
    save(tiny("llama"), folder, max_shard_size="100KB")
    next(folder.glob("model-00002-*")).unlink()


def broken_index(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")


def change(folder, name, edit):
    weights = load_file(folder / "model.safetensors")
    edited = edit(weights.pop(name))
    save_file(weights | ({} if edited is None else {name: edited}), folder / "model.safetensors")


def broken_missing_tensor(folder):
    change(folder, "model.layers.0.mlp.up_proj.weight", lambda _: None)


def broken_shape(folder):
    change(folder, "lm_head.weight", lambda x: np.ascontiguousarray(x[:-1]))


def broken_nan(folder):
    change(folder, "model.layers.1.self_attn.k_proj.weight", lambda x: np.where(np.arange(64) == 7, -np.nan, x))


def broken_integers(folder):
    change(folder, "model.norm.weight", lambda x: x.astype(np.int32))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken_truncated, r"model\.safetensors: is truncated or no safetensors file"),
        (broken_header, r"model\.safetensors: is truncated or no safetensors file"),
        (broken_json, r"config\.json: is not valid JSON"),
        (broken_no_weights, r"has no model\.safetensors and no model\.safetensors\.index\.json"),
        (broken_old_format, r"has its weights in pytorch_model\.bin; expected safetensors"),
        (broken_missing_shard, r"model-00002-of-\d+\.safetensors is missing \(1 of \d+ shards"),
        (broken_index, r"has no weight_map"),
        (broken_missing_tensor, r"tensor model\.layers\.0\.mlp\.up_proj\.weight is missing \(1 of 21"),
        (broken_shape, r"tensor lm_head\.weight has shape \[159, 64\]; expected \[160, 64\]"),
        (broken_nan, r"tensor model\.layers\.1\.self_attn\.k_proj\.weight is damaged: it contains NaN or infinity"),
        (broken_integers, r"tensor model\.norm\.weight is int32; expected floating-point"),
    ],
)
def test_broken_folders(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        build_model(open_hf(folder), "float32")


def broken_fp8(folder):
    weights = {name: x.astype(ml_dtypes.float8_e4m3fn) for name, x in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")


def broken_lfs(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def broken_adapter(folder):
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken_fp8, r"tensor \S+ is stored as F8_E4M3 \(fp8\), which is not supported; use the bfloat16 model"),
        (broken_lfs, r"model\.safetensors: is a pointer of Git LFS, not the file itself; run `git lfs pull`"),
        (broken_adapter, r"holds an adapter \(adapter_config\.json\), not a model; merge it"),
    ],
)
def test_what_is_refused_before_anything_is_read(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        resolve(str(folder))


def settings(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def variant_stale_index(folder):
    names = load_file(folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def variant_tied_head_in_index(folder):
    """The shards hold no output matrix, but the index names one."""
    change(folder, "lm_head.weight", lambda _: None)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = [*load_file(folder / "model-00001-of-00001.safetensors"), "lm_head.weight"]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    settings(folder, tie_word_embeddings=True)


def variant_own_head_beside_a_tie(folder):
    settings(folder, tie_word_embeddings=True)


def variant_equal_head_beside_a_tie(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].copy()}, folder / "model.safetensors")
    settings(folder, tie_word_embeddings=True)


def variant_without_the_models_prefix(folder):
    weights = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix("model."): x for name, x in weights.items() if name != "lm_head.weight"}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    settings(folder, tie_word_embeddings=True, architectures=["LlamaModel"])


def add_biases(folder, letters):
    weights, rng = load_file(folder / "model.safetensors"), np.random.default_rng(5)
    for name in list(weights):
        if any(name.endswith(f"self_attn.{letter}_proj.weight") for letter in letters):
            size = weights[name].shape[0]
            weights[name.replace(".weight", ".bias")] = rng.normal(0, 0.3, size).astype(np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings(folder, attention_bias=True)


def variant_biases(folder):
    add_biases(folder, "qkvo")


def variant_biases_but_none_on_the_output(folder):
    add_biases(folder, "qkv")


def variant_null_fields(folder):
    settings(folder, attention_bias=None, mlp_bias=None, hidden_act="swish")


VARIANTS = {
    name.removeprefix("variant_"): made for name, made in list(globals().items()) if name.startswith("variant_")
}


@pytest.mark.parametrize("name", VARIANTS)
def test_folders_as_people_have_them_compute_what_transformers_computes(folder, tmp_path, name):
    VARIANTS[name](folder)
    model = build_model(open_hf(folder), "float32")
    if name == "null_fields":
        settings(folder, attention_bias=False, mlp_bias=False)  # transformers refuses null, which many files say
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokens()[:1, :48]
    by = rotation(model.config, jnp.arange(ids.shape[1])[None])
    module = model.module()
    ours = module.logits(module(jnp.asarray(ids), by, causal_attention))
    np.testing.assert_allclose(ours, reference_logits(theirs, ids), rtol=0, atol=1e-4)
    save_hf(model, tiny_tokenizer(), tmp_path / "again")
    assert_same_weights(build_model(open_hf(tmp_path / "again"), "float32"), model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    np.testing.assert_allclose(reference_logits(again, ids), reference_logits(theirs, ids), rtol=0, atol=1e-4)


def test_qwen2_has_its_own_biases_whatever_its_configuration_says(tmp_path):
    folder = save(tiny("qwen2"), tmp_path / "qwen2")
    expected = build_model(open_hf(folder), "float32")
    for value in (True, False, None):
        settings(folder, attention_bias=value)
        assert_same_weights(build_model(open_hf(folder), "float32"), expected)


def test_a_gguf_file_with_all_biases(tmp_path, folder):
    add_biases(folder, "qkvo")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    source = open_gguf(write_gguf(tmp_path / "tiny.gguf", model))
    assert_same_weights(build_model(source, "float32"), build_model(open_hf(folder), "float32"))


@pytest.mark.parametrize("null", ["tie_word_embeddings", "rope_scaling", "head_dim", "num_key_value_heads"])
def test_null_is_nothing_said(tmp_path, folder, null):
    settings(folder, **{null: None})
    tiny_tokenizer().save(folder)
    assert resolve(str(folder)).tokenizer().fingerprint() == tiny_tokenizer().fingerprint()


def test_a_folder_of_the_hubs_cache(folder, tmp_path):
    root = tmp_path / "models--me--tiny"
    for commit in ("abc", "def"):
        (root / "snapshots" / commit).mkdir(parents=True)
        for file in folder.iterdir():
            (root / "snapshots" / commit / file.name).symlink_to(file)
    with pytest.raises(UserError, match=r"is a folder of the hub's cache with 2 snapshots, none of them marked"):
        resolve(str(root))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("def")
    assert resolve(str(root)).path == root / "snapshots" / "def"
    shutil.rmtree(root / "refs")
    shutil.rmtree(root / "snapshots" / "def")
    assert resolve(str(root)).path == root / "snapshots" / "abc"


def test_overflow_in_float16_is_not_silent(folder):
    change(folder, "model.norm.weight", lambda x: x + 1e6)
    assert build_model(open_hf(folder), "bfloat16").dtype == jnp.bfloat16
    with pytest.raises(UserError, match=r"model\.norm\.weight overflows float16; use bfloat16 or float32"):
        build_model(open_hf(folder), "float16")


@pytest.mark.parametrize("dtype", ["int8", "float64", "bananas"])
def test_dtypes_we_do_not_compute_in(folder, dtype):
    with pytest.raises(UserError, match=rf"dtype: got '{dtype}'; expected one of float32, bfloat16, float16"):
        load_model(str(folder), dtype=dtype)


def test_progress_ends_at_the_total(folder):
    seen = []
    model = build_model(open_hf(folder), "bfloat16", lambda *event: seen.append(event))
    assert seen[-1] == ("loading weights", model.nbytes, model.nbytes)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_what_we_write(tmp_path, name, dtype):
    model = build_model(open_hf(save(tiny(name), tmp_path / "theirs")), dtype)
    tokenizer = tiny_tokenizer()
    save_hf(model, tokenizer, tmp_path / "ours", shard_bytes=1 << 30 if dtype == "float32" else 60_000)
    assert not list(tmp_path.glob(".*"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert loaded.dtype == getattr(torch, dtype)
    assert loaded.generation_config.eos_token_id == [0, 2]
    if dtype == "float32":
        ids = tokens()[:, :64]
        np.testing.assert_allclose(
            reference_logits(loaded.eval(), ids), reference_logits(tiny(name), ids), rtol=0, atol=1e-5
        )
    text = "the <|im_start|>naïve 123"
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").encode(text) == tokenizer.encode(text)
    again, again_tokenizer = load_model(str(tmp_path / "ours"), dtype=dtype)
    assert_same_weights(again, model)
    assert again_tokenizer.fingerprint() == tokenizer.fingerprint()
    assert again_tokenizer.eos_ids == tokenizer.eos_ids
    # transformers' class for Qwen adds a role of its own.
    assert again_tokenizer.roles.items() >= tokenizer.roles.items()
    messages = [{"role": "user", "content": "hi"}]
    assert again_tokenizer.apply_chat(messages) == tokenizer.apply_chat(messages)


def test_writing_is_all_or_nothing(tmp_path, folder, monkeypatch):
    model = build_model(open_hf(folder), "float32")

    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("specattn_jax.loading.hf.save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_hf(model, tiny_tokenizer(), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    (tmp_path / "out").mkdir()
    save_hf(model, tiny_tokenizer(), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    with pytest.raises(UserError, match=r"out: exists already; expected a new or empty folder"):
        save_hf(model, tiny_tokenizer(), tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written"):
        save_hf(model, tiny_tokenizer(), tmp_path / "file" / "out")
