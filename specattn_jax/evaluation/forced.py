"""Teacher-forced reading: known text through the draft, selection and verification of real decoding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from specattn_jax.cache import KVCache, init_cache
from specattn_jax.errors import UserError
from specattn_jax.evaluation.watch import Watched, head_fraction
from specattn_jax.model import LanguageModel, forward, prefill
from specattn_jax.selection import Selection
from specattn_jax.speculative import DecodeSettings, DecodeState, read_window, start_decoding

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
        hidden: the target's hidden states before every scored token, window by window: a reference for other readings.
    """

    tokens: int
    nll: Float[np.ndarray, " B"]
    kl: Float[np.ndarray, " B"] | None
    top1: Float[np.ndarray, " B"] | None
    read: Float[np.ndarray, "B L"]
    head_read: Float[np.ndarray, "B L K"]
    mass: Float[np.ndarray, "B L"] | None
    hidden: Float[Array, "windows B W D"]

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
    tokens = jnp.asarray(np.asarray(documents, np.int32))
    length = tokens.shape[1]
    prompt = max(2, round(length * prefill_share))
    limit = min(target.config.max_context, draft.config.max_context)
    if not prompt + window + 1 <= length <= limit:
        raise UserError(
            f"context is {length}; expected at least {prompt + window + 1} tokens, for one window after the prefill, "
            f"and at most the models' {limit}."
        )
    settings = DecodeSettings("speculative" if selection is None else "specattn", window)
    state = start_reading(target, None if selection is None else draft, tokens[:, :prompt], length, settings)
    state, sums = _read_windows(
        target,
        draft,
        selection,
        state,
        tokens,
        reference,
        settings=settings,
        prompt=prompt,
        measure_mass=measure_mass,
    )
    windows = (length - prompt - 1) // window
    count = windows * window
    host = jax.device_get({name: value for name, value in sums.items() if name != "hidden"})
    return Reading(
        tokens=count,
        nll=host["nll"] / count,
        kl=None if reference is None else host["kl"] / count,
        top1=None if reference is None else host["top1"] / count,
        read=np.asarray(state.statistics.read) / windows,
        head_read=host["head_read"] / windows,
        mass=host["mass"] / windows if measure_mass else None,
        hidden=sums["hidden"],
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


@functools.partial(jax.jit, static_argnames=("settings", "prompt", "measure_mass"), donate_argnames=("state",))
def _read_windows(
    target: LanguageModel,
    draft: LanguageModel,
    selection: Selection | None,
    state: DecodeState,
    tokens: Int32[Array, "B length"],
    reference: Float[Array, "windows B W D"] | None,
    *,
    settings: DecodeSettings,
    prompt: int,
    measure_mass: bool,
) -> tuple[DecodeState, dict[str, Array]]:
    """Reads on after the prompt, window by window; the state then, and sums over windows and tokens."""
    window = settings.window
    count = (tokens.shape[1] - prompt - 1) // window
    keys = state.keys

    def step(
        state: DecodeState, inputs: tuple[Int32[Array, ""], Float[Array, "B W D"] | None]
    ) -> tuple[DecodeState, dict[str, Array]]:
        index, full = inputs
        # Committed so far: prompt + 1 + index * W tokens, the newest not yet in the target's cache.
        here = jax.lax.dynamic_slice_in_dim(tokens, prompt - 1 + index * window, window + 2, axis=1)
        past, before = state.target_cache.lengths, state.statistics
        if selection is None:
            out = forward(target, here[:, 1:], state.target_cache)
            hidden, grown, draft_cache, mass = out.hidden, out.cache, None, None
            read = jnp.ones_like(before.read)
            head_read = head_fraction((None,) * read.shape[1], past, target.config.num_kv_heads)
        else:
            state = dataclasses.replace(state, last=here[:, :2])
            watched = Watched(selection)
            seen = read_window(
                target,
                draft,
                watched.as_selection(),
                state,
                keys,
                settings,
                forced=here[:, 2:],
                measure_mass=measure_mass,
            )
            head_read = head_fraction(watched.plans, past, target.config.num_kv_heads)
            hidden, grown, draft_cache, mass, read = seen.hidden, seen.cache, seen.drafted.cache, seen.mass, seen.read
        scored = hidden[:, :-1]
        log_probs = jax.nn.log_softmax(target.logits(scored))
        result = {
            "nll": -jnp.sum(jnp.take_along_axis(log_probs, here[:, 2:, None], axis=-1), axis=(1, 2)),
            "head_read": head_read,
        }
        if full is not None:
            wanted = jax.nn.log_softmax(target.logits(full))
            result["kl"] = jnp.sum(jnp.exp(wanted) * (wanted - log_probs), axis=(1, 2))
            result["top1"] = jnp.sum(jnp.argmax(wanted, axis=-1) == jnp.argmax(log_probs, axis=-1), axis=1)
        if measure_mass:
            result["mass"] = jnp.ones_like(read) if mass is None else mass
        state = dataclasses.replace(
            state,
            target_cache=grown.at_lengths(past + window),
            draft_cache=draft_cache,
            statistics=dataclasses.replace(before, windows=before.windows + 1, read=before.read + read),
        )
        return state, {**result, "hidden": scored}

    state, outputs = jax.lax.scan(step, state, (jnp.arange(count), reference))
    hidden = outputs.pop("hidden")
    return state, {**{name: jnp.sum(value, axis=0) for name, value in outputs.items()}, "hidden": hidden}
