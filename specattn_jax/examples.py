"""A tiny random pair to try things with in seconds: every part is real, but nothing was learnt.

What it writes makes no sense. The draft is the target with disturbed weights, so that some of its tokens are accepted
and its attention has something to do with the target's.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from specattn_jax.loading.hf import save_hf
from specattn_jax.loading.pair import ModelPair
from specattn_jax.loading.tokenizer import Tokenizer, make_tokenizer
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.transformer import LanguageModel, abstract_model
from specattn_jax.selection.alignment import Alignment

_CONFIG = ModelConfig(
    family="llama",
    vocab_size=257,
    embed_dim=64,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=96,
    max_context=1024,
)
# Standard deviation of the weights, so large that attention is far from uniform, and of the draft's disturbance.
_SCALE, _NOISE = 0.17, 0.0085
_CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class TinyFolders(NamedTuple):
    """References to a pair on disk, as `load_pair` takes them.

    Attributes:
        target: Hugging Face folder.
        draft: likewise.
    """

    target: str
    draft: str


def byte_tokenizer(reverse: bool = False) -> Tokenizer:
    """One token per byte, so that a character may take several, then an end token.

    Args:
        reverse: whether the bytes are numbered in the opposite order, which makes another tokenizer.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
    backend = Backend(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return make_tokenizer(backend, {"eos_token": "<|endoftext|>"}, (), _CHAT)


@functools.cache
def tiny_pair() -> ModelPair:
    """The pair in memory, with an alignment in which every draft head counts the same and budgets are made up.

    Example:
        >>> pair = tiny_pair()
        >>> pair.target.config.num_layers, pair.draft.config.num_layers, pair.target.config.max_context
        (4, 4, 1024)
    """
    target, draft = _models()
    return ModelPair(
        "tiny target", "tiny draft", target, draft, byte_tokenizer(), _uniform(target.config, draft.config)
    )


def save_tiny_pair(folder: str | Path) -> TinyFolders:
    """Writes the pair as two Hugging Face folders, `tiny-target` and `tiny-draft`, with their tokenizer.

    Args:
        folder: where to; neither may be there yet.

    Raises:
        UserError: they are, or cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     target, draft = save_tiny_pair(folder)
        ...     print(sorted(path.name for path in Path(target).glob("*.json")))
        ['config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json']
    """
    paths = Path(folder) / "tiny-target", Path(folder) / "tiny-draft"
    for model, path in zip(_models(), paths, strict=True):
        save_hf(model, byte_tokenizer(), path)
    return TinyFolders(*map(str, paths))


def _models() -> tuple[LanguageModel, LanguageModel]:
    """Target and draft."""
    empty, weights, noise = abstract_model(_CONFIG, jnp.float32), np.random.default_rng(0), np.random.default_rng(1)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        """A matrix, or a norm's scale of ones."""
        return _SCALE * weights.normal(size=leaf.shape) if leaf.ndim > 1 else np.ones(leaf.shape)

    def disturb(leaf: np.ndarray) -> np.ndarray:
        return leaf + _NOISE * noise.normal(size=leaf.shape) if leaf.ndim > 1 else leaf

    target = jax.tree.map(draw, empty.params)
    models = target, jax.tree.map(disturb, target)
    target, draft = (jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params) for params in models)
    return dataclasses.replace(empty, params=target), dataclasses.replace(empty, params=draft)


def _uniform(target: ModelConfig, draft: ModelConfig) -> Alignment:
    """An alignment that knows nothing."""
    rows, sources = target.num_layers * target.num_kv_heads, draft.num_layers * draft.num_kv_heads
    return Alignment(
        weights=jnp.full((rows, sources), 1.0 / sources, jnp.float32),
        savings=jnp.asarray([0.5, 0.9], jnp.float32),
        left_out=jnp.tile(jnp.asarray([[0.1], [0.5]], jnp.float32), (1, target.num_layers)),
        length_knots=jnp.asarray([64.0], jnp.float32),
        length_scale=jnp.ones((2, 1), jnp.float32),
        layer_map=tuple(index * draft.num_layers // target.num_layers for index in range(target.num_layers)),
        granularity="kv_head",
    )
