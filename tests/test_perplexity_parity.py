"""Perplexity with full attention against transformers', on the same tokens."""

from __future__ import annotations

import json
import lzma
from importlib import resources

import gguf
import numpy as np
import pytest
from command import run
from loading.tiny_models import reference_logits, torch
from transformers import AutoModelForCausalLM

from specattn_jax.evaluation.documents import cut_documents
from specattn_jax.evaluation.forced import read_documents
from specattn_jax.loading import get_preset
from specattn_jax.loading.fetch import cached_path
from specattn_jax.loading.gguf import reader_class

TOLERANCE = 1e-3


def their_perplexity(model, documents, first: int, count: int) -> float:
    """Of `count` tokens of each document from place `first` on, in float64."""
    ids = np.asarray(documents)
    logits = reference_logits(model, ids).astype(np.float64)[:, first - 1 : first - 1 + count]
    top = logits.max(-1, keepdims=True)
    log_probs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return float(np.exp(-np.take_along_axis(log_probs, ids[:, first : first + count, None], -1).mean()))


def test_full_perplexity_equals_transformers(tiny_pair, tiny_folders, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It is a truth universally acknowledged, that a single man in possession of a good fortune. " * 9)
    pair = ["--target", tiny_folders.target, "--draft", tiny_folders.draft, "--alignment", tiny_folders.alignment]
    shape = ["--context", 128, "--prefill", 0.25, "--documents", 3, "--batch", 2, "--methods", "full"]
    assert run("perplexity", *pair, "--text", text, *shape, "--out", tmp_path / "out").exit_code == 0
    row = json.loads((tmp_path / "out" / "table.json").read_text())[0]
    documents = cut_documents([tiny_pair.tokenizer.encode(text.read_text(), add_special=False)], 128, 3)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_folders.target, dtype=torch.float32).eval()
    # A quarter is prefilled, and the token after it is the newest one before the first window.
    expected = their_perplexity(theirs, documents, 33, row["tokens"] // 3)
    assert row["perplexity"] == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.smollm2
def test_full_perplexity_of_smollm2_equals_transformers(smollm2, monkeypatch):
    path = cached_path(get_preset("smollm2").target)
    # Three times faster than the library's, which transformers uses twice.
    monkeypatch.setattr(gguf, "GGUFReader", reader_class())
    book = resources.files("specattn_jax") / "data/books/valid/pride_and_prejudice.txt.xz"
    ids = smollm2.tokenizer.encode(lzma.decompress(book.read_bytes()).decode()[200_000:202_000])[:256]
    ours = read_documents(smollm2.target, smollm2.draft, None, [ids], prefill_share=0.5)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    expected = their_perplexity(theirs, [ids], 129, ours.tokens)
    assert 5 < expected < 60, "the text must be read as English"
    assert ours.perplexity == pytest.approx(expected, rel=TOLERANCE)
