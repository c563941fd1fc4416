"""Tokenizers: those rebuilt from GGUF metadata, streaming, chat, comparison."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, pre_tokenizers
from transformers import AutoTokenizer, convert_slow_tokenizer
from transformers.models.qwen2 import tokenization_qwen2

from loading.tiny_gguf import write_gguf
from loading.tiny_models import save, tiny
from loading.tiny_tokenizer import CHAT, SPECIAL, backend, tiny_tokenizer
from specattn_jax.errors import UserError
from specattn_jax.loading import TextStream, check_compatible, get_preset, is_cached
from specattn_jax.loading.fetch import cached_path
from specattn_jax.loading.gguf import open_gguf, reader_class
from specattn_jax.loading.gguf_tokenizer import _ALIASES, _CUTS, gguf_tokenizer
from specattn_jax.loading.hf_tokenizer import hf_tokenizer
from specattn_jax.loading.tokenizer import make_tokenizer

TEXTS = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune,\nmust be in want.",
    "",
    "  two spaces, a tab\tand trailing newlines\r\n\n\n",
    "don't I'LL we've 3.14159 2025-11-23 0x1F 12345678",
    "naïve café — “quotes” … ½ ² ٣ 漢字かな 한국어 Ελληνικά עברית",
    "👩‍👩‍👧‍👦 🇫🇷 é \u0000\ufffd ​",
    "def f(x):\n    return x**2  # <|not special|>\n",
]


@pytest.fixture(scope="module")
def smollm2():
    file = get_preset("smollm2").target
    if not is_cached(file):
        pytest.skip("run `specattn fetch smollm2` first")
    return gguf_tokenizer(open_gguf(cached_path(file)))


@pytest.mark.smollm2
@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_round_trips(smollm2, text):
    assert smollm2.decode(smollm2.encode(text)) == text
    assert smollm2.encode(text) == smollm2.encode(text, add_special=False), "SmolLM2 begins without a special token"


@pytest.mark.smollm2
def test_smollm2_splits_digits_and_knows_its_special_tokens(smollm2):
    assert [smollm2.decode([i]) for i in smollm2.encode("in 2025")] == ["in", " ", "2", "0", "2", "5"]
    assert smollm2.vocab_size == 49152
    assert (smollm2.bos_id, smollm2.eos_ids) == (1, (0, 2))
    ids = smollm2.encode("<|im_start|>user\nHi<|im_end|>")
    assert (ids[0], ids[-1]) == (1, 2)
    assert smollm2.decode(ids) == "user\nHi"
    assert smollm2.decode(ids, skip_special=False) == "<|im_start|>user\nHi<|im_end|>"


@pytest.mark.smollm2
def test_smollm2_chat(smollm2):
    assert smollm2.apply_chat([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.smollm2
def test_smollm2_agrees_with_transformers_reading_the_same_gguf(smollm2, monkeypatch):
    path = cached_path(get_preset("smollm2").target)
    monkeypatch.setattr(gguf, "GGUFReader", reader_class())  # several times faster
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert {theirs.get_vocab()[token] for token in SPECIAL} == {0, 1, 2}
    # Transformers does not split digits there, so it is an oracle for the rest.
    texts = [text for text in TEXTS if not any(c.isnumeric() for c in text)]
    assert len(texts) >= 4
    for text in texts:
        assert smollm2.encode(text) == theirs.encode(text, add_special_tokens=False), text


def byte_pair_metadata(pre="gpt-2", **changes):
    tokens = sorted(backend().get_vocab().items(), key=lambda item: item[1])
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [token for token, _ in tokens],
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token, _ in tokens],
        "tokenizer.ggml.merges": ["t h", "th e"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHAT,
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def from_metadata(tmp_path, metadata):
    return gguf_tokenizer(open_gguf(write_gguf(tmp_path / "tiny.gguf", tiny("llama"), metadata=metadata)))


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["I", "'ll", " pay", " 12345", " €!!", "\n", "\n", "x", "  ", " y", "'", "LL"]),
        ("smollm", ["I", "'ll", " pay", " ", "1", "2", "3", "4", "5", " €!!", "\n", "\n", "x", "  ", " y", "'", "LL"]),
        ("llama-bpe", ["I", "'ll", " pay", " ", "123", "45", " €!!\n\n", "x", "  ", " y", "'LL"]),
        ("qwen2", ["I", "'ll", " pay", " ", "1", "2", "3", "4", "5", " €!!\n\n", "x", "  ", " y", "'LL"]),
        ("default", ["I", "'", "ll", " pay", " ", "123", "45", " €", "!!", "\n", "\n", "x", "  ", " y", "'", "LL"]),
    ],
)
def test_text_is_cut_as_the_pre_tokenizer_says(tmp_path, pre, pieces):
    tokenizer = from_metadata(tmp_path, byte_pair_metadata(pre))
    text = "I'll pay 12345 €!!\n\nx   y'LL"
    cut = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
    found = [text[start:end] for _, (start, end) in cut]
    assert "".join(found) == text
    assert found == pieces


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="ab'lt 12½٣.,\n\r\té漢🙂_", max_size=30))
def test_smollm_is_cut_as_by_its_published_tokenizer(smollm_cuts, text):
    published = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert smollm_cuts.pre_tokenize_str(text) == published.pre_tokenize_str(text)


@pytest.fixture(scope="module")
def smollm_cuts(tmp_path_factory):
    return from_metadata(tmp_path_factory.mktemp("smollm"), byte_pair_metadata("smollm")).backend.pre_tokenizer


VECTORS = json.loads((Path(__file__).parent / "llama_cpp_ids.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("pre", VECTORS["ids"])
def test_ids_are_those_of_llama_cpp(tmp_path, pre):
    """Ids that llama.cpp (node-llama-cpp 3.21.1) gave for a vocabulary whose merges reach across every cut."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *VECTORS["tokens"]]
    metadata = byte_pair_metadata(pre, tokens=tokens, token_type=[1] * len(tokens), merges=VECTORS["merges"])
    tokenizer = from_metadata(tmp_path, metadata | {"tokenizer.ggml.add_bos_token": False})
    assert len(VECTORS["texts"]) >= 40
    for text, ids in zip(VECTORS["texts"], VECTORS["ids"][pre], strict=True):
        assert tokenizer.encode(text) == ids, text


def test_every_pre_tokenizer_has_vectors():
    assert set(VECTORS["ids"]) == set(_CUTS)
    assert set(_ALIASES.values()) <= set(_CUTS)


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="abDL'lt 12½٣.,\n\r\té漢🙂_/ÉéΩж\u0301\u0308ก็", max_size=30))
@pytest.mark.parametrize("pre", ["qwen35", "tekken", "gpt-4o", "smaug-bpe"])
def test_cuts_with_marks_equal_those_of_transformers(marks, pre, text):
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    published = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(mapping.GGUF_PRE_TOKENIZER_SPLITS[pre]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    assert marks[pre].pre_tokenize_str(text) == published.pre_tokenize_str(text)


@pytest.fixture(scope="module")
def marks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("marks")
    names = ("qwen35", "tekken", "gpt-4o", "smaug-bpe")
    return {pre: from_metadata(folder, byte_pair_metadata(pre)).backend.pre_tokenizer for pre in names}


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="abDL'lt 12½٣.,\n\r\té漢🙂_", max_size=30))
@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe"])
def test_modern_cuts_equal_those_of_transformers(modern_cuts, pre, text):
    tik_token = inspect.signature(convert_slow_tokenizer.TikTokenConverter).parameters["pattern"].default
    pattern = {"qwen2": tokenization_qwen2.PRETOKENIZE_REGEX, "llama-bpe": tik_token}[pre]
    published = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    assert modern_cuts[pre].pre_tokenize_str(text) == published.pre_tokenize_str(text)


@pytest.fixture(scope="module")
def modern_cuts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modern")
    return {pre: from_metadata(folder, byte_pair_metadata(pre)).backend.pre_tokenizer for pre in ("qwen2", "llama-bpe")}


def test_byte_pairs_and_special_tokens_from_metadata(tmp_path):
    tokenizer = from_metadata(tmp_path, byte_pair_metadata("gpt-2"))
    expected = tiny_tokenizer()
    for text in ["the theory <|im_start|>of the thing", *TEXTS]:
        assert tokenizer.encode(text) == expected.encode(text)
    assert tokenizer.fingerprint() == expected.fingerprint()
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (0, 2))
    check_compatible(tokenizer, expected)


def test_begin_token_follows_the_metadata_and_llama3_has_it_by_default(tmp_path):
    assert from_metadata(tmp_path, byte_pair_metadata("gpt-2", add_bos_token=True)).encode("the")[0] == 1
    for pre in ("llama-bpe", "pixtral", "tekken"):
        assert from_metadata(tmp_path, byte_pair_metadata(pre)).encode("the")[0] == 1
    assert from_metadata(tmp_path, byte_pair_metadata("llama-bpe")).encode("the", add_special=False)[0] != 1
    assert from_metadata(tmp_path, byte_pair_metadata("llama-bpe", add_bos_token=False)).encode("the")[0] != 1


def test_unused_tokens_only_pad(tmp_path):
    metadata = byte_pair_metadata("gpt-2")
    metadata["tokenizer.ggml.tokens"] += ["[PAD0]", "[PAD1]"]
    metadata["tokenizer.ggml.token_type"] += [5, 5]
    padded = from_metadata(tmp_path, metadata)
    check_compatible(padded, tiny_tokenizer())
    assert padded.fingerprint() == tiny_tokenizer().fingerprint()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, r"tokenizer\.ggml\.model is 'bert'; expected gpt2 .* or llama"),
        ({"pre": "klingon"}, r"tokenizer\.ggml\.pre is 'klingon'; expected one of gpt-2, smollm"),
        ({"merges": None}, r"metadata tokenizer\.ggml\.merges is missing or empty"),
        ({"tokens": None}, r"metadata tokenizer\.ggml\.tokens is missing or empty"),
    ],
)
def test_tokenizers_we_do_not_know(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        from_metadata(
            tmp_path, byte_pair_metadata() | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
        )


PIECES = ["▁", "a", "b", "c", "ab", "▁a", "bc", "abc", "▁ab", "ca", "▁▁", "cab", "▁abc"]
SCORES = [-30.0, -31.0, -32.0, -33.0, -4.0, -1.0, -2.0, -3.0, -5.0, -6.0, -7.0, -8.0, -9.0]


def sentence_piece_metadata(**changes):
    control = ["<unk>", "<s>", "</s>"]
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*control, *byte_pieces, *PIECES],
        "tokenizer.ggml.scores": [0.0] * 259 + SCORES,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(PIECES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def sentence_piece_oracle(text):
    """SentencePiece's algorithm, written out: merge the neighbours that make the best-scored piece, leftmost first."""
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        best = max(
            (
                (SCORES[PIECES.index(parts[i] + parts[i + 1])], -i)
                for i in range(len(parts) - 1)
                if parts[i] + parts[i + 1] in PIECES
            ),
            default=None,
        )
        if best is None:
            return [
                index
                for part in parts
                for index in ([259 + PIECES.index(part)] if part in PIECES else [3 + byte for byte in part.encode()])
            ]
        parts[-best[1] : 2 - best[1]] = [parts[-best[1]] + parts[1 - best[1]]]


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory):
    return from_metadata(tmp_path_factory.mktemp("spm"), sentence_piece_metadata())


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="abc é🙂\n", max_size=24))
def test_sentence_piece_equals_its_algorithm(sentence_piece, text):
    ids = sentence_piece.encode(text)
    assert ids == [1, *sentence_piece_oracle(text)]
    assert sentence_piece.decode(ids) == text


def test_sentence_piece_details(tmp_path, sentence_piece):
    assert sentence_piece.eos_ids == (2,)
    assert sentence_piece.encode("a<s>")[-1] == 1, "special tokens are recognised in the text"
    bare = from_metadata(tmp_path, sentence_piece_metadata(add_space_prefix=False, add_bos_token=False))
    assert bare.encode("abc") == [259 + PIECES.index("abc")]
    assert bare.decode(bare.encode(" abc")) == " abc"
    ended = from_metadata(tmp_path, sentence_piece_metadata(add_eos_token=True))
    assert ended.encode("a")[-1] == 2


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="abc é🙂漢\n", max_size=30), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=30))
@pytest.mark.parametrize("kind", ["byte pairs", "sentence piece"])
def test_streaming_gives_the_same_text_in_whole_characters(sentence_piece, kind, text, sizes):
    tokenizer = tiny_tokenizer() if kind == "byte pairs" else sentence_piece
    ids = tokenizer.encode(text)
    stream, pieces, start = TextStream(tokenizer), [], 0
    for size in (*sizes, *[1] * len(ids)):
        pieces.append(stream.push(ids[start : start + size]))
        start += size
        assert "".join(pieces) == text[: len("".join(pieces))]
    assert "".join(pieces) + stream.flush() == text
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("skip_special", [True, False])
@pytest.mark.parametrize("kind", ["byte pairs", "sentence piece", "sentence piece, no prefix"])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_streamed_text_of_any_ids_is_their_decoding(bare_sentence_piece, sentence_piece, kind, skip_special, data):
    tokenizer = {"byte pairs": tiny_tokenizer(), "sentence piece": sentence_piece}.get(kind, bare_sentence_piece)
    # Bytes of broken and of whole characters, often side by side, with other tokens and special ones in between.
    first = tokenizer.backend.token_to_id("<0x00>") if kind != "byte pairs" else None
    favourites = [first + byte for byte in (0xC3, 0xA9, 0xF0, 0x9F, 0x99, 0x82, 0x20, 0x41, 0xFF)] if first else []
    some = st.sampled_from([*favourites, 0, 1, 2]) | st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(some, max_size=20))
    stream, pieces, start = TextStream(tokenizer, skip_special), [], 0
    while start < len(ids):
        size = data.draw(st.integers(1, 4))
        pieces.append(stream.push(ids[start : start + size]))
        start += size
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special)


@pytest.fixture(scope="module")
def bare_sentence_piece(tmp_path_factory):
    return from_metadata(tmp_path_factory.mktemp("bare"), sentence_piece_metadata(add_space_prefix=False))


@pytest.mark.parametrize("text", ["<s>a b", "<s>", "<s><s>a", "a<s>", "", "<s> a</s>"])
@pytest.mark.parametrize("ends", [False, True])
def test_a_text_that_begins_itself_gets_no_second_begin_token(tmp_path, ends, text):
    tokenizer = from_metadata(tmp_path, sentence_piece_metadata(add_eos_token=ends))
    plain = tokenizer.encode(text, add_special=False)
    begin = [] if text.startswith("<s>") else [1]
    assert tokenizer.encode(text) == [*begin, *plain, *([2] if ends else [])]
    if text.startswith("<s>"):
        assert plain[0] == 1


def test_a_chat_prompt_given_as_text_begins_once(tmp_path):
    chat = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = from_metadata(tmp_path, sentence_piece_metadata() | {"tokenizer.chat_template": chat})
    prompt = tokenizer.apply_chat([{"role": "user", "content": "a b"}])
    assert tokenizer.encode(prompt) == tokenizer.encode(prompt, add_special=False)
    assert tokenizer.encode(prompt)[0] == 1
    # Where nothing is added, nothing is taken away.
    bare = from_metadata(tmp_path, sentence_piece_metadata(add_bos_token=False))
    assert bare.encode("<s><s>a")[:2] == [1, 1]


def test_streaming_emits_a_character_as_soon_as_it_is_whole():
    tokenizer = tiny_tokenizer()
    stream, ids = TextStream(tokenizer), tokenizer.encode("🙂!")
    assert [stream.push([i]) for i in ids] == ["", "", "", "🙂", "!"]
    for i in ids[:2]:
        assert stream.push([i]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_no_chat_template_and_refused_messages():
    plain = make_tokenizer(backend(), {}, [], None)
    with pytest.raises(UserError, match="has no chat template"):
        plain.apply_chat([{"role": "user", "content": "hi"}])
    picky = make_tokenizer(backend(), {}, [], "{{ raise_exception('no system role') }}")
    with pytest.raises(UserError, match="no system role"):
        picky.apply_chat([{"role": "system", "content": "hi"}])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[0]['content'] + 1 }}", "fails on them (TypeError: "),
        ("{{ 1 / 0 }}", "fails on them (ZeroDivisionError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails on them (RecursionError: "),
        ("{{ range(10 ** 10) | list }}", "fails on them (OverflowError: "),
        ("{% if %}", "refuses them ("),
        ("{{ missing.more }}", "refuses them ("),
    ],
)
def test_a_chat_template_that_fails_is_one_sentence(template, said):
    broken = make_tokenizer(backend(), {}, [], template)
    with pytest.raises(UserError, match=f"chat template {re.escape(said)}") as error:
        broken.apply_chat([{"role": "user", "content": "hi"}])
    assert "\n" not in str(error.value)


def test_different_tokenizers_are_refused_with_the_first_difference():
    with pytest.raises(UserError, match=r"token 259 is 'th' for the draft and 'he' for the target"):
        check_compatible(tiny_tokenizer(), tiny_tokenizer(merges=("h e", "t he")))
    with pytest.raises(UserError, match=r"token 260 is 'the' for the draft and absent for the target"):
        check_compatible(tiny_tokenizer(), tiny_tokenizer(merges=("t h",)))
    assert tiny_tokenizer().fingerprint() != tiny_tokenizer(merges=("t h",)).fingerprint()


def added(*tokens, special=True):
    made = backend()
    made.add_tokens([AddedToken(token, special=special, normalized=False) for token in tokens])
    return make_tokenizer(made, {}, [], None)


@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_after_the_others_last_are_no_difference(special):
    plain, longer = tiny_tokenizer(), added("<|tool|>", "<|call|>", special=special)
    assert check_compatible(plain, tiny_tokenizer()) is None
    assert check_compatible(longer, plain) == plain.vocab_size
    assert check_compatible(plain, longer) is None
    with pytest.raises(UserError, match=r"token 261 is '<\|tool\|>' for the draft and '<\|call\|>' for the target"):
        check_compatible(longer, added("<|call|>", "<|tool|>"))


def test_end_tokens_are_gathered_from_every_file(tmp_path):
    folder = save(tiny("llama"), tmp_path)
    tiny_tokenizer().save(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert hf_tokenizer(folder).eos_ids == (0, 2, 7, 9)
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert hf_tokenizer(folder).eos_ids == (0, 2, 7)


def test_folders_without_a_readable_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer\.json; expected a model folder with its tokenizer"):
        hf_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: is not a readable tokenizer"):
        hf_tokenizer(tmp_path)


@pytest.mark.parametrize("ids", ["7", [[7]], 7.5, True])
def test_end_ids_of_another_kind_are_one_sentence(tmp_path, ids):
    tiny_tokenizer().save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is .*; expected a token id or a list"):
        hf_tokenizer(tmp_path)


def test_minus_one_means_no_end_token(tmp_path):
    tiny_tokenizer().save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": -1}))
    assert hf_tokenizer(tmp_path).eos_ids == (0, 2)
