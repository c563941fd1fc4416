"""Token distributions and the exact acceptance rule of speculative sampling."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Key
from specattn_kernels import top_p_threshold

from specattn_jax.errors import UserError

# Below the one, float32 logits that differ at all differ by so much that only the largest has any probability; above
# the other all tokens are equally likely. Beyond them float32 has no quotients.
_GREEDY_BELOW, _UNIFORM_ABOVE = 1e-6, 1e30
_LEAST_PENALTY = 0.01


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; static under jit.

    Logits are changed in this order, which is that of transformers.

    Attributes:
        temperature: 0 is greedy, and so is anything below a millionth; otherwise logits are divided by it.
        top_k: keep the k most likely tokens (ties with the last included); 0 keeps all.
        top_p: then keep the smallest set of tokens whose probability reaches p; 1 keeps all.
        min_p: then keep the tokens with at least this share of the likeliest one's probability; 0 keeps all.
        repetition_penalty: before all else, logits of tokens that the prompt or the output holds are divided by it
            where they are positive, and multiplied where they are negative (CTRL, arXiv 1909.05858); 1 changes nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; expected 0 (greedy) or a positive number.")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; expected 0 (off) or a positive whole number.")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p is {self.top_p}; expected a number in (0, 1].")
        if not 0.0 <= self.min_p <= 1.0:
            raise UserError(f"min_p is {self.min_p}; expected 0 (off) or a share of at most 1.")
        if not _LEAST_PENALTY <= self.repetition_penalty <= 1 / _LEAST_PENALTY:
            raise UserError(
                f"repetition_penalty is {self.repetition_penalty}; expected 1 (off), or a factor such as 1.1 from "
                f"{_LEAST_PENALTY} to {1 / _LEAST_PENALTY:g}."
            )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < _GREEDY_BELOW

    @property
    def minds_history(self) -> bool:
        """Whether the tokens before change what comes next."""
        return self.repetition_penalty != 1.0


def is_sound(logits: Float[Array, "*batch V"]) -> Bool[Array, "*batch"]:
    """Whether a token can be chosen: no logit is NaN or infinite, but for those of tokens that are ruled out (-inf)."""
    return jnp.isfinite(jnp.max(logits, axis=-1))


def penalise(
    logits: Float[Array, "*batch V"], history: Bool[Array, "*batch V"] | None, sampling: Sampling
) -> Float[Array, "*batch V"]:
    """Logits after the repetition penalty.

    Args:
        logits: as they come from a model.
        history: which tokens the prompt and the output hold; None where nobody minds.
        sampling: with the penalty.
    """
    if history is None:
        return logits
    penalty = sampling.repetition_penalty
    logits = logits.astype(jnp.float32)
    return jnp.where(history, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def history_along(history: Bool[Array, "B V"] | None, drafted: Int32[Array, "B W"]) -> Bool[Array, "B T V"] | None:
    """The history at each place of a window: the one before it, and the drafted tokens up to there."""
    if history is None:
        return None
    new = jax.nn.one_hot(drafted, history.shape[-1], dtype=jnp.int32)
    until = jnp.pad(jnp.cumsum(new, axis=1), ((0, 0), (1, 0), (0, 0))) > 0
    return history[:, None] | until


def token_distribution(logits: Float[Array, "*batch V"], sampling: Sampling) -> Float[Array, "*batch V"]:
    """Float32 probabilities from which a token is drawn: temperature, top-k, top-p, min-p, and renormalised.

    The penalty, which minds the history, is not part of it; see `penalise`.

    Raises:
        ValueError: `sampling` is greedy, for which no distribution is needed.
    """
    if sampling.greedy:
        raise ValueError("sampling: temperature is 0; a greedy choice has no distribution, use choose().")
    logits = logits.astype(jnp.float32)
    # Before dividing: quotients of large logits and a small temperature would be infinite.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / min(sampling.temperature, _UNIFORM_ABOVE)
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    probs = jax.nn.softmax(logits, axis=-1)
    if sampling.top_p < 1.0:
        threshold = top_p_threshold(probs, sampling.top_p)[..., None]
        probs = jnp.where(probs >= threshold, probs, 0.0)
        probs = probs / jnp.sum(probs, axis=-1, keepdims=True)
    if sampling.min_p > 0.0:
        probs = jnp.where(probs >= sampling.min_p * jnp.max(probs, axis=-1, keepdims=True), probs, 0.0)
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


def leading(accept: Array) -> Int32[Array, " B"]:
    """Number of leading True per row."""
    return jnp.sum(jnp.cumprod(accept.astype(jnp.int32), axis=1), axis=1)


def verify(
    keys: Key[Array, " B"],
    drafted: Int32[Array, "B W"],
    draft_probs: Float[Array, "B W V"] | None,
    target_logits: Float[Array, "B T V"],
    sampling: Sampling,
    count: Int32[Array, " B"] | None = None,
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
        count: how many of the drafted tokens are proposed, of each sequence; None is all. It must not depend on what
            the last of them or those behind it are.
    """
    window = drafted.shape[1]
    proposed = jnp.arange(window) < (window if count is None else count[:, None])
    if sampling.greedy:
        best = jnp.argmax(target_logits, axis=-1).astype(jnp.int32)
        return _verdict(drafted, leading((drafted == best[:, :-1]) & proposed), best)
    if draft_probs is None:
        raise ValueError("draft_probs is None; sampling needs the distributions the drafted tokens were drawn from.")
    target_probs = token_distribution(target_logits, sampling)
    split = jax.vmap(jax.random.split)(keys)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (window,)))(split[:, 0])
    p = jnp.take_along_axis(target_probs[:, :-1], drafted[..., None], axis=-1)[..., 0]
    q = jnp.take_along_axis(draft_probs, drafted[..., None], axis=-1)[..., 0]
    accepted = leading((uniform * q < p) & proposed)

    at = accepted[:, None, None]
    target_here = jnp.take_along_axis(target_probs, at, axis=1)[:, 0]
    # Past the last drafted token the draft claims nothing, and the residual is the target's distribution itself.
    claimed = jnp.where(proposed[..., None], draft_probs, 0.0)
    draft_here = jnp.take_along_axis(jnp.pad(claimed, ((0, 0), (0, 1), (0, 0))), at, axis=1)[:, 0]
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
