"""Draft folders: what they keep, what they borrow from the target, and what a broken one says."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tiny import causal_attention, tiny_config

from specattn_jax.decoding.sampling import match_vocabulary
from specattn_jax.errors import UserError
from specattn_jax.examples import byte_tokenizer
from specattn_jax.loading import load_model, resolve, save_checkpoint, save_draft, save_hf, share_embedding
from specattn_jax.loading.draft import embedding_fingerprint, quantise
from specattn_jax.loading.pair import load_pair
from specattn_jax.loading.tensors import array_path, hf_tensors
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.layers import rotation
from specattn_jax.models.transformer import LanguageModel, abstract_model
from specattn_jax.runtime.generate import generate

SHARED = ("model.embed_tokens.weight", "lm_head.weight")
NOTES = {"steps": 3, "texts": ["books/train"]}


def random_model(config: ModelConfig, seed: int, dtype="float32") -> LanguageModel:
    """Norms are random too, so that a mix-up shows. By NumPy, which has nothing to compile."""
    rng, empty = np.random.default_rng(seed), abstract_model(config, dtype)

    def fill(leaf):
        return jnp.asarray(rng.normal(1.0 if leaf.ndim == 1 else 0.0, 0.15, leaf.shape), leaf.dtype)

    return dataclasses.replace(empty, params=jax.tree.map(fill, empty.params))


def borrowed(target: LanguageModel, **changes) -> LanguageModel:
    """A random draft of another depth with the target's embedding and output matrix."""
    draft = random_model(dataclasses.replace(target.config, num_layers=1, **changes), 7, target.dtype)
    theirs = {array_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(target.params)}

    def pick(path, leaf):
        return theirs[array_path(path)] if array_path(path)[0] in ("embedding", "output") else leaf

    return dataclasses.replace(draft, params=jax.tree_util.tree_map_with_path(pick, draft.params))


def embedding_of(model: LanguageModel) -> np.ndarray:
    return np.asarray(model.params["embedding"][...])


def tensors_of(model: LanguageModel) -> dict[str, np.ndarray]:
    return {name: tensor.astype(np.float32) for name, tensor in hf_tensors(model)}


def logits_of(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    module, ids = model.module(), jnp.asarray(tokens, jnp.int32)
    by = rotation(model.config, jnp.arange(ids.shape[1])[None])
    return np.asarray(module.logits(module(ids, by, causal_attention)))


@pytest.fixture(scope="module")
def target(tiny_folders) -> LanguageModel:
    return load_model(str(tiny_folders.target), dtype="float32")[0]


@pytest.fixture(scope="module")
def draft(target) -> LanguageModel:
    return borrowed(target, num_kv_heads=1)


@pytest.fixture
def folder(tmp_path, tiny_folders, target, draft) -> Path:
    return write(draft, tmp_path / "made", tiny_folders.target, target)


def write(draft, folder, reference, target, storage="int8") -> Path:
    save_draft(draft, folder, target=str(reference), embedding=embedding_of(target), storage=storage, notes=NOTES)
    return folder


def edit(folder: Path, **changes) -> None:
    marker = folder / "specattn_draft.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | changes))


def test_bfloat16_round_trip_is_exact(tiny_folders, tmp_path):
    target = load_model(str(tiny_folders.target), dtype="bfloat16")[0]
    draft = borrowed(target)
    write(draft, tmp_path / "made", tiny_folders.target, target, "bfloat16")
    files = resolve(str(tmp_path / "made"))
    assert (files.kind, files.config) == ("draft", draft.config)
    loaded, tokenizer = load_model(files, dtype="bfloat16")
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(loaded.params), jax.tree.leaves(draft.params), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs, err_msg=str(path))
    assert tokenizer.fingerprint() == byte_tokenizer().fingerprint()


def test_int8_is_within_half_a_scale(folder, draft):
    stored = load_file(folder / "draft.safetensors")
    assert not set(SHARED) & set(stored)
    loaded, expected = tensors_of(load_model(str(folder), dtype="float32")[0]), tensors_of(draft)
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        if tensor.ndim == 1 or name in SHARED:
            np.testing.assert_array_equal(tensor, expected[name], err_msg=name)
            continue
        assert stored[name].dtype == np.int8
        bound = np.abs(expected[name]).max(axis=1, keepdims=True) / 127 / 2
        assert (np.abs(tensor - expected[name]) <= bound * (1 + 1e-5)).all(), name


def test_rows_of_zeros_and_of_tiny_numbers_stay_finite():
    stored, scale = quantise(np.array([[0.0, 0.0], [1e-45, 0.0], [-3.0, 3.0]], np.float32))
    np.testing.assert_array_equal(stored, [[0, 0], [0, 0], [-127, 127]])
    assert np.isfinite(scale).all()
    assert (scale > 0).all()


def test_marker(folder, tiny_folders, draft, target):
    data = json.loads((folder / "specattn_draft.json").read_text())
    fingerprint = embedding_fingerprint(embedding_of(target))
    assert data == {
        "format": 1,
        "config": draft.config.to_json(),
        "target": str(tiny_folders.target),
        "embedding_sha256": fingerprint,
        "storage": "int8",
        "notes": NOTES,
    }
    rounded = embedding_of(target).astype(jnp.bfloat16)
    assert embedding_fingerprint(rounded) == fingerprint
    assert embedding_fingerprint(rounded[:-1]) != fingerprint
    assert [path.name for path in folder.parent.iterdir()] == ["made"]


def test_relative_target_is_recorded_absolute(tmp_path, tiny_folders, target, draft, monkeypatch):
    monkeypatch.chdir(tiny_folders.target.parent)
    write(draft, tmp_path / "made", tiny_folders.target.name, target)
    monkeypatch.chdir(tmp_path)
    assert resolve("made").config == draft.config


def test_tied_qwen_draft_of_an_orbax_target(tmp_path):
    config = tiny_config(family="qwen2", vocab_size=257, tie_embeddings=True, qkv_bias=True)
    target = random_model(config, 3)
    save_checkpoint(target, byte_tokenizer(), tmp_path / "target")
    draft = borrowed(target)
    loaded, tokenizer = load_model(str(write(draft, tmp_path / "made", tmp_path / "target", target)), dtype="float32")
    np.testing.assert_array_equal(embedding_of(loaded), embedding_of(target))
    assert tensors_of(loaded).keys() == tensors_of(draft).keys()
    assert tokenizer.fingerprint() == byte_tokenizer().fingerprint()


def test_hub_target_is_opened_when_weights_are_wanted(tmp_path, tiny_folders, target, draft, monkeypatch):
    asked = []

    def snapshot(repo, *, weights):
        asked.append((repo, weights))
        return tiny_folders.target

    monkeypatch.setattr("specattn_jax.loading.hub.snapshot", snapshot)
    files = resolve(str(write(draft, tmp_path / "made", "some/model", target)))
    assert asked == [("some/model", False)]
    np.testing.assert_array_equal(embedding_of(load_model(files, dtype="float32")[0]), embedding_of(target))
    assert ("some/model", True) in asked


def test_pair_and_shared_arrays(folder, tiny_folders):
    pair = load_pair(str(tiny_folders.target), str(folder), alignment=None)
    assert pair.draft.config.num_layers == 1
    shared = share_embedding(pair.draft, pair.target)
    for name in ("embedding", "output"):
        assert shared.params[name][...] is pair.target.params[name][...]
    assert jax.tree.structure(shared) == jax.tree.structure(pair.draft)
    np.testing.assert_array_equal(logits_of(shared, [[1, 2, 3]]), logits_of(pair.draft, [[1, 2, 3]]))


def test_a_token_that_only_the_draft_knows_is_never_proposed(tmp_path, tiny_folders):
    """The target's embedding is padded, so that the id would be within its vocabulary."""
    padded = tiny_config(vocab_size=264, num_layers=3, max_context=256)
    target = random_model(padded, 0)
    save_hf(target, byte_tokenizer(), tmp_path / "target")
    longer = byte_tokenizer()
    longer.backend.add_special_tokens(["<|only the draft|>"])
    unknown = longer.backend.token_to_id("<|only the draft|>")
    assert unknown == 257
    model = random_model(dataclasses.replace(padded, num_layers=1), 3)
    # Weights that make the draft want nothing else.
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.at[unknown].mul(100.0) if array_path(path)[0] == "output" else leaf, model.params
    )
    save_hf(dataclasses.replace(model, params=params), longer, tmp_path / "draft")
    pair = load_pair(str(tmp_path / "target"), str(tmp_path / "draft"), alignment=None, dtype="float32")
    assert pair.draft.config.vocab_size == unknown
    assert jax.tree.structure(pair.draft.params) == jax.tree.structure(model.params)
    logits = match_vocabulary(jnp.asarray(logits_of(pair.draft, [[1, 2, 3]])), padded.vocab_size)
    assert logits.shape[-1] == padded.vocab_size
    assert np.isneginf(logits[..., unknown:]).all()
    np.testing.assert_array_equal(logits[..., :unknown], logits_of(model, [[1, 2, 3]])[..., :unknown])
    texts = [
        [result.tokens for result in generate(pair, ["Call me"], mode=mode, max_new_tokens=12).results]
        for mode in ("autoregressive", "speculative")
    ]
    assert texts[0] == texts[1]


def test_arrays_that_differ_are_not_shared(target, draft):
    altered = dataclasses.replace(target, params=jax.tree.map(lambda leaf: leaf + 1, target.params))
    for other in (altered, random_model(tiny_config(vocab_size=300), 0)):
        kept = share_embedding(draft, other)
        assert all(ours is theirs for ours, theirs in zip(jax.tree.leaves(kept), jax.tree.leaves(draft), strict=True))


def test_target_with_another_embedding(folder, tmp_path, target):
    save_hf(random_model(target.config, 5), byte_tokenizer(), tmp_path / "other")
    edit(folder, target=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"the embedding of '.*other' is not the one that this draft was trained with"):
        load_model(str(folder), dtype="float32")


@pytest.mark.parametrize("changes", [{"vocab_size": 300}, {"embed_dim": 32}, {"tie_embeddings": True}])
def test_target_of_another_shape(folder, draft, changes):
    edit(folder, config=dataclasses.replace(draft.config, **changes).to_json())
    with pytest.raises(UserError, match=rf"but {next(iter(changes))} is .* it was trained for another target"):
        resolve(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, r"format is 2; expected 1; use the version"),
        ({"target": "/not/here"}, r"shares the embedding of '/not/here', which cannot be used \(model .*name\); if "),
        ({"target": "smollm2:draft"}, r"target is 'smollm2:draft', itself a draft; expected a full model"),
        ({"target": 5}, r"target is 5; expected a str"),
        ({"notes": None}, r"notes is None; expected a dict"),
        ({"storage": "int4"}, r"storage is 'int4'; expected one of int8, bfloat16"),
        ({"config": {"family": "llama"}}, r"has no valid configuration \(.*missing"),
        ({"target": "x" * 300}, r"cannot be used \(model .*name\); if "),
        (
            {"config": {**tiny_config().to_json(), "rope_theta": "1"}},
            r"has no valid configuration \(.*rope_theta is '1'",
        ),
        ({"config": {**tiny_config().to_json(), "num_layers": 0}}, r"has no valid configuration \(.*num_layers is 0"),
    ],
)
def test_marker_of_another_kind(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(UserError, match=message):
        resolve(str(folder))


def test_draft_that_names_itself(folder):
    edit(folder, target=str(folder))
    with pytest.raises(UserError, match="itself a draft"):
        resolve(str(folder))


@pytest.mark.parametrize(
    ("keep", "message"),
    [(None, r"draft\.safetensors: is missing; expected a complete draft"), (500, r"is truncated or no safetensors")],
)
def test_missing_and_truncated_weights(folder, keep, message):
    file = folder / "draft.safetensors"
    content = file.read_bytes()
    file.unlink()
    if keep is not None:
        file.write_bytes(content[:keep])
    with pytest.raises(UserError, match=message):
        resolve(str(folder))


MATRIX = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (MATRIX, None, r"tensor model.layers.0.mlp.up_proj.weight is missing"),
        (f"{MATRIX}.scale", None, r"up_proj.weight.scale is missing; expected one scale per output channel"),
        (f"{MATRIX}.scale", lambda x: x[:-1], r"up_proj.weight.scale has shape \[23\]; expected one scale per output"),
        (f"{MATRIX}.scale", lambda x: x * np.nan, r"up_proj.weight is damaged: it contains NaN"),
        (MATRIX, lambda x: x[:, :-1], r"up_proj.weight has shape \[24, 15\]; expected \[24, 16\]"),
    ],
)
def test_damaged_weights(folder, name, change, message):
    tensors = load_file(folder / "draft.safetensors")
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = np.ascontiguousarray(change(tensor))
    save_file(tensors, folder / "draft.safetensors")
    with pytest.raises(UserError, match=message):
        load_model(str(folder), dtype="float32")


def test_what_cannot_be_saved(tmp_path, tiny_folders, target, draft):
    with pytest.raises(ValueError, match="its embedding is not the target's"):
        write(random_model(draft.config, 1), tmp_path / "made", tiny_folders.target, target)
    norms = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * jnp.nan if array_path(path)[0] == "final_norm" else leaf, draft.params
    )
    with pytest.raises(UserError, match=r"model.norm.weight contains NaN or infinity \(training diverged\)"):
        write(dataclasses.replace(draft, params=norms), tmp_path / "made", tiny_folders.target, target)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="exists already"):
        write(draft, tmp_path / "full", tiny_folders.target, target)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_full_disk(tmp_path, tiny_folders, target, draft, monkeypatch):
    def fail(*_args):
        raise SafetensorError("Error while serializing: No space left on device")

    monkeypatch.setattr("specattn_jax.loading.draft.save_file", fail)
    with pytest.raises(UserError, match=r"made: cannot be written \(.*No space left on device\); choose another"):
        write(draft, tmp_path / "made", tiny_folders.target, target)
    assert not list(tmp_path.iterdir())


def exported(reference: str, folder: Path):
    """A model through our loader and exporter into transformers."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    model, tokenizer = load_model(reference, dtype="float32")
    save_hf(model, tokenizer, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and transformers about themselves
        return model, transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def test_transformers_reads_the_export(folder, tmp_path):
    torch = pytest.importorskip("torch")
    ours, theirs = exported(str(folder), tmp_path / "hf")
    tokens = np.random.default_rng(0).integers(0, 257, (2, 40))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(logits_of(ours, tokens), expected, atol=1e-3)


def test_assisted_generation_gives_the_targets_text(tmp_path):
    torch = pytest.importorskip("torch")
    target = random_model(tiny_config(vocab_size=257), 11)
    save_hf(target, byte_tokenizer(), tmp_path / "target")
    made = write(borrowed(target), tmp_path / "made", tmp_path / "target", target)
    _, full = exported(str(tmp_path / "target"), tmp_path / "full")
    _, assistant = exported(str(made), tmp_path / "assistant")
    prompt, options = torch.tensor([[5, 9, 200, 31, 7]]), {"do_sample": False, "max_new_tokens": 24}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        plain = full.generate(prompt, **options)
        assisted = full.generate(prompt, assistant_model=assistant, **options)
    assert plain.shape[1] > prompt.shape[1]
    assert assisted.tolist() == plain.tolist()
    shutil.rmtree(tmp_path / "target")
    with pytest.raises(UserError, match="which cannot be used"):
        resolve(str(made))
