"""Files damaged in any place: they load, or end in one sentence; never in a traceback."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loading.test_tokenizer import byte_pair_metadata
from loading.tiny_gguf import write_gguf
from loading.tiny_models import save, tiny
from loading.tiny_tokenizer import tiny_tokenizer
from specattn_jax.errors import UserError
from specattn_jax.loading import load_model, resolve

FILES = ("config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json", "model.safetensors")
FIELDS: tuple[str, ...] = (
    "rope_scaling",
    "rope_parameters",
    "rope_theta",
    "attention_bias",
    "head_dim",
    "eos_token_id",
    "model_type",
)
FIELDS += ("hidden_size", "num_key_value_heads", "tie_word_embeddings", "added_tokens_decoder", "chat_template")
FIELDS += ("extra_special_tokens", "eos_token", "tokenizer_class", "auto_map", "model", "added_tokens", "decoder")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**40) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=3,
)
fuzz = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = save(tiny("llama"), tmp_path_factory.mktemp("whole") / "folder")
    tiny_tokenizer().save(folder)
    write_gguf(folder.parent / "model.gguf", tiny("llama"), metadata=byte_pair_metadata("gpt-2"))
    return folder.parent


def use(path):
    said = ""
    try:
        files = resolve(str(path))
        tokenizer = files.tokenizer()
        tokenizer.decode(tokenizer.encode("the <|im_start|>é"))
        if tokenizer.chat_template is not None:
            tokenizer.apply_chat([{"role": "user", "content": "a"}])
        load_model(files, dtype="float32")
    except UserError as error:
        said = str(error)
    assert "\n" not in said


def broken(content, places):
    """The bytes with some of them changed, and cut where a place says so."""
    for place, byte in places:
        at = place % len(content)
        content = content[:at] if byte is None else content[:at] + bytes([byte]) + content[at + 1 :]
        content = content or b"x"
    return content


PLACES = st.lists(st.tuples(st.integers(0, 6000), st.none() | st.integers(0, 255)), min_size=1, max_size=3)


@fuzz
@given(name=st.sampled_from(FILES[:4]), field=st.sampled_from(FIELDS), value=VALUES)
def test_any_value_in_any_field(whole, tmp_path, name, field, value):
    shutil.copytree(whole / "folder", tmp_path / "folder", dirs_exist_ok=True)
    file = tmp_path / "folder" / name
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {field: value}), encoding="utf-8")
    use(tmp_path / "folder")


@fuzz
@given(name=st.sampled_from(FILES), places=PLACES)
def test_any_byte_of_a_folder(whole, tmp_path, name, places):
    shutil.copytree(whole / "folder", tmp_path / "folder", dirs_exist_ok=True)
    file = tmp_path / "folder" / name
    file.write_bytes(broken(file.read_bytes(), places))
    use(tmp_path / "folder")


@fuzz
@given(places=PLACES)
def test_any_byte_of_a_gguf_file(whole, tmp_path, places):
    (tmp_path / "model.gguf").write_bytes(broken((whole / "model.gguf").read_bytes(), places))
    use(tmp_path / "model.gguf")
