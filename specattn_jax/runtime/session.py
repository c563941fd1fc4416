"""The only door to decoding: models with their caches, from prompts to a state that a strategy works on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Key
from specattn_kernels import Implementation

from specattn_jax.decoding import loop
from specattn_jax.decoding.protocol import DecodeSettings, Models, Strategy
from specattn_jax.decoding.sampling import choose, is_sound, penalise
from specattn_jax.decoding.state import DecodeState, begin
from specattn_jax.loading.memory import check_memory
from specattn_jax.models.cache import KVCache, Reach, round_up
from specattn_jax.models.forward import prefill
from specattn_jax.models.sharding import device_cache_bytes, fetch
from specattn_jax.models.transformer import LanguageModel
from specattn_jax.runtime.clock import Clock

# What the activations of a prefill may take. More tokens at a time make products no faster; on a CPU they would leave
# the caches.
_ACTIVATION_BYTES, _ACTIVATION_BYTES_ON_CPU = 3 << 29, 16 << 20
# How far back a draft sees while it prefills, unless somebody says otherwise (docs/results.md says what that costs).
DRAFT_REACH = Reach(4096)
# A chunk is a multiple of so many tokens.
CHUNK_STEP = 64


@dataclasses.dataclass(frozen=True)
class Session:
    """Opened by everything that decodes: generation, evaluation, training data and benchmarks.

    Attributes:
        models: target, and the draft if there is one.
        implementation: backend of the attention ops of both; None lets the library choose.
        draft_reach: how far back the draft's tokens see in a prefill; None is everything. It is there to point, not to
            be right, and its attention over a long prompt is a large part of the bill.
    """

    models: Models
    implementation: Implementation | None = None
    draft_reach: Reach | None = None

    def of(self, strategy: Strategy) -> Models:
        """The models that a strategy works with."""
        return self.models if strategy.needs_draft else dataclasses.replace(self.models, draft=None)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        *,
        settings: DecodeSettings | None = None,
        window: int = 0,
        with_draft: bool = True,
        with_prompt: bool = False,
        keys: Key[Array, " B"] | None = None,
        chunk: int | None = None,
        clock: Clock | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        memory: Memory | None = None,
    ) -> DecodeState:
        """Reads the prompts; the target chooses the first new token of each.

        Prompts are padded on the right: what the padding writes lies beyond their lengths, where nobody attends and
        the next tokens overwrite it.

        Args:
            prompts: token ids of each.
            new_tokens: most new tokens per prompt, at least 1.
            settings: how the first token is drawn, and where sequences end.
            window: drafted tokens of the longest window for which there has to be room.
            with_draft: whether the draft, if there is one, reads the prompts too.
            with_prompt: whether the state holds the prompts' tokens.
            keys: one random key per sequence; those of seed 0 by default.
            chunk: prompt tokens read at a time; without it whole prompts where activations fit, else the largest equal
                parts that do.
            clock: told what took how long.
            on_prefill: receives positions read and positions to read.
            memory: what the caches hold already of the prompts' beginnings; they are donated.

        Raises:
            UserError: the device has not enough memory.
        """
        settings, clock = settings or DecodeSettings(), clock or Clock()
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        batch, longest = len(prompts), int(lengths.max())
        models = {"target": self.models.target}
        if with_draft and self.models.draft is not None:
            models["draft"] = self.models.draft
        memory = Memory() if memory is None else memory
        kept = memory.take(prompts)
        extent = max(longest, memory.slots)
        chunk = chunk or memory.chunk or _largest_chunk(models.values(), batch, extent)
        most = min(chunk, round_up(extent, CHUNK_STEP))
        reaches = {"target": None, "draft": self.draft_reach}
        # What is in reach is read anew with every chunk: chunks that are longer than it cost more than they save.
        chunks = {
            role: most if reach is None else min(most, round_up(reach.recent, CHUNK_STEP))
            for role, reach in reaches.items()
        }
        positions = {role: round_up(longest, chunks[role]) for role in models}
        # A window may write W + 1 entries beyond the last token that is kept.
        slots = round_up(max(*positions.values(), extent, longest + new_tokens + window + 1), 128)
        check_memory(
            {
                f"the KV cache of the {role}": device_cache_bytes(
                    model.config, batch, slots, model.dtype.itemsize, model.split
                )
                for role, model in models.items()
                if role not in kept
            }
        )
        read: dict[str, tuple[Float[Array, "B D"], KVCache]] = {}
        for role, model in models.items():

            def progress(position: int, before: int = sum(positions[done] for done in read)) -> None:
                clock.lap("compile" if position == 0 else "prefill")
                if on_prefill is not None:
                    on_prefill(before + position, sum(positions.values()))

            if role in kept:
                least = memory.chunk or CHUNK_STEP
                read[role] = _read_on(model, kept[role], prompts, slots, chunks[role], least, reaches[role], progress)
                continue
            read[role] = prefill(
                model,
                _padded(prompts, positions[role]),
                jnp.asarray(lengths),
                KVCache.empty(model.config, batch, slots, model.dtype, self.implementation, model.split),
                chunk=chunks[role],
                reach=reaches[role],
                progress=progress,
            )
        hidden, target_cache = read["target"]
        state = _begin(
            self.models.target,
            hidden,
            target_cache,
            read["draft"][1] if "draft" in read else None,
            jnp.asarray([prompt[-1] for prompt in prompts], jnp.int32),
            jnp.full((batch,), new_tokens, jnp.int32),
            seed_keys(0, batch) if keys is None else keys,
            self._history(prompts) if settings.sampling.minds_history else None,
            _padded(prompts, target_cache.num_slots) if with_prompt else None,
            settings=settings,
            room=max(new_tokens, memory.new_tokens) + window + 1,
        )
        clock.lap("prefill", state)
        return state

    def _history(self, prompts: Sequence[Sequence[int]]) -> Bool[Array, "B V"]:
        """Which tokens each prompt holds."""
        held = np.zeros((len(prompts), self.models.target.config.vocab_size), np.bool_)
        for row, prompt in zip(held, prompts, strict=True):
            row[list(prompt)] = True
        return jnp.asarray(held)

    def start(self, strategy: Strategy, state: DecodeState) -> DecodeState:
        """The state with what the strategy keeps for itself; `state` is donated."""
        return loop.start(strategy, self.of(strategy), state)

    def decode(self, strategy: Strategy, state: DecodeState, windows: int) -> DecodeState:
        """Decodes to the end, or so many windows, without touching the host; `state` is donated."""
        return loop.decode(strategy, self.of(strategy), state, jnp.int32(windows))

    def watch(self, strategy: Strategy, state: DecodeState, windows: int, keep: loop.Keep) -> tuple[DecodeState, Any]:
        """Decodes so many windows, and keeps something of each; `state` is donated."""
        return loop.watch(strategy, self.of(strategy), state, keep, windows=windows)


def seed_keys(seed: int, batch: int) -> Key[Array, " B"]:
    """One key per sequence; that of a sequence does not depend on how many others there are."""
    key = jax.random.key(seed)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(batch))


@dataclasses.dataclass
class Memory:
    """What sequences hold between two calls of `generate`: caches, and the tokens in them.

    Attributes:
        slots: entries per sequence that caches have room for from the start. Calls that need no more share programs.
        new_tokens: likewise, new tokens of a call.
        chunk: likewise, prompt tokens that are read at a time, however few there are; 0: as many as fit, and no more
            than there are.
        tokens: what was read and written so far, of each sequence.
        caches: by role, each with lengths that are known to hold these tokens.
        prefilled: tokens of the last prompts that had to be read, by role.
    """

    slots: int = 0
    new_tokens: int = 0
    chunk: int = 0
    tokens: list[list[int]] = dataclasses.field(default_factory=list)
    caches: dict[str, KVCache] = dataclasses.field(default_factory=dict)
    prefilled: dict[str, int] = dataclasses.field(default_factory=dict)

    def take(self, prompts: Sequence[Sequence[int]]) -> dict[str, KVCache]:
        """The caches, rolled back to what they share with the prompts; they belong to the caller from now on."""
        shared = [begin_alike(held, prompt) for held, prompt in zip(self.tokens, prompts, strict=bool(self.tokens))]
        taken, self.prefilled = {}, {}
        for role, cache in self.caches.items():
            # A prompt's last token is always read: what comes next is chosen by it.
            most = np.array([len(prompt) - 1 for prompt in prompts], np.int32)
            lengths = np.minimum(np.minimum(shared, fetch(cache.lengths)), most).astype(np.int32)
            taken[role] = cache.at(jnp.asarray(lengths))
            self.prefilled[role] = sum(map(len, prompts)) - int(lengths.sum())
        self.caches, self.tokens = {}, []
        return taken

    def keep(self, state: DecodeState, tokens: list[list[int]]) -> None:
        """Keeps the caches of a finished state, which nobody else may use any more.

        Args:
            state: where decoding ended.
            tokens: of each sequence, its prompt and what was made of it.
        """
        self.tokens = tokens
        self.caches = {"target": state.target_cache}
        if state.draft_cache is not None:
            self.caches["draft"] = state.draft_cache


def begin_alike(held: Sequence[int], prompt: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    differ = (index for index, (a, b) in enumerate(zip(held, prompt, strict=False)) if a != b)
    return next(differ, min(len(held), len(prompt)))


def _padded(prompts: Sequence[Sequence[int]], width: int) -> Int32[Array, "B width"]:
    """Prompts of any lengths in one array, padded on the right."""
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(tokens)


def _read_on(
    model: LanguageModel,
    cache: KVCache,
    prompts: Sequence[Sequence[int]],
    slots: int,
    chunk: int,
    least: int,
    reach: Reach | None,
    progress: Callable[[int], None],
) -> tuple[Float[Array, "B D"], KVCache]:
    """Reads what a cache does not yet hold of its prompts, in chunks of some multiple of `least` tokens."""
    begun = fetch(cache.lengths)
    rests = [prompt[int(first) :] for prompt, first in zip(prompts, begun, strict=True)]
    longest = max(map(len, rests))
    chunk = min(chunk, round_up(longest, least))
    padded = _padded(rests, round_up(longest, chunk))
    return prefill(
        model,
        padded,
        jnp.asarray([len(rest) for rest in rests], jnp.int32),
        cache.with_room(round_up(max(slots, int(begun.max()) + padded.shape[1]), 128)),
        chunk=chunk,
        reach=reach,
        progress=progress,
    )


@functools.partial(jax.jit, static_argnames=("settings", "room"), donate_argnames=("target_cache", "draft_cache"))
def _begin(
    target: LanguageModel,
    hidden: Float[Array, "B D"],
    target_cache: KVCache,
    draft_cache: KVCache | None,
    last_prompt_token: Int32[Array, " B"],
    limit: Int32[Array, " B"],
    keys: Key[Array, " B"],
    history: Bool[Array, "B V"] | None,
    prompt: Int32[Array, "B S"] | None,
    *,
    settings: DecodeSettings,
    room: int,
) -> DecodeState:
    """State after prefill: the first new token is the target's own, from the prompt's last hidden state."""
    split = jax.vmap(jax.random.split)(keys)
    logits = target.logits(hidden)
    first, _ = choose(split[:, 0], penalise(logits, history, settings.sampling), settings.sampling)
    return begin(
        target_cache,
        draft_cache,
        jnp.stack([last_prompt_token, first], axis=1),
        limit,
        split[:, 1],
        room=room,
        stop_tokens=settings.stop_tokens,
        sound=is_sound(logits),
        history=history,
        prompt=prompt,
    )


def _largest_chunk(models: Iterable[LanguageModel], batch: int, longest: int) -> int:
    """Tokens of each prompt that are read at a time, so that activations fit and all parts are equally long."""
    room = _ACTIVATION_BYTES_ON_CPU if jax.default_backend() == "cpu" else _ACTIVATION_BYTES
    each = batch * max(model.config.activation_bytes(model.dtype.itemsize) for model in models)
    parts = -(-longest // max(room // each, CHUNK_STEP))
    return round_up(-(-longest // parts), CHUNK_STEP)
