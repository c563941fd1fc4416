"""Teacher-forced reading: known text through the draft, selection and verification of real decoding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32
from specattn_kernels import SelectionPlan

from specattn_jax.decoding.speculative import (
    DecodeSettings,
    DecodeState,
    plan_first_window,
    read_window,
    start_decoding,
)
from specattn_jax.errors import UserError
from specattn_jax.evaluation.learning import Learner, attend_plan, mass_read
from specattn_jax.models.cache import KVCache, init_cache
from specattn_jax.models.forward import forward, prefill
from specattn_jax.models.transformer import LanguageModel, LayerReader
from specattn_jax.selection.protocol import Selection
from specattn_jax.selection.TODO import head_fraction

_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Reading:
    """What reading documents cost, and how well they were predicted. B documents of one length.

    Attributes:
        tokens: tokens scored per document.
        nll: mean negative log-likelihood per token and document, in nats.
        kl: mean KL(full || this) of the next-token distributions, in nats; None without a reference.
        top1: how often the likeliest token is the full target's; None without a reference.
        read: share of the past that each layer read, averaged over windows and kv heads.
        head_read: the same for each kv head.
        mass: share of its own attention mass that each layer read; None unless it was measured.
        hidden: the target's hidden states before every scored token, window by window: a reference for other readings;
            None where many selections were read together.
    """

    tokens: int
    nll: Float[np.ndarray, " B"]
    kl: Float[np.ndarray, " B"] | None
    top1: Float[np.ndarray, " B"] | None
    read: Float[np.ndarray, "B L"]
    head_read: Float[np.ndarray, "B L K"]
    mass: Float[np.ndarray, "B L"] | None
    hidden: Float[Array, "windows B W D"] | None

    @property
    def perplexity(self) -> float:
        """Over all documents."""
        return float(np.exp(self.nll.mean()))

    @property
    def kv_reduction(self) -> float:
        """Share of the target's cache reads saved."""
        return float(1.0 - self.read.mean())


def read_documents(
    target: LanguageModel,
    draft: LanguageModel,
    selection: Selection | None,
    documents: Sequence[Sequence[int]],
    *,
    reference: Float[Array, "windows B W D"] | None = None,
    prefill_share: float = 0.1,
    window: int = 5,
    measure_mass: bool = False,
) -> Reading:
    """Prefills the first part of every document densely and reads the rest in teacher-forced windows.

    Each window is drafted, selected and read by the functions that decoding uses; but the drafted tokens are the text's
    own, and all of them count as accepted. The target's own token after a window, which decoding gets for nothing, is
    left to the next window. Up to W - 1 tokens at the end that fill no window are not scored.

    Args:
        target: the target.
        draft: the draft.
        selection: what the target reads; None reads everything, without drafting.
        documents: token ids, all of one length.
        reference: `hidden` of a dense reading of the same documents, to compare distributions with.
        prefill_share: share of each document that is prefilled.
        window: W.
        measure_mass: whether to measure the attention mass that is read, at the cost of attending densely too.

    Raises:
        UserError: the documents are too short for one window after the prefill, or longer than a model's context.
    """
    setting, state = _begin(target, draft if selection is not None else None, documents, prefill_share, window)
    if isinstance(selection, Learner):
        selection = selection.prepare(state.limit.shape[0], state.target_cache.num_slots)
    state, sums = _read_windows(
        target,
        draft,
        selection,
        state,
        setting.tokens,
        reference,
        prompt=setting.prompt,
        window=window,
        measure_mass=measure_mass,
    )
    return _summary(setting.windows, window, state.statistics.read, sums, sums["hidden"])


def read_together(
    target: LanguageModel,
    draft: LanguageModel,
    selections: Sequence[Selection],
    documents: Sequence[Sequence[int]],
    *,
    reference: Float[Array, "windows B W D"],
    prefill_share: float = 0.1,
    window: int = 5,
) -> list[Reading]:
    """`read_documents` for selections that differ only in their arrays: one compilation, and one batch of all of them.

    Pays on an accelerator; the memory for caches grows with the number of selections.

    Args:
        target: the target.
        draft: the draft.
        selections: of one kind, with equal shapes and static fields.
        documents: token ids, all of one length.
        reference: `hidden` of a dense reading of the same documents.
        prefill_share: share of each document that is prefilled.
        window: W.

    Returns:
        One reading for each selection, without hidden states.

    Raises:
        UserError: as `read_documents`.
    """
    setting, state = _begin(target, draft, documents, prefill_share, window)
    batch, slots = state.limit.shape[0], state.target_cache.num_slots
    ready = [one.prepare(batch, slots) if isinstance(one, Learner) else one for one in selections]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ready)
    shares, sums = _read_windows_of_each(
        target, draft, stacked, state, setting.tokens, reference, prompt=setting.prompt, window=window
    )
    return [
        _summary(setting.windows, window, shares[index], {name: value[index] for name, value in sums.items()}, None)
        for index in range(len(selections))
    ]


@functools.partial(jax.jit, static_argnames=("prompt", "window"))
def _read_windows_of_each(
    target: LanguageModel,
    draft: LanguageModel,
    stacked: Selection,
    state: DecodeState,
    tokens: Int32[Array, "B length"],
    reference: Float[Array, "windows B W D"],
    *,
    prompt: int,
    window: int,
) -> tuple[Float[Array, "n B L"], dict[str, Array]]:
    """`_read_windows` along the first axis of a selection's arrays: sums of shares read, and the other sums."""

    def one(selection: Selection) -> tuple[Float[Array, "B L"], dict[str, Array]]:
        end, sums = _read_windows(
            target, draft, selection, state, tokens, reference, prompt=prompt, window=window, measure_mass=False
        )
        return end.statistics.read, {name: value for name, value in sums.items() if name != "hidden"}

    return jax.vmap(one)(stacked)


class _Setting(NamedTuple):
    """Documents and how they are cut.

    Attributes:
        tokens: all documents.
        prompt: tokens prefilled.
        windows: windows read.
    """

    tokens: Int32[Array, "B length"]
    prompt: int
    windows: int


def _begin(
    target: LanguageModel,
    draft: LanguageModel | None,
    documents: Sequence[Sequence[int]],
    prefill_share: float,
    window: int,
) -> tuple[_Setting, DecodeState]:
    """Cuts the documents and prefills them.

    Raises:
        UserError: too short or too long, or the window is impossible.
    """
    settings = DecodeSettings("speculative", window)
    tokens = jnp.asarray(np.asarray(documents, np.int32))
    length = tokens.shape[1]
    prompt = max(2, round(length * prefill_share))
    limit = min(model.config.max_context for model in (target, draft) if model is not None)
    if not prompt + window + 1 <= length <= limit:
        raise UserError(
            f"context is {length}; expected at least {prompt + window + 1} tokens, for one window after the prefill, "
            f"and at most the models' {limit}."
        )
    setting = _Setting(tokens, prompt, (length - prompt - 1) // window)
    return setting, start_reading(target, draft, tokens[:, :prompt], length, settings)


def _summary(
    windows: int, window: int, read: Array, sums: dict[str, Array], hidden: Float[Array, "windows B W D"] | None
) -> Reading:
    """Means from sums over windows and tokens."""
    count = windows * window
    host = jax.device_get({name: value for name, value in sums.items() if name != "hidden"})
    return Reading(
        tokens=count,
        nll=host["nll"] / count,
        kl=host["kl"] / count if "kl" in host else None,
        top1=host["top1"] / count if "top1" in host else None,
        read=np.asarray(read) / windows,
        head_read=host["head_read"] / windows,
        mass=host["mass"] / windows if "mass" in host else None,
        hidden=hidden,
    )


def start_reading(
    target: LanguageModel,
    draft: LanguageModel | None,
    prompts: Int32[Array, "B prompt"],
    length: int,
    settings: DecodeSettings,
    seed: int = 0,
) -> DecodeState:
    """State after the prefill of both models.

    Args:
        target: the target.
        draft: the draft, or None where nothing is drafted.
        prompts: prompts of one length.
        length: tokens of a whole document, for which there will be room.
        settings: how it goes on.
        seed: of the random draws.
    """
    batch, prompt = prompts.shape
    padded = -(-prompt // _CHUNK) * _CHUNK
    slots = -(-max(padded, length + settings.tokens_per_window) // 128) * 128
    head = jnp.pad(prompts, ((0, 0), (0, padded - prompt)))
    lengths = jnp.full((batch,), prompt, jnp.int32)

    def read(model: LanguageModel) -> tuple[Array, KVCache]:
        cache = init_cache(model.config, batch, slots, model.dtype)
        return prefill(model, head, lengths, cache, chunk=_CHUNK)

    hidden, cache = read(target)
    return start_decoding(
        target,
        hidden,
        cache,
        None if draft is None else read(draft)[1],
        prompts[:, -1],
        jnp.full((batch,), length - prompt, jnp.int32),
        jax.random.split(jax.random.key(seed), batch),
        settings=settings,
        room=length - prompt,
    )


@functools.partial(jax.jit, static_argnames=("prompt", "window", "measure_mass"), donate_argnames=("state",))
def _read_windows(
    target: LanguageModel,
    draft: LanguageModel,
    selection: Selection | None,
    state: DecodeState,
    tokens: Int32[Array, "B length"],
    reference: Float[Array, "windows B W D"] | None,
    *,
    prompt: int,
    window: int,
    measure_mass: bool,
) -> tuple[DecodeState, dict[str, Array]]:
    """Reads on after the prompt, window by window; the state then, and sums over windows and tokens."""
    settings = DecodeSettings("speculative" if selection is None else "specattn", window)
    count = (tokens.shape[1] - prompt - 1) // window
    keys = state.keys
    if selection is not None:
        state = plan_first_window(draft, selection, state, settings)

    def step(
        carry: tuple[DecodeState, Selection | None], inputs: tuple[Int32[Array, ""], Float[Array, "B W D"] | None]
    ) -> tuple[tuple[DecodeState, Selection | None], dict[str, Array]]:
        (state, selection), (index, full) = carry, inputs
        # Committed so far: prompt + 1 + index * W tokens, the newest not yet in the target's cache.
        here = jax.lax.dynamic_slice_in_dim(tokens, prompt - 1 + index * window, window + 2, axis=1)
        past, before = state.target_cache.lengths, state.statistics
        seen = None
        if selection is None:
            out = forward(target, here[:, 1:], state.target_cache)
            hidden, grown, draft_cache = out.hidden, out.cache, None
            read = jnp.ones_like(before.read)
            mass: Float[Array, "B L"] | None = read
            plans: tuple[SelectionPlan | None, ...] = (None,) * read.shape[1]
        else:
            state = dataclasses.replace(state, last=here[:, :2])
            reader = _reader(selection, measure_mass)
            seen = read_window(target, draft, selection, state, keys, settings, forced=here[:, 2:], reader=reader)
            hidden, grown, draft_cache, read = seen.hidden, seen.cache, seen.drafted.cache, seen.read
            plans = seen.plans
            masses, learnt = zip(*seen.kept, strict=True) if seen.kept else ((), ())
            mass = jnp.stack(masses, axis=1) if measure_mass else None
            if isinstance(selection, Learner):
                selection, read = selection.learn(seen._replace(kept=learnt), past)
        scored = hidden[:, :-1]
        log_probs = jax.nn.log_softmax(target.logits(scored))
        result = {
            "nll": -jnp.sum(jnp.take_along_axis(log_probs, here[:, 2:, None], axis=-1), axis=(1, 2)),
            "head_read": head_fraction(plans, past, target.config.num_kv_heads),
        }
        if full is not None:
            wanted = jax.nn.log_softmax(target.logits(full))
            result["kl"] = jnp.sum(jnp.exp(wanted) * (wanted - log_probs), axis=(1, 2))
            result["top1"] = jnp.sum(jnp.argmax(wanted, axis=-1) == jnp.argmax(log_probs, axis=-1), axis=1)
        if measure_mass:
            assert mass is not None
            result["mass"] = mass
        state = dataclasses.replace(
            state,
            target_cache=grown.at_lengths(past + window),
            draft_cache=draft_cache,
            draft_plan=None if seen is None else seen.drafted.next_plan,
            statistics=dataclasses.replace(before, windows=before.windows + 1, read=before.read + read),
        )
        return (state, selection), {**result, "hidden": scored}

    (state, _), outputs = jax.lax.scan(step, (state, selection), (jnp.arange(count), reference))
    hidden = outputs.pop("hidden")
    return state, {**{name: jnp.sum(value, axis=0) for name, value in outputs.items()}, "hidden": hidden}


def _reader(selection: Selection, measure_mass: bool) -> LayerReader | None:
    """Attends as the selection wants it; keeps attention mass and what it learns from. None: as the model does."""
    learner = selection if isinstance(selection, Learner) else None
    if learner is None and not measure_mass:
        return None

    def attend(
        q: Float[Array, "B T N H"],
        keys: Float[Array, "B K S H"],
        values: Float[Array, "B K S H"],
        plan: SelectionPlan | None,
        lengths: Int32[Array, " B"],
    ) -> tuple[Float[Array, "B T N H"], tuple[Float[Array, " B"] | None, Any]]:
        mass = mass_read(q, keys, plan, lengths) if measure_mass else None
        if learner is None:
            return attend_plan(q, keys, values, plan, lengths), (mass, None)
        out, kept = learner.attend(q, keys, values, plan, lengths)
        return out, (mass, kept)

    return attend
