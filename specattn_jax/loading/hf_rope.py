"""Rotary embedding as config.json says it, in all spellings that transformers has had, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from specattn_jax.errors import UserError
from specattn_jax.models.config import RopeScaling

_ORIGINAL = "original_max_position_embeddings"
# Keys that every kind may have; what each kind adds to them. A key that is not here may change the frequencies in ways
# that we do not follow.
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", _ORIGINAL, "finetuned"}
_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
}


def parse_rope(data: Mapping[str, Any], origin: str) -> tuple[float, RopeScaling | None]:
    """Base and stretch of the rotary frequencies that a `config.json` describes.

    Args:
        data: its fields.
        origin: what to call it in messages.

    Raises:
        UserError: something about them is not understood.
    """
    given = {key: _flat(data, key, origin) for key in ("rope_scaling", "rope_parameters") if data.get(key)}
    read = {_parse(data, rope, origin) for rope in given.values() or [{}]}
    if len(read) > 1:
        raise UserError(f"{origin}: rope_scaling and rope_parameters say different things; remove one of them.")
    return read.pop()


def longest_context(trained: int, scaling: RopeScaling | None) -> int:
    """The context of a model made for `trained` tokens: with yarn, what its stretch reaches if that is more."""
    if scaling is None or scaling.kind != "yarn":
        return trained
    return max(trained, int(scaling.factor * scaling.original_context))


def scaling_fields(scaling: RopeScaling) -> dict[str, Any]:
    """The `rope_scaling` of a `config.json`."""
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        fields |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        names = ("beta_fast", "beta_slow", "attention_factor", "truncate")
        fields |= {name: getattr(scaling, name) for name in names}
    return fields if scaling.kind == "linear" else fields | {_ORIGINAL: scaling.original_context}


def yarn_attention_factor(factor: float, weight: float = 1.0) -> float:
    """By how much yarn multiplies queries and keys (Peng et al. 2023, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _flat(data: Mapping[str, Any], key: str, origin: str) -> Mapping[str, Any]:
    """The parameters of all layers, which may be said once for each type of layer."""
    found = data[key]
    if not isinstance(found, Mapping):
        raise UserError(f"{origin}: {key} is {found!r}; expected an object.")
    nested = {name: value for name, value in found.items() if isinstance(value, Mapping)}
    if not nested:
        return found
    used = {name: nested[name] for name in set(data.get("layer_types") or nested) if name in nested}
    first = next(iter(used.values()), None)
    if first is None or any(value != first for value in used.values()):
        raise UserError(
            f"{origin}: {key} differs between types of layers ({', '.join(sorted(used or nested))}); expected the same "
            "for all; this variant is not supported."
        )
    return {**{name: value for name, value in found.items() if name not in nested}, **first}


def _parse(data: Mapping[str, Any], rope: Mapping[str, Any], origin: str) -> tuple[float, RopeScaling | None]:
    rope = {key: value for key, value in rope.items() if value is not None}
    theta = _number({"rope_theta": rope.get("rope_theta", data.get("rope_theta", 10000.0))}, "rope_theta", origin)
    if rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"{origin}: only part of each head is rotated (partial_rotary_factor); not supported.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _KEYS or rope.get("type", kind) != kind:
        shown = kind if rope.get("type", kind) == kind else {"rope_type": kind, "type": rope["type"]}
        raise UserError(f"{origin}: rope scaling is {shown!r}; expected {', '.join(_KEYS)}.")
    if unknown := sorted(rope.keys() - _COMMON - _KEYS[kind]):
        raise UserError(
            f"{origin}: rope scaling of kind {kind!r} has the unknown key {unknown[0]!r}; expected none but "
            f"{', '.join(sorted(_COMMON | _KEYS[kind]))}; this variant is not supported."
        )
    return theta, _scaling(data, rope, kind, f"{origin} (rope scaling)")


def _scaling(data: Mapping[str, Any], rope: Mapping[str, Any], kind: str, where: str) -> RopeScaling | None:
    if kind == "default":
        return None
    factor = _number(rope, "factor", where)
    if kind == "linear":
        return RopeScaling("linear", factor)
    # As in transformers: a field of its own goes before the one inside, and the model's context stands in for both.
    places = [data.get(_ORIGINAL), rope.get(_ORIGINAL), data.get("max_position_embeddings")]
    original = int(_number({_ORIGINAL: next((place for place in places if place), None)}, _ORIGINAL, where))
    if kind == "llama3":
        low, high = _number(rope, "low_freq_factor", where), _number(rope, "high_freq_factor", where)
        return RopeScaling("llama3", factor, low, high, original)
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        raise UserError(f"{where}: truncate is {truncate!r}; expected true or false.")
    # As in transformers, 0 means the default too.
    fast, slow = (
        _number(rope, key, where) if rope.get(key) else default
        for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
    )
    attention = _attention_factor(rope, factor, where)
    return RopeScaling(
        "yarn",
        factor,
        original_context=original,
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=attention,
        truncate=truncate,
    )


def _attention_factor(rope: Mapping[str, Any], factor: float, where: str) -> float:
    if "attention_factor" in rope:
        return _number(rope, "attention_factor", where)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        above, below = _number(rope, "mscale", where), _number(rope, "mscale_all_dim", where)
        return yarn_attention_factor(factor, above) / yarn_attention_factor(factor, below)
    return yarn_attention_factor(factor)


def _number(fields: Mapping[str, Any], key: str, where: str) -> float:
    if key not in fields:
        raise UserError(f"{where}: {key} is missing; expected the config.json of a complete model.")
    value = fields[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{where}: {key} is {value!r}; expected a positive number.")
    return float(value)
