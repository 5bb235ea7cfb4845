"""Which implementation of which operator runs on which device.

A new fast operator is one file and one line here; the parity test over this table finds it by itself.
"""

import importlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from xllm.core.errors import ConfigError
from xllm.ops.linear import Weight
from xllm.ops.quantised import store_rows
from xllm.ops.schemes import SCHEMES

TABLE: dict[str, dict[str, str]] = {
    "reference": {
        "new_weight": "xllm.ops.linear:new_weight",
        "store_rows": "xllm.ops.linear:store_rows",
        "linear": "xllm.ops.linear:linear",
        "embedding": "xllm.ops.linear:embedding",
        "rms_norm": "xllm.ops.norm:rms_norm",
        "add_rms_norm": "xllm.ops.norm:add_rms_norm",
        "rope_and_cache": "xllm.ops.rotary:rope_and_cache",
        "attention": "xllm.ops.attention:attention",
        "silu_and_mul": "xllm.ops.activation:silu_and_mul",
        "decode_inputs": "xllm.ops.inputs:decode_inputs",
    },
    "cpu": {
        "new_weight": "xllm.ops.cpu.linear:new_weight",
        "store_rows": "xllm.ops.cpu.linear:store_rows",
        "linear": "xllm.ops.cpu.linear:linear",
        "embedding": "xllm.ops.cpu.linear:embedding",
        "rms_norm": "xllm.ops.cpu.rows:rms_norm",
        "add_rms_norm": "xllm.ops.cpu.rows:add_rms_norm",
        "rope_and_cache": "xllm.ops.cpu.rows:rope_and_cache",
        "attention": "xllm.ops.cpu.attention:attention",
        "silu_and_mul": "xllm.ops.cpu.rows:silu_and_mul",
    },
    "cuda": {
        "linear": "xllm.ops.cuda.linear:linear",
        "embedding": "xllm.ops.cuda.embedding:embedding",
        "rms_norm": "xllm.ops.cuda.norm:rms_norm",
        "add_rms_norm": "xllm.ops.cuda.norm:add_rms_norm",
        "rope_and_cache": "xllm.ops.cuda.rotary:rope_and_cache",
        "attention": "xllm.ops.cuda.attention:attention",
        "silu_and_mul": "xllm.ops.cuda.activation:silu_and_mul",
        "decode_inputs": "xllm.ops.cuda.inputs:decode_inputs",
    },
}

# A context in which operators are made ready, on several threads, without running: for devices that compile at run time.
COMPILING = {"cuda": "xllm.ops.cuda.launch:compiling"}

# Queries in a tile of `AttentionInputs.tiles`, for devices whose attention wants them.
QUERY_TILE = {"cuda": "xllm.ops.cuda.attention:QUERY_TILE"}

# Fused operators for steps of a few tokens, where launches cost more than arithmetic; absent where they gain nothing.
FEW: dict[str, dict[str, str]] = {
    "reference": {
        "max_tokens": "xllm.ops.few:MAX_TOKENS",
        "norm_linear": "xllm.ops.few:norm_linear",
        "linear_add": "xllm.ops.few:linear_add",
        "norm_gate_up": "xllm.ops.few:norm_gate_up",
        "rope_cache_attention": "xllm.ops.few:rope_cache_attention",
    },
    "cuda": {
        "max_tokens": "xllm.ops.cuda.few:MAX_TOKENS",
        "norm_linear": "xllm.ops.cuda.few:norm_linear",
        "linear_add": "xllm.ops.cuda.few:linear_add",
        "norm_gate_up": "xllm.ops.cuda.few:norm_gate_up",
        "rope_cache_attention": "xllm.ops.cuda.few_attention:rope_cache_attention",
    },
}

# Choosing tokens on the device alone. Not on a CPU: there each kind of request has its own way, which is faster.
SAMPLE = {"reference": "xllm.ops.sampling:sample", "cuda": "xllm.ops.cuda.sampling:sample"}

# Products with quantised weights, by scheme of `ops.schemes`. Where a device has none, such weights are refused: the
# reference dequantises all of a weight at every call.
QUANTISED: dict[str, dict[str, str]] = {
    "reference": {
        "fp8": "xllm.ops.quantised:fp8_linear",
        "int8": "xllm.ops.quantised:weight_only_linear",
        "int4": "xllm.ops.quantised:weight_only_linear",
        "awq": "xllm.ops.quantised:weight_only_linear",
        "gptq": "xllm.ops.quantised:weight_only_linear",
    },
    "cuda": {
        "fp8": "xllm.ops.cuda.quantised:fp8_linear",
        "int8": "xllm.ops.cuda.quantised:int8_linear",
        "int4": "xllm.ops.cuda.quantised:int4_linear",
        "awq": "xllm.ops.cuda.quantised:int4_linear",
        "gptq": "xllm.ops.cuda.quantised:int4_linear",
    },
}


@dataclass(frozen=True, slots=True)
class QuantisedOps:
    """Makes and fills weights of a scheme; `Ops.linear` multiplies with them as with plain ones."""

    scheme: str
    new_weight: Callable[
        [int, int, int | None], Weight
    ]  # rows, columns, columns to a group (None: the scheme's)
    store_rows: Callable[[Weight, int, Any], None]  # floats, which are quantised, or `ops.quantised.Rows`


@dataclass(frozen=True, slots=True)
class FewOps:
    """Half-layers as single operators, for decode steps of at most `max_tokens` sequences. Contracts in `ops.few`."""

    max_tokens: int
    norm_linear: Callable[..., torch.Tensor]
    linear_add: Callable[..., None]
    norm_gate_up: Callable[..., torch.Tensor]
    rope_cache_attention: Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class Ops:
    """The operators of one device, passed explicitly to a model. Contracts stand at the references in `TABLE`.

    Activations between operators are float32 on a CPU whatever the weights are: narrowing them would cost more than
    it saves, and the result is more accurate. On a card they are of the weights' dtype.
    """

    device: str
    activation_dtype: torch.dtype
    new_weight: Callable[[int, int, torch.dtype], Weight]
    store_rows: Callable[[Weight, int, torch.Tensor], None]
    linear: Callable[[torch.Tensor, Weight, torch.Tensor | None], torch.Tensor]
    embedding: Callable[[torch.Tensor, Weight, torch.dtype], torch.Tensor]
    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    add_rms_norm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
    rope_and_cache: Callable[..., torch.Tensor]
    attention: Callable[..., torch.Tensor]
    silu_and_mul: Callable[[torch.Tensor], torch.Tensor]
    decode_inputs: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]
    few: FewOps | None = None
    query_tile: int = 0  # 0: attention here needs no tiles
    sample: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
    quantised: QuantisedOps | None = None
    compiling: Callable[[int], AbstractContextManager[None]] | None = None  # takes the number of threads


def load_ops(device: str, dtype: torch.dtype, quantization: str | None = None) -> Ops:
    """The fastest operators this machine has for `device` ("cpu", or "reference" for plain PyTorch).

    dtype is that of weights and KV cache; `quantization` names the scheme of quantised weights, which may then stand
    beside plain ones. Raises ConfigError for a device, dtype or scheme nobody implements.
    """
    if device not in TABLE:
        raise ConfigError(f"device {device!r} has no operators; known: {', '.join(TABLE)}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(
            f"dtype {str(dtype).removeprefix('torch.')} is not supported; supported: float32, bfloat16"
        )
    available = is_available(device)
    if device == "cuda" and not available:
        raise ConfigError(
            "device 'cuda' needs an NVIDIA GPU and the package triton, which comes with PyTorch for CUDA"
        )
    names = TABLE["reference"] | (TABLE[device] if available else {})
    ops = Ops(
        device=device,
        activation_dtype=dtype if device == "cuda" else torch.float32,
        few=load_few(device),
        query_tile=resolve(QUERY_TILE[device]) if device in QUERY_TILE else 0,
        sample=resolve(SAMPLE[device]) if device in SAMPLE else None,
        compiling=resolve(COMPILING[device]) if device in COMPILING else None,
        **{op: resolve(at) for op, at in names.items()},
    )
    return ops if quantization is None else with_quantised(ops, quantization)


def with_quantised(ops: Ops, scheme: str) -> Ops:
    """These operators for quantised weights too; those for few tokens know none. Raises ConfigError."""
    if scheme not in QUANTISED.get(ops.device, {}):
        devices = ", ".join(device for device, known in QUANTISED.items() if scheme in known)
        raise ConfigError(
            f"weights in {scheme} cannot be multiplied on {ops.device!r}; devices that can: {devices or 'none'}"
        )
    kind = resolve(SCHEMES[scheme].weight)
    plain, quantised = ops.linear, resolve(QUANTISED[ops.device][scheme])

    def linear(x_TK: torch.Tensor, weight: Weight, bias_N: torch.Tensor | None) -> torch.Tensor:
        product = quantised if isinstance(weight, kind) else plain
        return product(x_TK, weight, bias_N)

    return replace(ops, linear=linear, quantised=QuantisedOps(scheme, kind, store_rows), few=None)


def load_few(device: str) -> FewOps | None:
    """The fused operators of `device`, None where it has none. "reference" has some for the parity test alone."""
    if device == "reference" or device not in FEW:
        return None
    return FewOps(**{op: resolve(at) for op, at in FEW[device].items()})


def resolve(at: str) -> Any:
    """The object that "module:attribute" names."""
    module, attribute = at.split(":")
    return getattr(importlib.import_module(module), attribute)


def is_available(device: str) -> bool:
    """Whether the fast operators of `device` can run on this machine; says why not in a log line."""
    if device == "cpu":
        from xllm.ops.cpu.library import load

        return load() is not None
    if device == "cuda":
        return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    return True
