"""The tokenizer inside a GGUF file, rebuilt with the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from specattn_jax.errors import UserError
from specattn_jax.loading.gguf import GGUFSource
from specattn_jax.loading.tokenizer import ROLES, Tokenizer, make_tokenizer

# Values of tokenizer.ggml.token_type.
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# ruff: noqa: RUF001
# Latin, Greek, Cyrillic, Armenian and Georgian letters that have upper and lower case, as DeepSeek's list has them.
_CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄ"
    "ῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲"
    "𑢠-𑣟𞤀-𞥃"
)
_EASTERN = "[一-龥ࠀ-一가-\ud7ff]+"
# Words in which a change from lower to upper case begins a new piece.
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASES = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+%(ending)s|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*%(ending)s"
    r"|\p{N}%(digits)s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre: the expressions that cut the text, one after the other, before byte pairs are merged (llama.cpp,
# src/llama-vocab.cpp, where they stand as in the models' own tokenizer.json). What lies between two matches is a piece
# of its own.
_CUTS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_WORDS,),
    "smollm": (r"\p{N}", _WORDS),
    "llama-bpe": (_MODERN.format(digits="{1,3}"),),
    "smaug-bpe": (_MODERN.format(digits="{1,3}"),),
    "qwen2": (_MODERN.format(digits=""),),
    # Accents and other marks belong to the letters before them.
    "qwen35": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "tekken": (_CASES % {"ending": "", "digits": ""},),
    "gpt-4o": (_CASES % {"ending": "(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "digits": "{1,3}"},),
    "deepseek-llm": (
        "[\r\n]",
        rf"\s?[{_CASED}]+",
        r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
        r"\s+$",
        _EASTERN,
        r"\p{N}+",
    ),
    "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EASTERN, r"\p{N}"),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _WORDS, r"[0-9][0-9][0-9]"),
    "seed-coder": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
_ALIASES = {
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "lfm2"), "llama-bpe"),
    **dict.fromkeys(("dbrx", "glm4", "chatglm-bpe"), "smaug-bpe"),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez"), "qwen2"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "smollm"),
    **dict.fromkeys(("mpt", "olmo", "jais", "trillion", "phi-2"), "gpt-2"),
    "llama4": "gpt-4o",
}
# These take a word that is a token whole, even where no sequence of merges leads to it, and add a begin token where the
# file does not say.
_WHOLE_WORDS = ("llama-bpe", "tekken")


def gguf_tokenizer(source: GGUFSource) -> Tokenizer:
    """Rebuilds the tokenizer of a GGUF file.

    Raises:
        UserError: the file has none, or one of a kind that we do not know.
    """
    kind = source.metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"{source.path}: tokenizer.ggml.model is {kind!r}; expected gpt2 (byte pairs) or llama (SentencePiece)."
        )
    tokens = _listed(source, "tokenizer.ggml.tokens")
    types = _listed(source, "tokenizer.ggml.token_type", default=[1] * len(tokens))
    # Unused tokens only pad the vocabulary to the size of the embedding.
    vocab = {token: i for i, (token, type_) in enumerate(zip(tokens, types, strict=False)) if type_ != _UNUSED}
    backend = _byte_pairs(source, vocab) if kind == "gpt2" else _sentence_piece(source, vocab)
    backend.add_tokens(
        [
            AddedToken(token, special=types[i] == _CONTROL, normalized=False)
            for token, i in vocab.items()
            if types[i] in (_CONTROL, _USER_DEFINED)
        ]
    )
    roles = {
        role: _token(source, tokens, key) for role, key in zip(ROLES, ("bos", "eos", "unknown", "padding"), strict=True)
    }
    _add_template(source, backend, roles, kind)
    ends = [_id(source, key) for key in ("eos", "eot", "eom")]
    template = source.metadata.get("tokenizer.chat_template")
    return make_tokenizer(backend, roles, (end for end in ends if end is not None), template)


def _listed(source: GGUFSource, key: str, default: Sequence[Any] | None = None) -> Sequence[Any]:
    found: Sequence[Any] | None = source.metadata.get(key, default)
    if not found:
        raise UserError(f"{source.path}: metadata {key} is missing or empty; expected a model with its tokenizer.")
    return found


def _id(source: GGUFSource, key: str) -> int | None:
    return source.metadata.get(f"tokenizer.ggml.{key}_token_id")


def _token(source: GGUFSource, tokens: Sequence[str], key: str) -> str | None:
    index = _id(source, key)
    return tokens[index] if index is not None and index < len(tokens) else None


def _cuts(source: GGUFSource) -> tuple[str, tuple[str, ...]]:
    name = source.metadata.get("tokenizer.ggml.pre", "default")
    name = _ALIASES.get(name, name)
    if name not in _CUTS:
        raise UserError(
            f"{source.path}: tokenizer.ggml.pre is {name!r}; expected one of {', '.join(_CUTS)}; "
            "use the Hugging Face folder of this model instead."
        )
    return name, _CUTS[name]


def _byte_pairs(source: GGUFSource, vocab: dict[str, int]) -> Backend:
    """GPT-2's kind: bytes written as printable characters, merged in the order of the list."""
    merges = [tuple(pair.split(" ", 1)) for pair in _listed(source, "tokenizer.ggml.merges")]
    name, cuts = _cuts(source)
    backend = Backend(models.BPE(vocab, merges, ignore_merges=name in _WHOLE_WORDS))
    if name in ("qwen2", "qwen35"):
        backend.normalizer = normalizers.NFC()
    split = [pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in cuts]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(source: GGUFSource, vocab: dict[str, int]) -> Backend:
    """Llama 2's kind: spaces written as U+2581, pieces merged by score, bytes for what is unknown."""
    scores = _listed(source, "tokenizer.ggml.scores")
    unknown = next((token for token, index in vocab.items() if index == _id(source, "unknown")), None)
    backend = Backend(models.BPE(vocab, _merges(vocab, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = source.metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges(vocab: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece merges whichever neighbours make the best token; as a list, best first."""
    pairs = [
        (piece[:cut], piece[cut:], piece)
        for piece in vocab
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    pairs.sort(key=lambda pair: (-scores[vocab[pair[2]]], vocab[pair[0]], vocab[pair[1]]))
    return [(left, right) for left, right, _ in pairs]


def _add_template(source: GGUFSource, backend: Backend, roles: dict[str, str | None], kind: str) -> None:
    """Makes `encode` add the begin and end tokens that the model was trained with."""
    # Defaults of llama.cpp where the file does not say.
    begins = kind == "llama" or _cuts(source)[0] in _WHOLE_WORDS
    bos = roles["bos_token"] if source.metadata.get("tokenizer.ggml.add_bos_token", begins) else None
    eos = roles["eos_token"] if source.metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if bos is None and eos is None:
        return
    before, after = [bos] if bos else [], [eos] if eos else []
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *[f"{token}:1" for token in before], "$B:1", *[f"{token}:1" for token in after]],
        special_tokens=[(token, backend.token_to_id(token)) for token in (*before, *after)],
    )
