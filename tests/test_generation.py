"""Text in, text out: what Python users see around the loop."""

from __future__ import annotations

import pytest

from specattn_jax.generation import generate


@pytest.mark.parametrize("mode", ["autoregressive", "specattn"])
def test_text_arrives_in_pieces_of_whole_characters(tiny_pair, mode):
    pieces = {0: [], 1: []}
    run = generate(
        tiny_pair,
        ["naïve 日本語", "🙂"],
        mode=mode,
        max_new_tokens=24,
        temperature=1.0,
        windows_per_call=1,
        on_text=lambda index, text: pieces[index].append(text),
    )
    for index, result in enumerate(run.results):
        assert "".join(pieces[index]) == result.text
        assert len(pieces[index]) > 1
