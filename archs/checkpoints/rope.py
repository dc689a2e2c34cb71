"""The rotary position embedding that a config.json describes, in its present form and in the older ones."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from archs.checkpoints.settings import Settings
from archs.positions import Linear, Llama3, Rotary, Yarn

# What each rope_type needs, and what it may have besides.
REQUIRED = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor"},
}
OPTIONAL = {
    "llama3": {"original_max_position_embeddings"},
    "yarn": {"original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"}
    | {"mscale", "mscale_all_dim"},
}
COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def rope_parameters(
    settings: Settings, base: float = 10000.0, fraction: float = 1.0, default: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """The rope_parameters of a family that rotates all layers alike; rope_theta, rope_scaling and partial_rotary_factor
    stood outside of them before. base, fraction, default: what the absence of a theta, of a factor, of all means."""
    settings.ignore("max_position_embeddings")
    rope = settings.take("rope_parameters", None)
    rope = settings.take("rope_scaling", None) or (default if rope is None else rope)
    outside = {
        "rope_theta": settings.take("rope_theta", base),
        "partial_rotary_factor": settings.take("partial_rotary_factor", fraction),
    }
    return {**outside, **rope}


def rope_of_layer_types(settings: Settings, bases: dict[str, float]) -> dict[str, dict[str, Any]]:
    """The rope_parameters of each type of layer, of a family that rotates them differently; rope_scaling, which stood
    outside of them before, is of "full_attention". bases: the theta of each type where none is given.

    Raises:
        ValueError: for parameters that are not under a type of layer.
    """
    settings.ignore("max_position_embeddings")
    given = settings.take("rope_parameters", None) or {}
    if set(given) - set(bases):
        settings.refuse("rope_parameters", f"parameters under {' and '.join(bases)} are")
    ropes = {kind: {"rope_theta": base} | (given.get(kind) or {}) for kind, base in bases.items()}
    ropes["full_attention"] |= settings.take("rope_scaling", None) or {}
    if any(rope.get("truncate", True) is not True for rope in ropes.values()):
        # The public implementation looks for it elsewhere, and does not find it.
        settings.refuse("rope_parameters", "truncate=true is")
    return ropes


def rotary(
    settings: Settings, rope: dict[str, Any], head_dim: int, *, partial: bool = False, interleaved: bool = False
) -> Rotary:
    """The Rotary of these parameters. partial: whether the family rotates a fraction of a head where it is told to.

    Raises:
        ValueError: for a type, a parameter or a value that is not modelled.
    """

    def refuse(modelled: str) -> NoReturn:
        raise ValueError(f"{settings.family}: rope_parameters={rope} is not modelled: {modelled}")

    rope = {key: value for key, value in rope.items() if value is not None or key == "truncate"}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in REQUIRED:
        refuse(f"rope_type {', '.join(REQUIRED)} are")
    if unknown := set(rope) - REQUIRED[kind] - OPTIONAL.get(kind, set()) - COMMON:
        refuse(f"rope_type {kind!r} is without {', '.join(sorted(unknown))}")
    if lacking := (REQUIRED[kind] | {"rope_theta"}) - set(rope):
        refuse(f"rope_type {kind!r} is with {', '.join(sorted(lacking))}")

    rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    if not (0 < rotated <= head_dim if partial else rotated == head_dim) or rotated % 2:
        whole = "an even part" if partial else "the whole"
        refuse(f"a partial_rotary_factor that rotates {whole} of head_dim={head_dim} is")
    layout = "interleaved" if interleaved else "halves"
    return Rotary(rope["rope_theta"], rotated / head_dim, layout, _scaling(settings, rope, kind, rotated, refuse))


def _scaling(
    settings: Settings, rope: dict[str, Any], kind: str, rotated: int, refuse
) -> Linear | Llama3 | Yarn | None:
    if kind == "default":
        return None
    factor = rope["factor"]
    if not factor >= 1:
        refuse("a factor of at least 1 is")
    if kind == "linear":
        return Linear(factor)
    original = rope.get("original_max_position_embeddings") or settings.take("max_position_embeddings")
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if low >= high:
            refuse("a low_freq_factor below high_freq_factor is")
        return Llama3(factor, original, low, high)
    fast, slow = rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0
    base = math.log(rope["rope_theta"])
    first, last = (rotated / 2 * math.log(original / (2 * math.pi * turns)) / base for turns in (fast, slow))
    if fast <= slow or last <= 0 or first >= rotated - 1:
        refuse("a ramp between beta_fast and beta_slow that falls into the rotated dimensions is")
    return Yarn(factor, original, fast, slow, _magnitude(rope), bool(rope.get("truncate", True)))


def _magnitude(rope: dict[str, Any]) -> float:
    factor, mscale, all_dim = rope["factor"], rope.get("mscale"), rope.get("mscale_all_dim")
    if "attention_factor" in rope:
        return rope["attention_factor"]
    return yarn_growth(factor, mscale) / yarn_growth(factor, all_dim) if mscale and all_dim else yarn_growth(factor)


def yarn_growth(factor: float, mscale: float = 1.0) -> float:
    """The factor on queries and keys where YaRN stretches positions by `factor`."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0
