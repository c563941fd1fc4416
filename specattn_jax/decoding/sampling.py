"""Token distributions and the exact acceptance rule of speculative sampling."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key
from specattn_kernels import top_p_threshold

from specattn_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; static under jit.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens (ties with the last included); 0 keeps all.
        top_p: then keep the smallest set of tokens whose probability reaches p; 1 keeps all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; expected 0 (greedy) or a positive number.")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; expected 0 (off) or a positive whole number.")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p is {self.top_p}; expected a number in (0, 1].")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0


def token_distribution(logits: Float[Array, "*batch V"], sampling: Sampling) -> Float[Array, "*batch V"]:
    """Float32 probabilities from which a token is drawn: temperature, then top-k, then top-p, then renormalised.

    Raises:
        ValueError: `sampling` is greedy, for which no distribution is needed.
    """
    if sampling.greedy:
        raise ValueError("sampling: temperature is 0; a greedy choice has no distribution, use choose().")
    logits = logits.astype(jnp.float32) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    probs = jax.nn.softmax(logits, axis=-1)
    if sampling.top_p < 1.0:
        threshold = top_p_threshold(probs, sampling.top_p)[..., None]
        probs = jnp.where(probs >= threshold, probs, 0.0)
        probs = probs / jnp.sum(probs, axis=-1, keepdims=True)
    return probs


def draw(keys: Key[Array, " B"], probs: Float[Array, "B V"]) -> Int32[Array, " B"]:
    """One token per sequence, each with its own key, so that a batch draws what its sequences would draw alone."""
    return jax.vmap(jax.random.categorical)(keys, jnp.log(probs)).astype(jnp.int32)


def choose(
    keys: Key[Array, " B"], logits: Float[Array, "B V"], sampling: Sampling
) -> tuple[Int32[Array, " B"], Float[Array, "B V"] | None]:
    """The next token of every sequence, and the distribution it was drawn from (None when greedy)."""
    if sampling.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), None
    probs = token_distribution(logits, sampling)
    return draw(keys, probs), probs


class Verdict(NamedTuple):
    """What verification decided.

    Attributes:
        tokens: the accepted drafted tokens, then one token of the target's own; meaningless beyond that.
        accepted: how many drafted tokens were accepted, 0 to W.
    """

    tokens: Int32[Array, "B T"]
    accepted: Int32[Array, " B"]


def _verdict(
    drafted: Int32[Array, "B W"], accepted: Int32[Array, " B"], own: Int32[Array, "B T"] | Int32[Array, "B 1"]
) -> Verdict:
    """Accepted tokens followed by the target's own."""
    window = drafted.shape[1]
    place = jnp.arange(window + 1)
    padded = jnp.pad(drafted, ((0, 0), (0, 1)))
    return Verdict(jnp.where(place < accepted[:, None], padded, own), accepted)


def _leading(accept: Array) -> Int32[Array, " B"]:
    """Number of leading True per row."""
    return jnp.sum(jnp.cumprod(accept.astype(jnp.int32), axis=1), axis=1)


def verify(
    keys: Key[Array, " B"],
    drafted: Int32[Array, "B W"],
    draft_probs: Float[Array, "B W V"] | None,
    target_logits: Float[Array, "B T V"],
    sampling: Sampling,
) -> Verdict:
    """Accepts a prefix of the drafted tokens so that the output is distributed as the target's own.

    Drafted token x at place i is accepted with probability min(1, p_i(x) / q_i(x)); at the first rejection the target's
    token is drawn from max(p - q, 0), renormalised; if all are accepted, one more comes from the last p. Greedy
    decoding is the same rule on one-hot distributions.

    Sources: Leviathan et al. 2023 (arXiv 2211.17192, Algorithm 1); Chen et al. 2023 (arXiv 2302.01318, Algorithm 2).

    Args:
        keys: one key per sequence; unused when greedy.
        drafted: the W drafted tokens.
        draft_probs: the distribution each was drawn from; None when greedy.
        target_logits: the target's logits after the last committed token and after each drafted one; T = W + 1.
        sampling: how the target's distribution is made from its logits.
    """
    if sampling.greedy:
        best = jnp.argmax(target_logits, axis=-1).astype(jnp.int32)
        return _verdict(drafted, _leading(drafted == best[:, :-1]), best)
    if draft_probs is None:
        raise ValueError("draft_probs is None; sampling needs the distributions the drafted tokens were drawn from.")
    window = drafted.shape[1]
    target_probs = token_distribution(target_logits, sampling)
    split = jax.vmap(jax.random.split)(keys)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (window,)))(split[:, 0])
    p = jnp.take_along_axis(target_probs[:, :-1], drafted[..., None], axis=-1)[..., 0]
    q = jnp.take_along_axis(draft_probs, drafted[..., None], axis=-1)[..., 0]
    accepted = _leading(uniform * q < p)

    at = accepted[:, None, None]
    target_here = jnp.take_along_axis(target_probs, at, axis=1)[:, 0]
    # Past the last drafted token the draft claims nothing, and the residual is the target's distribution itself.
    draft_here = jnp.take_along_axis(jnp.pad(draft_probs, ((0, 0), (0, 1), (0, 0))), at, axis=1)[:, 0]
    residual = jnp.maximum(target_here - draft_here, 0.0)
    # p equal to q leaves no residual but for rounding, and then a rejection has (nearly) no probability either.
    residual = jnp.where(jnp.sum(residual, axis=-1, keepdims=True) > 0, residual, target_here)
    return _verdict(drafted, accepted, draw(split[:, 1], residual)[:, None])


def match_vocabulary(logits: Float[Array, "*batch V"], vocab_size: int) -> Float[Array, "*batch target_V"]:
    """Draft logits over the target's vocabulary: padding rows that only one of the two has are cut or never drafted."""
    have = logits.shape[-1]
    if have >= vocab_size:
        return logits[..., :vocab_size]
    widths = [(0, 0)] * (logits.ndim - 1) + [(0, vocab_size - have)]
    return jnp.pad(logits, widths, constant_values=-jnp.inf)
