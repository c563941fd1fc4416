"""Conversations: what was said is not read again, and the terminal's commands."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from command import run

from specattn_jax.cli import chat
from specattn_jax.decoding import loop
from specattn_jax.errors import UserError
from specattn_jax.models import forward
from specattn_jax.runtime.generate import generate
from specattn_jax.runtime.request import Request
from specattn_jax.runtime.session import Memory
from specattn_jax.selection.alignment import Alignment

TURNS = ["Call me Ishmael. ", "Some years ago, never mind how long precisely, ", "I went"]


@pytest.mark.parametrize(
    "mode", [*(pytest.param(other, marks=pytest.mark.slow) for other in ("autoregressive", "speculative")), "specattn"]
)
def test_every_turn_is_as_if_all_had_been_read_anew(tiny_pair, mode):
    memory, history = Memory(), list[int]()
    for turn in TURNS:
        history += tiny_pair.tokenizer.encode(turn, add_special=False)
        before = sum(map(len, memory.tokens))
        got = generate(tiny_pair, [history], mode=mode, max_new_tokens=11, memory=memory).results[0]
        assert got.tokens == generate(tiny_pair, [history], mode=mode, max_new_tokens=11).results[0].tokens
        if before:
            # The last token of an answer was never read, and the draft may be one more behind.
            new = len(history) - before
            assert memory.prefilled["target"] == new + 1
            assert memory.prefilled.get("draft", new + 1) in (new + 1, new + 2)
        history += got.tokens


def test_a_history_that_changed_is_read_from_there(tiny_pair):
    memory, first = Memory(), tiny_pair.tokenizer.encode("abcdefgh")
    generate(tiny_pair, [first], mode="speculative", max_new_tokens=24, memory=memory)
    other = [*first[:4], *tiny_pair.tokenizer.encode("xyz", add_special=False)]
    got = generate(tiny_pair, [other], mode="speculative", max_new_tokens=24, memory=memory).results[0]
    assert got.tokens == generate(tiny_pair, [other], mode="speculative", max_new_tokens=24).results[0].tokens
    assert memory.prefilled["target"] == len(other) - 4
    with pytest.raises(UserError, match="prompts holds 2, but memory 1 sequences"):
        generate(tiny_pair, [other, other], memory=memory)


@pytest.mark.slow
def test_sequences_of_a_batch_are_asked_again_in_another_mode(tiny_pair):
    prompts = [tiny_pair.tokenizer.encode(text) for text in ("abcdefgh" * 5, "xyz", "Call me Ishmael. " * 3)]
    memory = Memory(slots=400, new_tokens=20)
    for mode in ("autoregressive", "specattn", "specattn"):
        got = generate(tiny_pair, prompts, mode=mode, max_new_tokens=9, memory=memory).results
        # Of as many slots, so that it is the same program.
        new = Memory(slots=400, new_tokens=20)
        alone = generate(tiny_pair, prompts, mode=mode, max_new_tokens=9, memory=new).results
        assert [one.tokens for one in got] == [one.tokens for one in alone]
        assert memory.caches["target"].num_slots == 512
    assert memory.prefilled == {"target": 3, "draft": 3}


def test_turns_share_their_programs(tiny_pair, monkeypatch):
    monkeypatch.setattr(
        type(tiny_pair.tokenizer), "apply_chat", lambda _, messages: "".join(m["content"] for m in messages)
    )
    longer = dataclasses.replace(tiny_pair.target.config, max_context=4096)
    target = dataclasses.replace(tiny_pair.target, config=longer)
    pair = dataclasses.replace(tiny_pair, target=target, draft=None, alignment=None)
    conversation = chat._Conversation(pair, Request(max_new_tokens=20, mode="autoregressive"))
    programs: list[Any] = [forward._prefill_chunks, loop.decode]
    compiled = []
    for line in ("Call me Ishmael.", "Some years ago, never mind how long precisely, " * 5, "I went"):
        assert conversation.hear(line)
        compiled.append([program._cache_size() for program in programs])
    # The first turn begins with an empty cache, the next one with a kept cache, and so on as that.
    assert compiled[2] == compiled[1]
    assert compiled[1][1] == compiled[0][1]
    assert [chat._room_for(tokens) for tokens in (1, 832, 833, 4000, 9000)] == [1024, 1024, 2048, 8192, 12288]


def test_the_terminal(tiny_pair, monkeypatch):
    monkeypatch.setattr(
        type(tiny_pair.tokenizer), "apply_chat", lambda _, messages: "".join(m["content"] for m in messages)
    )
    monkeypatch.setattr("specattn_jax.loading.pair.load_pair", lambda *_, **__: tiny_pair)
    lines = b"/saved\nHello\n/mode speculative\nAnd then?\n/saved\n/mode wrong\n/nothing\n/reset\nHello\n/quit\nnever\n"
    done = run("chat", "--max-new-tokens", 6, "--mode", "autoregressive", stdin=lines)
    assert done.exit_code == 0
    said = done.stderr
    for words in (
        "nothing was answered yet", "mode speculative", "speculative: 0.0% of cache reads saved", "had to be read",
        "mode is 'wrong'", "/nothing is no command",
    ):  # fmt: skip
        assert words in " ".join(said.split())
    first, again = (tiny_pair.tokenizer.decode(_answer(tiny_pair)) for _ in range(2))
    assert done.stdout.count(first) >= 2
    assert first == again


@pytest.fixture
def talk(tiny_pair, monkeypatch):
    """A conversation with the tiny pair, whose template is what was said and nothing else."""
    monkeypatch.setattr(
        type(tiny_pair.tokenizer), "apply_chat", lambda _, messages: "".join(m["content"] for m in messages)
    )
    monkeypatch.setattr("specattn_jax.loading.pair.load_pair", lambda *_, **__: tiny_pair)
    return lambda lines, *options: run("chat", "--mode", "autoregressive", *options, stdin=lines)


def test_what_is_said_is_read_as_files_are(talk, monkeypatch):
    heard = list[str]()

    def hear(_, line):
        heard.append(line)
        return True

    monkeypatch.setattr(chat._Conversation, "hear", hear)
    done = talk(b"\xef\xbb\xbfHello\r\n\xff\xfe\r\n \n\xc3\xa9")
    assert done.exit_code == 0
    assert heard == ["Hello", "é"]
    assert "Error: what you said is not valid UTF-8: byte 0xff at offset 0" in done.stderr


def test_what_makes_answers_doubtful_is_said_once_a_conversation(talk, monkeypatch):
    monkeypatch.setattr(Alignment, "doubt", lambda *_: "this text is long.")
    done = talk(b"Hello\n/mode specattn\nHello\nHello\n/reset\nHello\n", "--max-new-tokens", 4)
    assert done.exit_code == 0
    assert done.stderr.count("note: this text is long.") == 2


def test_a_conversation_ends_with_the_context_and_begins_anew(talk, tiny_pair):
    context = tiny_pair.target.config.max_context
    long = b"a" * (context - 5)
    done = talk(long + b"\nb\n/reset\nb\n", "--max-new-tokens", 8)
    assert done.exit_code == 0
    said = " ".join(done.stderr.split())
    assert f"(the context of {context} tokens is full; /reset begins anew)" in said
    assert f"but the context of {tiny_pair.target_name} is {context}; say less, or begin anew with /reset." in said
    assert done.stdout.count("\n") >= 2


def test_what_cannot_be_a_conversation(talk, tiny_pair, monkeypatch):
    assert "--max-new-tokens is 0; expected at least 1." in talk(b"Hello\n", "--max-new-tokens", 0).stderr
    alone = dataclasses.replace(tiny_pair, draft=None, alignment=None)
    monkeypatch.setattr("specattn_jax.loading.pair.load_pair", lambda *_, **__: alone)
    assert "but mode speculative needs one" in talk(b"Hello\n", "--mode", "speculative", "--draft", "none").stderr
    changed = talk(b"/mode speculative\n/mode specattn\n/saved\n", "--draft", "none")
    assert (changed.exit_code, changed.stderr.count("Error: ")) == (0, 2)
    wordless = dataclasses.replace(alone, tokenizer=dataclasses.replace(alone.tokenizer, chat_template=None))
    monkeypatch.setattr("specattn_jax.loading.pair.load_pair", lambda *_, **__: wordless)
    done = talk(b"Hello\n", "--draft", "none")
    assert done.exit_code == 1
    assert "has no chat template; name a chat model, or use `generate`." in done.stderr


def test_ctrl_c_never_ends_a_conversation(talk, tiny_pair, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        # Before the model is asked.
        patched.setattr(type(tiny_pair.tokenizer), "encode_chat", interrupted)
        done = talk(b"Hello\n/saved\n/quit\n")
    assert done.exit_code == 0
    assert "nothing was answered yet" in done.stderr


def _answer(pair):
    prompt = pair.tokenizer.encode("Hello", add_special=False)
    return generate(pair, [prompt], mode="autoregressive", max_new_tokens=6).results[0].tokens


def test_stopping_an_answer_stops_nothing_else(tiny_pair, monkeypatch):
    monkeypatch.setattr(type(tiny_pair.tokenizer), "apply_chat", lambda _, messages: messages[-1]["content"])
    monkeypatch.setattr("specattn_jax.loading.pair.load_pair", lambda *_, **__: tiny_pair)
    real, calls = chat._Conversation._answer, list[str]()

    def answer(self, line):
        if not calls:
            calls.append(line)
            monkeypatch.setattr("specattn_jax.runtime.generate.generate", interrupted)
            real(self, line)
            monkeypatch.undo()
            return
        real(self, line)

    def interrupted(*_, on_text, **__):
        on_text(0, "so far")
        raise KeyboardInterrupt

    monkeypatch.setattr(chat._Conversation, "_answer", answer)
    done = run("chat", "--mode", "autoregressive", stdin=b"Hello\n/quit\n")
    assert done.exit_code == 0
    assert done.stdout == "so far\n"
    assert "(stopped)" in done.stderr
