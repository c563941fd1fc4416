"""What the draft is trained for: the target's next-token distribution, and attention that predicts the target's."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from specattn_jax.models.forward import causal_attention, read_sequence
from specattn_jax.models.transformer import LanguageModel

# Logits that are held at once: those of 4,096 positions of SmolLM2.
_LOGITS = 4096 * 49152
_TINY = 1e-9


class Reading(NamedTuple):
    """What a model made of a batch.

    Attributes:
        hidden: normalised hidden states.
        attention: attention of every kv head (mean over its group) at the chosen rows, layer by layer.
    """

    hidden: Float[Array, "B T D"]
    attention: Float[Array, "heads B Q T"] | None


def read(model: LanguageModel, tokens: Int32[Array, "B T"], rows: Int32[Array, " Q"] | None) -> Reading:
    """Reads whole sequences, and looks at attention at `rows` if there are any."""
    seen: list[Float[Array, "K B Q T"]] = []

    def attend(
        _: int, q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
    ) -> Float[Array, "B T N H"]:
        if rows is not None:
            seen.append(_head_attention(q[:, rows], k, rows))
        return causal_attention(q, k, v)

    hidden = read_sequence(model, tokens, attend)
    return Reading(hidden, jnp.concatenate(seen) if seen else None)


def _head_attention(
    q: Float[Array, "B Q N H"], k: Float[Array, "B T K H"], rows: Int32[Array, " Q"]
) -> Float[Array, "K B Q T"]:
    """Causal softmax weights at the rows, averaged over each kv head's group, in float32."""
    batch, num_rows, _, width = q.shape
    grouped = q.reshape(batch, num_rows, k.shape[2], -1, width)
    logits = jnp.einsum("bqkgh,btkh->kgbqt", grouped, k, preferred_element_type=jnp.float32) * width**-0.5
    visible = jnp.arange(k.shape[1]) <= rows[:, None]
    return jnp.mean(jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1), axis=1)


@jax.custom_vjp
def token_loss(
    target: LanguageModel, draft: LanguageModel, wanted: Float[Array, "B T D"], have: Float[Array, "B T D"]
) -> Float[Array, ""]:
    """Mean KL(target || draft) of the next-token distributions, in nats, from hidden states.

    The gradient flows into `have` alone: both output matrices are the target's, and fixed. It is computed together
    with the loss, so that the logits, by far the largest arrays of a step, are made once and a part at a time.

    Args:
        target: the teacher.
        draft: the student.
        wanted: hidden states of the target.
        have: hidden states of the draft.
    """
    return _token_loss_and_slope(target, draft, wanted, have)[0]


def _token_loss_and_slope(
    target: LanguageModel, draft: LanguageModel, wanted: Float[Array, "B T D"], have: Float[Array, "B T D"]
) -> tuple[Float[Array, ""], Float[Array, "B T D"]]:
    """The loss and its gradient with respect to `have`."""
    total = wanted.shape[0] * wanted.shape[1]
    # The longest power of two, of which there are so many in a batch that it always fits.
    chunk = 1 << max(_LOGITS // target.config.vocab_size, 1).bit_length() - 1
    chunk = chunk if total % chunk == 0 else total

    def part(hidden: tuple[Float[Array, "c D"], Float[Array, "c D"]]) -> tuple[Float[Array, ""], Float[Array, "c D"]]:
        teacher = jax.nn.log_softmax(target.logits(hidden[0]))
        student = jax.nn.log_softmax(draft.logits(hidden[1]))
        loss = jnp.sum(jnp.exp(teacher) * (teacher - student))
        # In the model's dtype, as every other gradient of its activations.
        slope = ((jnp.exp(student) - jnp.exp(teacher)) / total).astype(have.dtype)
        return loss, slope @ draft.module().output_matrix()

    split = jax.tree.map(lambda x: x.reshape(total // chunk, chunk, x.shape[-1]), (wanted, have))
    losses, slopes = jax.lax.map(part, split)
    return jnp.sum(losses) / total, slopes.reshape(have.shape)


def _backward(
    slope: Float[Array, "B T D"], upstream: Float[Array, ""]
) -> tuple[None, None, None, Float[Array, "B T D"]]:
    return None, None, None, (upstream * slope).astype(slope.dtype)


token_loss.defvjp(_token_loss_and_slope, _backward)


def attention_loss(
    wanted: Float[Array, "rows B Q T"], sources: Float[Array, "R B Q T"], weights: Float[Array, "rows R"]
) -> tuple[Float[Array, ""], Float[Array, "rows R"]]:
    """Mean KL(target || mixture of the draft's sources), in nats, and the mixture weights one EM step further."""
    mix = jnp.einsum("ar,rbqt->abqt", weights, sources)
    entropy = jnp.sum(wanted * jnp.log(jnp.maximum(wanted, _TINY)), axis=-1)
    loss = jnp.mean(entropy - jnp.sum(wanted * jnp.log(jnp.maximum(mix, _TINY)), axis=-1))
    ratio = wanted / jnp.maximum(jax.lax.stop_gradient(mix), _TINY)
    count = wanted.shape[1] * wanted.shape[2]
    responsibility = jnp.einsum("abqt,rbqt->ar", ratio, jax.lax.stop_gradient(sources)) / count
    improved = weights * responsibility
    return loss, improved / jnp.maximum(jnp.sum(improved, axis=-1, keepdims=True), _TINY)


class Losses(NamedTuple):
    """Parts of the objective, in nats."""

    total: Float[Array, ""]
    token: Float[Array, ""]
    attention: Float[Array, ""]


def objective(
    draft: LanguageModel,
    target: LanguageModel,
    weights: Float[Array, "rows R"],
    tokens: Int32[Array, "B T"],
    rows: Int32[Array, " Q"] | None,
    attention_weight: float,
) -> tuple[Float[Array, ""], tuple[Losses, Float[Array, "rows R"]]]:
    """The loss of one batch, its parts, and improved mixture weights."""
    teacher = jax.lax.stop_gradient(read(target, tokens, rows))
    student = read(draft, tokens, rows)
    token = token_loss(target, draft, teacher.hidden, student.hidden)
    if teacher.attention is None or student.attention is None:
        return token, (Losses(token, token, jnp.zeros(())), weights)
    attention, improved = attention_loss(teacher.attention, student.attention, weights)
    total = token + attention_weight * attention
    return total, (Losses(total, token, attention), improved)
