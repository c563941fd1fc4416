"""Tokenizers as folders really hold them: ids, text, chat prompts and end tokens are those of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from loading.tiny_tokenizer import CHAT
from specattn_jax.errors import UserError
from specattn_jax.loading.hf_tokenizer import hf_tokenizer
from specattn_jax.loading.tokenizer import TextStream

SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
NEW = {"content": "<|new|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
DECODER = {"260": {**NEW, "special": True}, "261": {**NEW, "content": "<tool>", "special": False}}
WORDS = ["the", " the", "a", " ab", "hello", "\n", "  ", "\t", "é", "漢", "🙂", "12", "'ll", ".", " !", " n't", "_"]
WORDS += [*SPECIALS, "<|new|>", "<tool>", "<|end|>", "\u2581", "<0x41>", "A\u0301", "\u200b", "[UNK]"]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi é "}]


def byte_level(begin: str | None = "<s>") -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)}
    made = Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    if begin is not None:
        made.post_processor = begins_with(made, begin)
    return made


def begins_with(made: Tokenizer, begin: str) -> Any:
    return processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, made.token_to_id(begin))]
    )


def byte_fallback() -> Tokenizer:
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", "a", "b", "c", "▁a", "▁b", "ab"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b")]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    made.post_processor = begins_with(made, "<s>")
    return made


def unigram() -> Tokenizer:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁the", -3.0), ("▁a", -3.5), ("he", -4.0)]
    pieces += [(letter, -6.0 - index / 100) for index, letter in enumerate("abcdefhilnorst.!'12é")]
    made = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    made.post_processor = begins_with(made, "<s>")
    return made


def old_files(folder: Path) -> None:
    """vocab.json and merges.txt in place of tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    vocab = model["vocab"] | {token: 256 + index for index, token in enumerate(SPECIALS)} | {"th": 260, "the": 261}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    (folder / "tokenizer.json").unlink()


def sentence_piece(folder: Path) -> None:
    """tokenizer.model alone, made by the sentencepiece library."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    text = folder / "text.txt"
    text.write_text("the theory of the hello a ab abc naïve 12 345 'll\nab a the there is he\n" * 20)
    options = {"vocab_size": 300, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2, "unk_surface": " ⁇ "}
    trainer.train(input=str(text), model_prefix=str(folder / "tokenizer"), hard_vocab_limit=False, **options)
    for name in ("text.txt", "tokenizer.vocab", "tokenizer.json"):
        (folder / name).unlink()


def layout(settings_: dict[str, Any] | None = None, made: Any = byte_level, files: Any = None, family: str = "llama"):
    return {"settings": settings_ or {}, "made": made, "files": files or {}, "family": family}


FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LAYOUTS = {
    "byte level": layout(FAST | {"chat_template": CHAT}),
    "no begin token": layout(FAST, lambda: byte_level(None)),
    "added_tokens.json": layout(
        FAST | {"eos_token": "<|new|>", "chat_template": CHAT + "{{ eos_token }}"},
        files={"added_tokens.json": json.dumps({"<|new|>": 260, "<tool>": 261})},
    ),
    "added_tokens_decoder": layout(
        FAST | {"eos_token": "<|new|>", "added_tokens_decoder": DECODER, "chat_template": "<|new|>" + CHAT}
    ),
    "special_tokens_map.json": layout(
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        files={
            "special_tokens_map.json": json.dumps(
                {"bos_token": "<s>", "eos_token": NEW, "additional_special_tokens": ["<tool>"]}
            )
        },
    ),
    "named end token alone": layout(FAST | {"eos_token": "<|end|>"}),
    "additional_special_tokens": layout(FAST | {"additional_special_tokens": ["<|new|>", "<tool>"]}),
    "extra_special_tokens": layout(
        FAST | {"extra_special_tokens": {"tool_token": "<tool>"}, "chat_template": "{{ tool_token }}" + CHAT}
    ),
    "a key of the template": layout(FAST | {"my_token": "<|im_start|>", "chat_template": "{{ my_token }}" + CHAT}),
    "templates by name": layout(
        FAST | {"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHAT}]}
    ),
    "chat_template.jinja": layout(FAST | {"chat_template": "no"}, files={"chat_template.jinja": CHAT}),
    "additional_chat_templates": layout(
        FAST, files={"chat_template.jinja": CHAT, "additional_chat_templates/rag.jinja": "rag"}
    ),
    "begin and end token asked for": layout(
        FAST | {"add_bos_token": True, "add_eos_token": True}, lambda: byte_level(None)
    ),
    "special tokens split": layout(FAST | {"split_special_tokens": True}),
    "byte fallback": layout(LLAMA | {"chat_template": CHAT}, byte_fallback),
    "byte fallback, generic class": layout(FAST | {"unk_token": "<unk>"}, byte_fallback),
    "byte fallback, no prefix space": layout(LLAMA | {"add_prefix_space": False}, byte_fallback),
    "byte fallback, not legacy": layout(LLAMA | {"legacy": False, "add_bos_token": True}, byte_fallback),
    "unigram": layout(FAST | {"unk_token": "<unk>", "clean_up_tokenization_spaces": True}, unigram),
    "prefix space": layout({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, "bos_token": "<s>"}),
    "vocab.json and merges.txt": layout(
        {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": DECODER, "chat_template": CHAT},
        files=old_files,
        family="qwen2",
    ),
    "tokenizer.model alone": layout(LLAMA | {"chat_template": CHAT}, files=sentence_piece),
    "mistral": layout(LLAMA | {"chat_template": CHAT}, byte_fallback, family="mistral"),
}


def write(folder: Path, name: str) -> Path:
    kind = LAYOUTS[name]
    folder.mkdir()
    kind["made"]().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(kind["settings"]))
    (folder / "config.json").write_text(json.dumps({"model_type": kind["family"], "hidden_size": 64}))
    if callable(kind["files"]):
        kind["files"](folder)
    else:
        for file, content in kind["files"].items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(content)
    return folder


@pytest.fixture(scope="module", params=LAYOUTS)
def both(request, tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("layout") / "folder", request.param)
    return hf_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


# Four times 80 texts. A text that begins with its own begin token has a rule of its own.
TEXTS = st.lists(
    st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=4)), max_size=12)
    .map("".join)
    .filter(lambda text: not text.lstrip().startswith("<s>")),
    min_size=80,
    max_size=80,
)


@settings(max_examples=4, deadline=None)
@given(texts=TEXTS)
def test_ids_and_texts_are_those_of_transformers(both, texts):
    ours, theirs = both
    for text in texts:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.encode(text, add_special=False) == theirs.encode(text, add_special_tokens=False), text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_streamed_text_of_any_ids_is_their_decoding(both, data):
    ours, _ = both
    # Tokens that decoding may join or shorten, and any others.
    pointed = ours.encode(" . a !, n't ' s  he 're é🙂", add_special=False)
    ids = data.draw(st.lists(st.sampled_from(pointed) | st.integers(0, ours.vocab_size - 1), max_size=12))
    stream, pieces, start = TextStream(ours), [], 0
    while start < len(ids):
        size = data.draw(st.integers(1, 3))
        pieces.append(stream.push(ids[start : start + size]))
        start += size
    assert "".join(pieces) + stream.flush() == ours.decode(ids)


def test_end_tokens_and_chat_prompts_are_those_of_transformers(both):
    ours, theirs = both
    assert ours.vocab_size == len(theirs)
    assert ours.bos_id == theirs.bos_token_id
    if theirs.eos_token_id is not None:
        assert theirs.eos_token_id in ours.eos_ids
    if theirs.chat_template is None:
        with pytest.raises(UserError, match="has no chat template"):
            ours.apply_chat(MESSAGES)
        return
    prompt = ours.apply_chat(MESSAGES)
    assert prompt == theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    ids = theirs.apply_chat_template(MESSAGES, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert ours.encode(prompt, add_special=False) == ids


def test_saved_tokenizers_stay_what_they_are(both, tmp_path):
    ours, _ = both
    ours.save(tmp_path / "saved")
    again = hf_tokenizer(tmp_path / "saved")
    assert (again.fingerprint(), again.eos_ids, again.bos_id) == (ours.fingerprint(), ours.eos_ids, ours.bos_id)
    for text in ["the <|new|>a</s> <tool>é", " ab  a\n", "<|end|>b"]:
        assert again.encode(text) == ours.encode(text)
        assert again.decode(again.encode(text)) == ours.decode(ours.encode(text))
    if ours.chat_template is not None:
        assert again.apply_chat(MESSAGES) == ours.apply_chat(MESSAGES)


def test_an_end_token_outside_tokenizer_json_ends_a_generation(tmp_path):
    for name, index in (("added_tokens.json", 260), ("added_tokens_decoder", 260), ("named end token alone", 260)):
        tokenizer = hf_tokenizer(write(tmp_path / name, name))
        assert index in tokenizer.eos_ids
        token = {"named end token alone": "<|end|>"}.get(name, "<|new|>")
        assert tokenizer.encode(f"a{token}b", add_special=False) == [64 + 0, index, 65]
        assert tokenizer.decode([index], skip_special=False) == token


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "special tokens split"])
def test_no_second_begin_token(tmp_path, name):
    tokenizer = hf_tokenizer(write(tmp_path / "folder", name))
    begun = tokenizer.encode("<s>the a")
    assert begun[:1] == [tokenizer.backend.token_to_id("<s>")] or tokenizer.bos_id is None
    assert begun.count(begun[0]) == 1


def test_no_second_begin_token_after_a_sequence_of_processors(tmp_path):
    made = byte_level()
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), made.post_processor])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(FAST))
    tokenizer = hf_tokenizer(tmp_path)
    assert tokenizer.encode("a") == [256, 64]
    assert tokenizer.encode("<s>a") == [256, 64]


@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_is_printed(tmp_path, capfd, name):
    folder = write(tmp_path / "folder", name)
    capfd.readouterr()
    tokenizer = hf_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("a </s>"))
    assert capfd.readouterr() == ("", "")


def test_several_templates_without_a_default_are_no_template(tmp_path):
    folder = write(tmp_path / "folder", "no begin token")
    named = FAST | {"chat_template": [{"name": "rag", "template": "x"}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    with pytest.raises(UserError, match="has no chat template"):
        hf_tokenizer(folder).apply_chat(MESSAGES)


def test_tokenizer_model_without_its_library(tmp_path, monkeypatch):
    folder = write(tmp_path / "folder", "byte fallback")
    shutil.move(folder / "tokenizer.json", folder / "tokenizer.model")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"tokenizer\.model alone, which the sentencepiece package reads; install it"):
        hf_tokenizer(folder)
