"""What is said when a model computes no numbers: whose logits, from which layer on, and what may help."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from specattn_jax.decoding.protocol import Models
from specattn_jax.decoding.state import DRAFT_FAULT, DecodeState
from specattn_jax.errors import UserError
from specattn_jax.models.forward import causal_attention, read_sequence
from specattn_jax.models.sharding import fetch
from specattn_jax.models.transformer import LanguageModel

# How much of a text is read again to find the layer.
_EXCERPT = 256


def check_sound(models: Models, state: DecodeState, texts: Sequence[Sequence[int]]) -> None:
    """Refuses output that was chosen from logits that are NaN or infinite.

    Args:
        models: what decoded.
        state: its last state.
        texts: token ids of each prompt and of what was made of it.

    Raises:
        UserError: the target or the draft computed no numbers; says which, and the first bad layer.
    """
    faults = fetch(state.fault)
    if not faults.any():
        return
    index = int(np.argmax(faults > 0))
    role = "draft" if faults[index] == DRAFT_FAULT else "target"
    model = models.draft if role == "draft" else models.target
    assert model is not None
    raise unsound(role, model, f"after prompt {index + 1}", texts[index])


def unsound(role: str, model: LanguageModel, when: str, tokens: Sequence[int]) -> UserError:
    """The error for a model whose logits are NaN or infinite.

    Args:
        role: what the model is.
        model: it.
        when: after which text.
        tokens: the text.
    """
    return UserError(
        f"{role}: its logits are NaN or infinite {when}, {_where(model, tokens)}, in {model.dtype.name}; check its "
        "files, or load it with dtype float32."
    )


def _where(model: LanguageModel, tokens: Sequence[int]) -> str:
    """The first weight, or else the first layer, that holds what is no number."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        if not bool(jnp.all(jnp.isfinite(leaf))):
            names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
            return f"as its weight {'.'.join(name for name in names if name and name != 'value')} is"
    good, end = _sound_layers(model, jnp.asarray([tokens[:_EXCERPT]], jnp.int32))
    # What enters a layer comes from the one before it.
    before = int(np.argmin([*np.asarray(good), bool(end), False]))
    count = model.config.num_layers
    if before == 0:
        return "from its embedding on"
    return f"from layer {before} of {count} on" if before <= count else "though its hidden states are not"


@jax.jit
def _sound_layers(model: LanguageModel, tokens: Int32[Array, "B T"]) -> tuple[Bool[Array, " L"], Bool[Array, ""]]:
    """Whether what enters each layer is finite, and what leaves the last."""
    good = []

    def attend(
        _: int, q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
    ) -> Float[Array, "B T N H"]:
        good.append(jnp.all(jnp.isfinite(q)) & jnp.all(jnp.isfinite(k)) & jnp.all(jnp.isfinite(v)))
        return causal_attention(q, k, v)

    hidden = read_sequence(model, tokens, attend)
    return jnp.stack(good), jnp.all(jnp.isfinite(hidden))
