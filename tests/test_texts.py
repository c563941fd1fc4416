"""Text files as editors really write them, as prompts, for calibration and for perplexity."""

from __future__ import annotations

import gzip
import io
import sys
import types

import pytest
from command import mistake, run
from hypothesis import given
from hypothesis import strategies as st

from specattn_jax.cli.terminal import read_stdin
from specattn_jax.errors import UserError
from specattn_jax.texts import decode_text, read_text, without_final_newline

BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    file, pack = tmp_path / name, gzip.compress if name.endswith("gz") else bytes
    file.write_bytes(pack(BOM + "é a\ufeffb\r\nc\r\n".encode()))
    # Only the first counts, and lines keep their own ends.
    assert read_text(file) == "é a\ufeffb\r\nc\r\n"
    file.write_bytes(pack(BOM + b" \r\n"))
    with pytest.raises(UserError, match="is empty"):
        read_text(file)


def test_stdin_is_read_as_files_are(monkeypatch):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(BOM + b"hello\r\n")))
    assert read_stdin() == "hello\r\n"
    # Closed by whoever started the program.
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="stdin is closed"):
        read_stdin()


@given(text=st.text(max_size=8), end=st.sampled_from(["", "\n", "\r\n", "\r"]))
def test_the_final_line_end_is_removed_whole_and_once(text, end):
    if end == "\n" and text.endswith("\r"):
        end = ""
    if end == "":
        text = text.rstrip("\r\n")
    assert without_final_newline(text + end) == text


def test_where_bytes_are_no_text():
    with pytest.raises(UserError, match=r"x is not valid UTF-8: byte 0xff at offset 4 \(line 2\); convert it to UTF-8"):
        decode_text(BOM + b"\n\xff", "x")
    with pytest.raises(UserError, match=r"offset 0 \(line 1\) \(it begins like UTF-16\); convert it"):
        decode_text("hello".encode("utf-16"), "x")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_wide_characters_without_a_mark_are_no_text(encoding):
    # They are valid UTF-8, of which no model makes sense.
    with pytest.raises(UserError, match=r"x is no text in UTF-8: .* bytes are zero, as in UTF-16; convert it to UTF-8"):
        decode_text("Call me Ishmael.\n".encode(encoding), "x")
    assert decode_text(b"Call\0me", "x") == "Call\0me"


@pytest.mark.parametrize("content", [b"Call me", b"Call me\n", b"Call me\r\n", BOM + b"Call me", BOM + b"Call me\r\n"])
def test_a_prompt_file_is_its_text(tmp_path, tiny_folders, content):
    (tmp_path / "prompt.txt").write_bytes(content)
    models = ["--target", tiny_folders.target, "--draft", tiny_folders.draft, "--mode", "autoregressive"]
    for source, stdin in ((tmp_path / "prompt.txt", b""), ("-", content)):
        options = ["--max-new-tokens", 1, "--json", "--prompt-file", source]
        result = run("generate", *models, *options, stdin=stdin)
        assert '"prompt_tokens": 7,' in result.stdout
    assert "not valid UTF-8" in mistake("generate", *models, "--prompt-file", "-", stdin=b"a\xff")
