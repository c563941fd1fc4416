"""From prompts to the state in which decoding starts: token ids, lengths, and both models' reading of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from specattn_jax.decoding.speculative import DecodeSettings, DecodeState, start_decoding
from specattn_jax.errors import UserError
from specattn_jax.loading.memory import check_memory
from specattn_jax.loading.pair import ModelPair
from specattn_jax.models.cache import init_cache
from specattn_jax.models.transformer import LanguageModel, prefill


class Clock:
    """Sums wall time by kind, waiting for the device at each lap."""

    def __init__(self) -> None:
        self.seconds = {"compile_s": 0.0, "prefill_s": 0.0, "decode_s": 0.0}
        self._last = time.perf_counter()

    def lap(self, kind: str, value: object = None) -> float:
        """Adds, and returns, the time since the last lap, once `value` is there."""
        jax.block_until_ready(value)
        now = time.perf_counter()
        passed = now - self._last
        self.seconds[f"{kind}_s"] += passed
        self._last = now
        return passed


def encode_prompt(pair: ModelPair, prompt: str | Sequence[int], index: int) -> list[int]:
    """Token ids of one prompt."""
    tokens = pair.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
    if not tokens:
        raise UserError(f"prompt {index + 1} is empty; expected at least one token.")
    size = pair.target.config.vocab_size
    if not all(0 <= token < size for token in tokens):
        raise UserError(f"prompt {index + 1} has a token id outside the vocabulary; expected ids from 0 to {size - 1}.")
    return tokens


def check_lengths(pair: ModelPair, encoded: list[list[int]], max_new_tokens: int) -> None:
    """Refuses what cannot fit either model's context."""
    if not encoded:
        raise UserError("prompts is empty; expected at least one prompt.")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; expected at least 1.")
    context = min(pair.target.config.max_context, pair.draft.config.max_context)
    longest = max(len(tokens) for tokens in encoded)
    if longest >= context:
        raise UserError(f"The prompt has {longest} tokens, but the context of {pair.name} is {context}; shorten it.")
    if longest + max_new_tokens > context:
        raise UserError(
            f"max_new_tokens is {max_new_tokens}, but after a prompt of {longest} tokens the context of {pair.name}, "
            f"{context}, leaves room for {context - longest}; ask for fewer tokens."
        )


def prefill_both(
    target: LanguageModel,
    draft: LanguageModel | None,
    encoded: list[list[int]],
    max_new_tokens: int,
    settings: DecodeSettings,
    seed: int,
    chunk: int,
    clock: Clock,
    on_prefill: Callable[[int, int], None] | None,
) -> DecodeState:
    """Reads the prompts with both models and returns the state in which decoding starts."""
    lengths = np.array([len(tokens) for tokens in encoded], np.int32)
    batch, longest = len(encoded), max(map(len, encoded))
    chunk = min(chunk, _round_up(longest, 64))
    padded = _round_up(longest, chunk)
    # A window may write W + 1 entries beyond the last token that is kept.
    slots = _round_up(max(padded, longest + max_new_tokens + settings.tokens_per_window), 128)
    tokens = np.zeros((batch, padded), np.int32)
    for row, prompt in zip(tokens, encoded, strict=True):
        row[: len(prompt)] = prompt
    models = {"target": target} | ({} if draft is None else {"draft": draft})
    check_memory(
        {
            f"the KV cache of the {role}": model.config.cache_bytes(batch, slots, model.dtype.itemsize)
            for role, model in models.items()
        }
    )

    def read(model: LanguageModel, offset: int) -> tuple[Float[Array, "B D"], object]:
        def progress(position: int) -> None:
            clock.lap("compile" if position == 0 else "prefill")
            if on_prefill is not None:
                on_prefill(offset + position, padded * len(models))

        cache = init_cache(model.config, batch, slots, model.dtype)
        return prefill(model, jnp.asarray(tokens), jnp.asarray(lengths), cache, chunk=chunk, progress=progress)

    hidden, target_cache = read(target, 0)
    draft_cache = None if draft is None else read(draft, padded)[1]
    key = jax.random.key(seed)
    state = start_decoding(
        target,
        hidden,
        target_cache,
        draft_cache,
        jnp.asarray([prompt[-1] for prompt in encoded], jnp.int32),
        jnp.full((batch,), max_new_tokens, jnp.int32),
        jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(batch)),
        settings=settings,
        room=max_new_tokens,
    )
    clock.lap("prefill", state)
    return state


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
