"""One tensor at a time from any checkpoint into our layout, and back.

Every reader speaks Hugging Face names and layout (`[out, in]` matrices, Hugging Face's row order of q and k). Only
`packings` knows how those tensors become ours: q, k and v of one kv group in one array, gate and up in another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import DTypeLike, Shaped
from specattn_kernels import Split

from specattn_jax.errors import UserError
from specattn_jax.files import sensible
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.sharding import placer
from specattn_jax.models.transformer import LanguageModel, abstract_model

# What is being done, how many bytes are done, how many there are (0 when nobody knows).
Progress = Callable[[str, int, int], None]

ArrayPath = tuple[str | int, ...]
AnyTensor = Shaped[np.ndarray, "..."]

DTYPES = ("float32", "bfloat16", "float16")
# Buffers that old checkpoints carry along; they follow from the configuration.
_DERIVED = ("rotary_emb.inv_freq", "attention.masked_bias", "attention.bias")


class TensorSource(Protocol):
    """A checkpoint that hands out one tensor at a time."""

    @property
    def origin(self) -> str:
        """What to call the checkpoint in messages: its path."""

    @property
    def config(self) -> ModelConfig:
        """Shape and variant of the model."""

    def names(self) -> AbstractSet[str]:
        """Hugging Face names of all tensors."""

    def get(self, name: str) -> AnyTensor:
        """One tensor in Hugging Face layout, in the dtype of the file (float32 when it was quantised)."""


class Packing(NamedTuple):
    """How one of our arrays is made of Hugging Face tensors.

    Attributes:
        shapes: the tensors it is made of and their shapes, in the order that `pack` takes and `unpack` returns.
        pack: from those tensors to our array.
        unpack: the inverse.
    """

    shapes: dict[str, tuple[int, ...]]
    pack: Callable[..., AnyTensor]
    unpack: Callable[[AnyTensor], tuple[AnyTensor, ...]]


def _alike(name: str, *shape: int) -> Packing:
    return Packing({name: shape}, lambda x: x, lambda x: (x,))


def _transposed(name: str, *shape: int) -> Packing:
    return Packing({name: shape}, lambda x: x.T, lambda x: (x.T,))


def _qkv(config: ModelConfig, prefix: str, kind: str) -> Packing:
    """q, k and v (`kind` weight `[D, K, G+2, H]` or bias `[K, G+2, H]`), per kv group: queries, key, value."""
    k, g, h = config.num_kv_heads, config.group_size, config.head_dim
    rest = (config.embed_dim,) if kind == "weight" else ()

    def pack(query: AnyTensor, key: AnyTensor, value: AnyTensor) -> AnyTensor:
        parts = [query.reshape(k, g, h, *rest), key.reshape(k, 1, h, *rest), value.reshape(k, 1, h, *rest)]
        joined = np.concatenate(parts, axis=1)
        return np.moveaxis(joined, -1, 0) if rest else joined

    def unpack(joined: AnyTensor) -> tuple[AnyTensor, ...]:
        heads_first = np.moveaxis(joined, 0, -1) if rest else joined
        split = np.split(heads_first, [g, g + 1], axis=1)
        return tuple(part.reshape(-1, *rest) for part in split)

    names = [f"{prefix}.{letter}_proj.{kind}" for letter in "qkv"]
    heads = [k * g, k, k]
    return Packing({name: (n * h, *rest) for name, n in zip(names, heads, strict=True)}, pack, unpack)


def _attention_out(config: ModelConfig, name: str) -> Packing:
    d, k, g, h = config.embed_dim, config.num_kv_heads, config.group_size, config.head_dim
    return Packing({name: (d, k * g * h)}, lambda x: x.T.reshape(k, g, h, d), lambda x: (x.reshape(-1, d).T,))


def _gate_up(config: ModelConfig, prefix: str) -> Packing:
    shape = (config.mlp_dim, config.embed_dim)
    return Packing(
        {f"{prefix}.gate_proj.weight": shape, f"{prefix}.up_proj.weight": shape},
        lambda gate, up: np.stack([gate.T, up.T], axis=1),
        lambda both: (both[:, 0].T, both[:, 1].T),
    )


def _layer_packings(config: ModelConfig, index: int) -> dict[ArrayPath, Packing]:
    d, f, h = config.embed_dim, config.mlp_dim, config.head_dim
    here: ArrayPath = ("layers", index)
    prefix = f"model.layers.{index}"
    attention = f"{prefix}.self_attn"
    table = {
        (*here, "attention_norm", "scale"): _alike(f"{prefix}.input_layernorm.weight", d),
        (*here, "attention", "qkv"): _qkv(config, attention, "weight"),
        (*here, "attention", "out"): _attention_out(config, f"{attention}.o_proj.weight"),
        (*here, "mlp_norm", "scale"): _alike(f"{prefix}.post_attention_layernorm.weight", d),
        (*here, "mlp", "gate_up"): _gate_up(config, f"{prefix}.mlp"),
        (*here, "mlp", "down"): _transposed(f"{prefix}.mlp.down_proj.weight", d, f),
    }
    if config.qkv_bias:
        table[*here, "attention", "qkv_bias"] = _qkv(config, attention, "bias")
    if config.out_bias:
        table[*here, "attention", "out_bias"] = _alike(f"{attention}.o_proj.bias", d)
    if config.qk_norm:
        table[*here, "attention", "q_norm", "scale"] = _alike(f"{attention}.q_norm.weight", h)
        table[*here, "attention", "k_norm", "scale"] = _alike(f"{attention}.k_norm.weight", h)
    return table


def packings(config: ModelConfig) -> dict[ArrayPath, Packing]:
    """For every array of our model, by its path, the Hugging Face tensors that it is made of."""
    v, d = config.vocab_size, config.embed_dim
    table: dict[ArrayPath, Packing] = {
        ("embedding",): _alike("model.embed_tokens.weight", v, d),
        ("final_norm", "scale"): _alike("model.norm.weight", d),
    }
    for index in range(config.num_layers):
        table |= _layer_packings(config, index)
    if not config.tie_embeddings:
        table["output",] = _alike("lm_head.weight", v, d)
    return table


def array_path(path: tuple[object, ...]) -> ArrayPath:
    """The path of one weight in `LanguageModel.params`, from what `jax.tree_util` calls its path."""
    return tuple(part.key for part in path if isinstance(part, jax.tree_util.DictKey))


def checked_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype to load weights in.

    Raises:
        UserError: it is not one that the model computes in.
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise UserError(f"dtype: got {name!r}; expected one of {', '.join(DTYPES)}.")
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def build_model(
    source: TensorSource, dtype: DTypeLike, progress: Progress | None = None, split: Split | None = None
) -> LanguageModel:
    """Reads a checkpoint, tensor by tensor, into a model.

    Args:
        source: an opened checkpoint.
        dtype: float32, bfloat16 or float16.
        progress: told after every array how many bytes of weights are loaded.
        split: how the weights are split over a mesh; the host holds one array at a time, and a device its parts.

    Returns:
        The model with its weights in place, without a split on the default device.

    Raises:
        UserError: a tensor is missing, unknown, of another shape, or not finite.
    """
    wanted = checked_dtype(dtype)
    table = packings(source.config)
    _check_names(source, {name for packing in table.values() for name in packing.shapes})
    empty = abstract_model(source.config, wanted)
    put = placer(source.config, split)
    total, done = source.config.parameter_count() * wanted.itemsize, 0

    def fill(path: tuple[object, ...], _: jax.ShapeDtypeStruct) -> jax.Array:
        nonlocal done
        packing = table[array_path(path)]
        parts = [_read(source, name, shape, wanted) for name, shape in packing.shapes.items()]
        packed = np.ascontiguousarray(packing.pack(*parts))
        done += packed.nbytes
        if progress is not None:
            progress("loading weights", done, total)
        return put(path, packed)

    return dataclasses.replace(empty, split=split, params=jax.tree_util.tree_map_with_path(fill, empty.params))


def hf_tensors(model: LanguageModel) -> Iterator[tuple[str, AnyTensor]]:
    """The model's weights under Hugging Face names and in Hugging Face layout, one after the other."""
    table = packings(model.config)
    for path, weight in jax.tree_util.tree_flatten_with_path(model.params)[0]:
        packing = table[array_path(path)]
        for name, tensor in zip(packing.shapes, packing.unpack(np.asarray(weight)), strict=True):
            yield name, np.ascontiguousarray(tensor)


def _check_names(source: TensorSource, expected: AbstractSet[str]) -> None:
    found = source.names()
    missing = sorted(expected - found)
    if missing:
        raise UserError(
            f"{source.origin}: tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are); expected a "
            f"complete {source.config.family} model of {source.config.num_layers} layers; download or convert it again."
        )
    tied = {"lm_head.weight"} if source.config.tie_embeddings else set()
    unknown = sorted(name for name in found - expected - tied if not name.endswith(_DERIVED))
    if unknown:
        raise UserError(
            f"{source.origin}: tensor {unknown[0]} has no place in a {source.config.family} model ({len(unknown)} "
            "such); this variant of the architecture is not supported."
        )


def _read(source: TensorSource, name: str, shape: tuple[int, ...], dtype: np.dtype) -> AnyTensor:
    """One tensor, checked and cast. The result never aliases the file."""
    with sensible(f"{source.origin}: tensor {name}", "download or convert it again"):
        raw = source.get(name)
    if raw.shape != shape:
        raise UserError(
            f"{source.origin}: tensor {name} has shape {list(raw.shape)}; expected {list(shape)} "
            "from the configuration; weights and configuration are not of the same model."
        )
    if not jnp.issubdtype(raw.dtype, jnp.floating):
        raise UserError(f"{source.origin}: tensor {name} is {raw.dtype.name}; expected floating-point weights.")
    with np.errstate(over="ignore", invalid="ignore"):
        tensor = raw.astype(dtype)
    if not all_finite(tensor):
        reason = "is damaged: it contains NaN or infinity" if not all_finite(raw) else f"overflows {dtype.name}"
        advice = "download or convert it again" if not all_finite(raw) else "use bfloat16 or float32"
        raise UserError(f"{source.origin}: tensor {name} {reason}; {advice}.")
    return tensor


def all_finite(x: AnyTensor) -> bool:
    """Like `np.isfinite(x).all()`, without a temporary and much faster for 16-bit types.

    As integers, bit patterns from infinity on (infinity, then NaN) are the largest of their sign.
    """
    bits = np.ascontiguousarray(x).view(f"i{x.dtype.itemsize}")
    infinities = np.array([np.inf, -np.inf], x.dtype).view(bits.dtype)
    unsigned = np.dtype(f"u{x.dtype.itemsize}")
    return bool(bits.max() < infinities[0] and bits.view(unsigned).max() < infinities[1:].view(unsigned)[0])
