"""One tokenizer for every kind of checkpoint: text to ids and back, chat prompts, streaming, comparison."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import models

from specattn_jax.errors import UserError
from specattn_jax.files import first_line

# Tokens that end a generation in one chat format or another. They count only where the tokenizer marks them as special.
_END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>", "</s>")
# The longest text that transformers shortens is " n't": a space may go until so many characters have followed it.
_TIDIED = 3
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to token ids and back.

    Attributes:
        backend: the tokenizer proper.
        roles: the special tokens by what they are for (`bos_token`, `eos_token`, `unk_token`, `pad_token`).
        eos_ids: every id that ends a generation, ascending.
        chat_template: Jinja source of the chat format, if the model has one.
        wrapped: transformers' tokenizer around `backend`, where it was read by transformers: it knows what else its
            folder says (further keys for the chat template, how to tidy decoded text). None is made when first needed.
    """

    backend: Backend
    roles: Mapping[str, str]
    eos_ids: tuple[int, ...]
    chat_template: str | None = None
    wrapped: Any = dataclasses.field(default=None, repr=False)

    @property
    def vocab_size(self) -> int:
        """Number of tokens. The model's vocabulary may be larger: it is often padded."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text, whether or not `encode` adds it."""
        token = self.roles.get("bos_token")
        return None if token is None else self.backend.token_to_id(token)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of `text`; with `add_special`, with the begin token that the model was trained with, if any.

        A text that begins with that token already, as chat prompts do, gets no second one.
        """
        encoded = self.backend.encode(text, add_special_tokens=add_special)
        ids = list(encoded.ids)
        # The mask is 1 at what was added, 0 at a special token that stands in the text.
        added = next((index for index, mark in enumerate(encoded.special_tokens_mask) if not mark), len(ids))
        return ids[added:] if ids[added : 2 * added] == ids[:added] else ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`."""
        decoder = self.backend if self.wrapped is None else self.wrapped
        return str(decoder.decode(list(ids), skip_special_tokens=skip_special))

    def apply_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt that asks the model for the next message of a conversation.

        Encode it with `add_special=False`: the template writes the special tokens itself.

        Raises:
            UserError: the model has no chat format, or it refuses these messages.
        """
        if self.chat_template is None:
            raise UserError("messages: this model has no chat template; give it plain text, or use a chat model.")
        from jinja2 import TemplateError

        try:
            return str(
                self._wrapped.apply_chat_template(
                    [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
                )
            )
        except TemplateError as error:
            raise UserError(
                f"messages: the model's chat template refuses them ({first_line(error)}); expected its roles."
            ) from error
        except Exception as error:  # a template is a program, and may fail in any way
            raise UserError(
                f"messages: the model's chat template fails on them ({type(error).__name__}: {first_line(error)}); use "
                "a sound one, or give plain text."
            ) from error

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of the prompt that asks the model for the next message of a conversation.

        Raises:
            UserError: as `apply_chat`.
        """
        return self.encode(self.apply_chat(messages), add_special=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each id completes, special tokens included; joined, they are the decoding of all ids."""
        stream = TextStream(self, skip_special=False)
        pieces = [stream.push([index]) for index in ids]
        if pieces:
            pieces[-1] += stream.flush()
        return pieces

    def save(self, folder: Path) -> None:
        """Writes the tokenizer as Hugging Face does; `generation_config.json` holds the ids that end a generation."""
        self._wrapped.save_pretrained(folder)
        generation = {"eos_token_id": list(self.eos_ids), "bos_token_id": self.bos_id}
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")

    def fingerprint(self) -> str:
        """A hash of all tokens with their ids: equal for tokenizers that may be used together."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(sorted(self._tokens.items())).encode()).hexdigest()

    @functools.cached_property
    def _tokens(self) -> dict[int, str]:
        return {index: token for token, index in self.backend.get_vocab(with_added_tokens=True).items()}

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that `decode` leaves out unless told otherwise."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @functools.cached_property
    def byte_ids(self) -> frozenset[int]:
        """The ids of single bytes (`<0xE9>`), where the tokenizer writes unknown characters with them."""
        decoder = self.backend.decoder
        if decoder is None or b"ByteFallback" not in decoder.__getstate__():
            return frozenset()
        return frozenset(index for index, token in self._tokens.items() if _BYTE_TOKEN.fullmatch(token))

    @functools.cached_property
    def tidies(self) -> bool:
        """Whether `decode` takes away spaces before punctuation, which some folders ask of transformers."""
        if not getattr(self.wrapped, "clean_up_tokenization_spaces", False):
            return False
        # Since transformers 5, byte pairs are tidied only where a folder insists.
        insists = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
        return not isinstance(self.backend.model, models.BPE) or bool(getattr(self.wrapped, insists, True))

    @functools.cached_property
    def _wrapped(self) -> Any:
        """The same as transformers wants it; only chat and saving need it."""
        if self.wrapped is not None:
            return self.wrapped
        return import_transformers().PreTrainedTokenizerFast(
            tokenizer_object=self.backend,
            chat_template=self.chat_template,
            clean_up_tokenization_spaces=False,
            **self.roles,
        )


def import_transformers() -> Any:
    """The transformers package, late because it takes seconds, without its remark that PyTorch is not installed."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def make_tokenizer(
    backend: Backend,
    roles: Mapping[str, str | None],
    eos_ids: Iterable[int],
    chat_template: str | Mapping[str, str] | None,
    wrapped: Any = None,
) -> Tokenizer:
    """A tokenizer, with what is known of the model's special tokens gathered into `eos_ids`.

    Of several chat templates, the one named "default" is taken.
    """
    # Some files ask for truncation or padding, meant for training.
    backend.no_truncation()
    backend.no_padding()
    known = {role: token for role, token in roles.items() if role in ROLES and token is not None}
    special = {token.content: index for index, token in backend.get_added_tokens_decoder().items() if token.special}
    ends = set(eos_ids) | {special[token] for token in _END_TOKENS if token in special}
    if (eos := known.get("eos_token")) is not None and (index := backend.token_to_id(eos)) is not None:
        ends.add(index)
    template = chat_template.get("default") if isinstance(chat_template, Mapping) else chat_template
    return Tokenizer(backend, known, tuple(sorted(ends)), template, wrapped)


def check_compatible(draft: Tokenizer, target: Tokenizer) -> int | None:
    """Checks that the draft's token ids mean the same to the target.

    Padding of the models' vocabularies does not matter here; the tokens must be the same. Only added tokens after the
    last id of the other may be known to one alone.

    Returns:
        The first id that the draft knows and the target does not, None where there is none. Such ids must never be
        proposed (`limit_vocabulary`).

    Raises:
        UserError: they are not; names the first token that differs.
    """
    ours, theirs = draft._tokens, target._tokens
    known_to_both = min(max(ours, default=-1), max(theirs, default=-1)) + 1
    added = draft.backend.get_added_tokens_decoder().keys() | target.backend.get_added_tokens_decoder().keys()
    for index in sorted(ours.keys() | theirs.keys()):
        if ours.get(index) != theirs.get(index) and not (index >= known_to_both and index in added):
            raise UserError(
                f"draft and target: token {index} is {_shown(ours.get(index))} for the draft and "
                f"{_shown(theirs.get(index))} for the target; expected the same tokenizer; choose a draft "
                "of the same family."
            )
    return min(ours.keys() - theirs.keys(), default=None)


def _shown(token: str | None) -> str:
    return "absent" if token is None else repr(token)


class TextStream:
    """Turns ids that arrive one by one into text that can be printed at once.

    A character may take several tokens; it is held back until it is complete. So are byte tokens until another token
    follows, because one broken byte decides about the text of its whole run, and spaces that what follows may take
    away. The pieces joined are the decoding of all ids, whatever the tokenizer does with spaces between words.

    Example:
        stream = TextStream(tokenizer)
        for ids in arriving:
            print(stream.push(ids), end="")
        print(stream.flush())
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        # Ids of the last piece that was emitted (its text decides about a space before the next) and of what follows.
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        """The text that is complete now that `ids` have arrived; often the empty string."""
        self._pending += ids
        text = self._text()
        # An unfinished character decodes to U+FFFD.
        return "" if text.endswith("\ufffd") or self._in_bytes() or self._at_space() else self._emit(text)

    def flush(self) -> str:
        """What is left at the end, an unfinished character included."""
        return self._emit(self._text())

    def _text(self) -> str:
        before = self._tokenizer.decode(self._context, self._skip_special)
        return self._tokenizer.decode(self._context + self._pending, self._skip_special)[len(before) :]

    def _in_bytes(self) -> bool:
        """Whether the last id that shows is a byte token, which the next one may belong to."""
        known = self._tokenizer.byte_ids
        hidden = self._tokenizer.special_ids if self._skip_special else frozenset()
        return next((index in known for index in reversed(self._pending) if index not in hidden), False)

    def _at_space(self) -> bool:
        """Whether what follows may take a space away."""
        if not self._tokenizer.tidies:
            return False
        untidied = self._tokenizer.backend.decode(self._context + self._pending, self._skip_special)
        return " " in untidied[-_TIDIED:]

    def _emit(self, text: str) -> str:
        if text:
            self._context, self._pending = self._pending, []
        return text
