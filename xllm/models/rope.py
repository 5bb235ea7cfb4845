"""Rotary parameters out of a config.json, in the spelling of transformers 5 (`rope_parameters`) or the one before.

Torch-free: the frequencies themselves are computed in `xllm.models.layers.rotary`.
"""

from dataclasses import dataclass
from typing import Any

from xllm.core.errors import ConfigError

TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
KNOWN = {
    "rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings", "partial_rotary_factor",
    "low_freq_factor", "high_freq_factor",
    "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rope:
    type: str  # one of TYPES
    theta: float
    dim: int  # rotated features of a head
    original_max: int  # positions the model was trained on, before any stretching
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float | None = None  # yarn; None: from `factor` and the two mscales
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscales: tuple[float, float] | None = None  # yarn: mscale, mscale_all_dim
    truncate: bool = True  # yarn: round the ramp's ends to whole features


def read_rope(hf: dict[str, Any], head_dim: int) -> Rope:
    """Raises ConfigError for a kind of scaling, or a parameter of one, that is not implemented."""
    raw = _flat(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    kind = raw.get("rope_type") or raw.get("type") or "default"
    if kind not in TYPES:
        raise ConfigError(f"rope scaling {kind!r} is not supported; supported: {', '.join(TYPES)}")
    if unknown := sorted(raw.keys() - KNOWN):
        raise ConfigError(f"rope parameter {unknown[0]!r} is not supported")
    if raw.get("partial_rotary_factor", hf.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise ConfigError("partial_rotary_factor other than 1 is not supported by this architecture")
    trained = hf["max_position_embeddings"]
    if kind in ("llama3", "yarn"):
        trained = (
            hf.get("original_max_position_embeddings")
            or raw.get("original_max_position_embeddings")
            or trained
        )
    return Rope(
        type=kind,
        theta=float(raw.get("rope_theta") or hf.get("rope_theta") or 10000.0),
        dim=head_dim,
        original_max=int(trained),
        factor=_factor(kind, raw, hf["max_position_embeddings"], trained),
        low_freq_factor=_number(raw, "low_freq_factor", 1.0, needed=kind == "llama3"),
        high_freq_factor=_number(raw, "high_freq_factor", 4.0, needed=kind == "llama3"),
        attention_factor=raw.get("attention_factor"),
        beta_fast=float(raw.get("beta_fast") or 32.0),
        beta_slow=float(raw.get("beta_slow") or 1.0),
        mscales=_mscales(raw),
        truncate=raw.get("truncate", True),
    )


def max_position(hf: dict[str, Any], rope: Rope) -> int:
    """The context the checkpoint is made for, in tokens, scaling included."""
    declared = int(hf["max_position_embeddings"])
    if rope.type in ("default", "llama3"):  # llama3 checkpoints declare the stretched length
        return declared
    return max(declared, int(rope.original_max * rope.factor))


def _flat(raw: dict[str, Any]) -> dict[str, Any]:
    """Parameters given per layer type are accepted where all types agree."""
    nested = [value for value in raw.values() if isinstance(value, dict)]
    if not nested:
        return raw
    if any(value != nested[0] for value in nested):
        raise ConfigError("rope parameters that differ between layer types are not supported")
    return nested[0]


def _factor(kind: str, raw: dict[str, Any], declared: int, trained: int) -> float:
    if kind == "yarn" and raw.get("factor") is None:
        return declared / trained
    return _number(raw, "factor", 1.0, needed=kind != "default")


def _number(raw: dict[str, Any], name: str, default: float, *, needed: bool) -> float:
    value = raw.get(name)
    if value is None and needed:
        raise ConfigError(
            f"rope scaling {raw.get('rope_type') or raw.get('type')!r} needs {name!r} in config.json"
        )
    return float(default if value is None else value)


def _mscales(raw: dict[str, Any]) -> tuple[float, float] | None:
    one, all_dim = raw.get("mscale"), raw.get("mscale_all_dim")
    return (float(one), float(all_dim)) if one and all_dim else None
