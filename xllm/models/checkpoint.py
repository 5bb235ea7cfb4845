"""Reading a checkpoint directory's configs into a `ModelConfig`. Torch-free.

Whatever a config asks that would change the answer and that nobody here implements is refused, not ignored.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xllm.config.decided import ModelConfig
from xllm.core.errors import ConfigError
from xllm.models.quantisation import read_packing
from xllm.models.rope import max_position, read_rope
from xllm.models.table import find_family

# field -> values under which it changes nothing
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None,),
    "attention_chunk_size": (None,),
    "clip_qkv": (None,),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "no_rope_layers": (None, []),
    "use_qk_norm": (None, False),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}
LAYER_TYPES = ("full_attention", "sliding_attention")


def read_model_config(
    directory: Path | str, overrides: Mapping[str, Any] | None, load_format: str
) -> ModelConfig:
    """What the directory's config.json says after merging `overrides` over it (nested objects merge too).

    Raises ConfigError when the file is missing or broken, and for an architecture or a field that is not supported.
    """
    directory = Path(directory)
    full = _merge(_read_json(directory / "config.json"), overrides or {})
    text = full.get("text_config")
    hf = {**_inherited(full), **text} if isinstance(text, dict) else full
    architecture = _architecture(full)
    find_family(architecture)
    _refuse_unimplemented(architecture, full, hf)
    read_packing(hf)
    try:
        config = _decide(directory, architecture, hf, load_format)
    except KeyError as missing:
        raise ConfigError(f"{directory / 'config.json'} lacks the field {missing.args[0]!r}") from None
    _check_shape(config)
    find_family(architecture).spec(config)  # refuses what only the family can judge
    return config


def _decide(directory: Path, architecture: str, hf: dict[str, Any], load_format: str) -> ModelConfig:
    heads = hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or (128 if architecture.startswith("Qwen3") else hf["hidden_size"] // heads)
    return ModelConfig(
        directory=str(directory),
        architecture=architecture,
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        max_position=max_position(hf, read_rope(hf, head_dim)),
        eos_ids=_eos_ids(directory, hf),
        load_format=load_format,
        hf=hf,
    )


def _check_shape(config: ModelConfig) -> None:
    """Sizes the operators are written for."""
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(
            f"{config.num_heads} attention heads do not divide among {config.num_kv_heads} KV heads"
        )
    if config.head_dim % 8:
        raise ConfigError(f"head_dim {config.head_dim} is not supported; it must be a multiple of 8")
    types = config.hf.get("layer_types")
    if types is not None and len(types) != config.num_layers:
        raise ConfigError(f"layer_types names {len(types)} layers, the model has {config.num_layers}")
    if unknown := sorted(set(types or ()) - set(LAYER_TYPES)):
        raise ConfigError(f"layer type {unknown[0]!r} is not supported; supported: {', '.join(LAYER_TYPES)}")


def _architecture(full: Mapping[str, Any]) -> str:
    names = full.get("architectures") or (full.get("text_config") or {}).get("architectures")
    if not names:
        raise ConfigError("config.json names no architecture (field 'architectures')")
    return str(names[0])


def _refuse_unimplemented(architecture: str, *configs: Mapping[str, Any]) -> None:
    for config in configs:
        for name, neutral in NEUTRAL.items():
            if config.get(name) not in neutral:
                raise ConfigError(
                    f"{name}={config[name]!r} in config.json is not supported for {architecture}"
                )


def _inherited(full: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that multimodal configs keep beside `text_config` though they speak of the text model."""
    names = ("tie_word_embeddings", "eos_token_id", "quantization_config")
    return {name: full[name] for name in names if name in full}


def _eos_ids(directory: Path, hf: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids of both configs: chat models often name one in each."""
    generation = directory / "generation_config.json"
    configs = [hf, _read_json(generation)] if generation.exists() else [hf]
    ids: list[int] = []
    for config in configs:
        found = config.get("eos_token_id")
        ids += found if isinstance(found, list) else [] if found is None else [found]
    return tuple(dict.fromkeys(ids))


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merge(merged[name], value) if both else value
    return merged


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path.parent} holds no {path.name}: it is not a model directory") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return content
