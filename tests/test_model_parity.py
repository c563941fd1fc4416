"""Our decoder against transformers': the same logits from the same files, whichever way the tokens are read."""

from __future__ import annotations

import functools
import lzma
from importlib import resources
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loading.tiny_models import CONFIGS, LENGTH, reference_logits, save, tiny, tokens, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from specattn_jax.loading import check_compatible, get_preset, is_cached, load_model, resolve
from specattn_jax.loading.fetch import cached_path
from specattn_jax.loading.gguf import reader_class
from specattn_jax.loading.hf import open_hf
from specattn_jax.loading.tensors import build_model
from specattn_jax.models.cache import KVCache
from specattn_jax.models.forward import forward, prefill
from specattn_jax.models.transformer import LanguageModel

TOLERANCE = 1e-3
PIECES = {"one chunk": LENGTH, "chunks": 128, "four at a time": 4, "one at a time": 1}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """By name: our model, read from the files that transformers wrote, and the logits of theirs."""

    @functools.cache
    def pair(name):
        theirs = reference_logits(tiny(name), tokens())
        assert theirs.std() > 0.3, "the oracle's logits must not be flat"
        folder = save(tiny(name), tmp_path_factory.mktemp(name.replace("-", "_")))
        return build_model(open_hf(folder), jnp.float32), theirs

    return pair


@functools.partial(jax.jit, static_argnames="piece")
def read(model: LanguageModel, ids: jax.Array, piece: int) -> jax.Array:
    """Logits of every position, `piece` tokens per call, the cache carried along."""
    batch, length = ids.shape
    cache = KVCache.empty(model.config, batch, length, model.dtype)

    def step(cache, chunk):
        hidden, cache, *_ = forward(model, chunk, cache)
        return cache, model.logits(hidden)

    _, logits = jax.lax.scan(step, cache, ids.reshape(batch, -1, piece).swapaxes(0, 1))
    return logits.swapaxes(0, 1).reshape(batch, length, -1)


def assert_same(ours, theirs):
    ours = np.asarray(ours)
    assert np.abs(ours - theirs).max() <= TOLERANCE
    # Where transformers' two best tokens lie closer than the tolerance, either is right.
    best = np.sort(theirs, axis=-1)
    clear = best[..., -1] - best[..., -2] > 2 * TOLERANCE
    assert clear.mean() > 0.98
    np.testing.assert_array_equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])


# Each piece compiles a program of its own; one family is read in all of them, the others in one that uses the cache.
@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        (name, pieces) if pieces == "chunks" or name == "qwen3" else pytest.param(name, pieces, marks=pytest.mark.slow)
        for name in CONFIGS
        for pieces in PIECES
    ],
)
def test_logits_equal_transformers(pairs, name, pieces):
    model, theirs = pairs(name)
    assert_same(read(model, jnp.asarray(tokens()), PIECES[pieces]), theirs)


def test_prefill_returns_each_prompts_last_hidden_state(pairs):
    model, theirs = pairs("qwen2")
    lengths = np.array([300, 512], np.int32)
    cache = KVCache.empty(model.config, 2, LENGTH, jnp.float32)
    hidden, cache = prefill(model, jnp.asarray(tokens()), jnp.asarray(lengths), cache, chunk=128)
    np.testing.assert_array_equal(cache.lengths, lengths)
    assert_same(model.logits(hidden), theirs[np.arange(2), lengths - 1])


@pytest.mark.slow
@pytest.mark.smollm2
def test_smollm2_equals_transformers_reading_the_same_gguf(monkeypatch):
    file = get_preset("smollm2").target
    if not is_cached(file):
        pytest.skip("run `specattn fetch smollm2` first")
    path = cached_path(file)
    # Three times faster than the library's, which transformers uses twice.
    monkeypatch.setattr(gguf, "GGUFReader", reader_class())
    text = lzma.decompress(
        (resources.files("specattn_jax") / "data/books/valid/pride_and_prejudice.txt.xz").read_bytes()
    )
    model, tokenizer = load_model("smollm2", dtype=jnp.float32)
    # From the middle of the book: the beginning is a table of contents.
    ids = np.array([tokenizer.encode(text.decode()[200_000:204_000])[:LENGTH]], np.int32)
    assert ids.shape == (1, LENGTH)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    expected = reference_logits(theirs, ids)
    assert_same(read(model, jnp.asarray(ids), 128), expected)
    log_probs = np.asarray(jax.nn.log_softmax(expected[0, :-1]))
    perplexity = np.exp(-log_probs[np.arange(LENGTH - 1), ids[0, 1:]].mean())
    assert 8 < perplexity < 40, "the text must be read as English"


@pytest.mark.slow
@pytest.mark.parametrize("role", ["target", "draft"])
def test_the_coder_pair_equals_transformers_reading_the_same_gguf(monkeypatch, role):
    """Float32 logits of 256 tokens of Python source. The target takes 13 GB, one model after the other."""
    file = getattr(get_preset("qwen2.5-coder"), role)
    if not is_cached(file):
        pytest.skip("run `specattn fetch qwen2.5-coder` first")
    path = cached_path(file)
    monkeypatch.setattr(gguf, "GGUFReader", reader_class())
    files = resolve({"target": "qwen2.5-coder", "draft": "qwen2.5-coder:draft"}[role])
    tokenizer = files.tokenizer()
    source = Path(functools.__file__).read_text(encoding="utf-8")
    ids = np.array([tokenizer.encode(source)[1000:1256]], np.int32)
    assert ids.shape == (1, 256)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    expected = reference_logits(theirs, ids)
    del theirs
    model, _ = load_model(files, dtype=jnp.float32)
    assert_same(read(model, jnp.asarray(ids), 128), expected)
    log_probs = np.asarray(jax.nn.log_softmax(expected[0, :-1]))
    perplexity = np.exp(-log_probs[np.arange(255), ids[0, 1:]].mean())
    assert perplexity < 12, "the text must be read as Python"
    text = "def f(x):\n\treturn 'naïve', 12345  # <|not special|>\r\n"
    assert tokenizer.encode(text) == AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).encode(text)
    check_compatible(tokenizer, resolve("qwen2.5-coder").tokenizer())
