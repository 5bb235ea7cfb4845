"""How a checkpoint says that its weights are quantised (`quantization_config` in config.json). Torch-free.

What each method's tensors are is in `xllm.models.packed`; a method is a reader here and a format there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from xllm.core.errors import ConfigError
from xllm.models.spec import Parameter


@dataclass(frozen=True, slots=True)
class Packing:
    scheme: str  # "awq" | "gptq" | "fp8"
    group: int | None = None  # columns that share a scale; None: the whole row
    zero_offset: int = 0  # what must be added to a stored zero point


def is_quantised(parameter: Parameter) -> bool:
    """The linears of the layers; the embedding and the output projection stay as they are."""
    return parameter.kind == "weight" and parameter.name.startswith("layers.")


def read_packing(hf: Mapping[str, Any]) -> Packing | None:
    """None for a float checkpoint. Raises ConfigError for a method, or a variant of one, that nobody here reads."""
    config = hf.get("quantization_config")
    if not config:
        return None
    method = str(config.get("quant_method", "")).lower()
    if method not in READERS:
        raise ConfigError(
            f"the checkpoint is quantised by a method that is not supported (quant_method {method!r}); "
            f"supported: {', '.join(READERS)}"
        )
    return READERS[method](config)


def _awq(config: Mapping[str, Any]) -> Packing:
    _expect(config, "awq", "bits", (4,), missing=None)
    _expect(config, "awq", "version", ("gemm",), missing="gemm")
    _expect(config, "awq", "zero_point", (True,), missing=True)
    _only_lm_head("awq", config.get("modules_to_not_convert"))
    return Packing("awq", group=_group(config))


def _gptq(config: Mapping[str, Any]) -> Packing:
    _expect(config, "gptq", "bits", (4,), missing=None)
    _expect(config, "gptq", "checkpoint_format", ("gptq", "gptq_v2"), missing="gptq")
    for name in ("is_marlin_format", "lm_head", "dynamic"):
        if config.get(name):
            raise ConfigError(f"gptq checkpoints with {name}={config[name]!r} are not supported")
    _only_lm_head("gptq", config.get("modules_to_not_convert"))
    # before version 2 zero points were stored less one
    return Packing(
        "gptq", group=_group(config), zero_offset=int(config.get("checkpoint_format") != "gptq_v2")
    )


def _fp8(config: Mapping[str, Any]) -> Packing:
    if config.get("weight_block_size"):
        raise ConfigError(
            "fp8 checkpoints with a scale per block (weight_block_size) are not supported; "
            "a float checkpoint of the same model can be quantised as it loads: --quantization fp8"
        )
    _expect(config, "fp8", "activation_scheme", ("dynamic",), missing="dynamic")
    _only_lm_head("fp8", config.get("ignored_layers") or config.get("modules_to_not_convert"))
    return Packing("fp8")


def _compressed(config: Mapping[str, Any]) -> Packing:
    """compressed-tensors holds many schemes; the one we read is fp8 with scales per row or tensor, tokens dynamic."""
    method = "compressed-tensors"
    _expect(config, method, "format", ("float-quantized",), missing=None)
    _only_lm_head(method, config.get("ignore"))
    for group in (config.get("config_groups") or {}).values():
        weights, tokens = group.get("weights") or {}, group.get("input_activations") or {}
        for part in (weights, tokens):
            _expect(part, method, "num_bits", (8,), missing=None)
            _expect(part, method, "type", ("float",), missing=None)
        _expect(weights, method, "strategy", ("channel", "tensor"), missing=None)
        _expect(weights, method, "symmetric", (True,), missing=True)
        _expect(tokens, method, "dynamic", (True,), missing=None)
        if group.get("targets", ["Linear"]) != ["Linear"]:
            raise ConfigError(f"{method} checkpoints with targets={group['targets']!r} are not supported")
    if config.get("kv_cache_scheme"):
        raise ConfigError(f"{method} checkpoints with scales of the KV cache are not supported")
    return Packing("fp8")


READERS: dict[str, Callable[[Mapping[str, Any]], Packing]] = {
    "awq": _awq,
    "gptq": _gptq,
    "fp8": _fp8,
    "compressed-tensors": _compressed,
}


def _expect(
    config: Mapping[str, Any], method: str, name: str, supported: tuple[Any, ...], missing: Any
) -> None:
    value = config.get(name, missing)
    value = value.lower() if isinstance(value, str) else value
    if value not in supported:
        raise ConfigError(
            f"{method} checkpoints with {name}={value!r} are not supported; supported: {', '.join(map(str, supported))}"
        )


def _group(config: Mapping[str, Any]) -> int | None:
    group = config.get("group_size", 128)
    if not isinstance(group, int) or (group < 1 and group != -1):
        raise ConfigError(f"group_size {group!r} in quantization_config is not a number of columns")
    return None if group == -1 else group


def _only_lm_head(method: str, names: list[str] | None) -> None:
    """Layers left out of quantisation are read where they are no layers of ours."""
    for name in names or ():
        if not name.removeprefix("re:").removeprefix(".*").startswith("lm_head"):
            raise ConfigError(
                f"{method} checkpoints with layers left unquantised ({name}) are not supported, but for lm_head"
            )
