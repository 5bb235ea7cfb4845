"""Which implementation of which operator runs on which device.

A new fast operator is one file and one line here; the parity test over this table finds it by itself.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from xllm.core.errors import ConfigError
from xllm.ops.linear import Weight

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
}


@dataclass(frozen=True, slots=True)
class Ops:
    """The operators of one device, passed explicitly to a model. Contracts stand at the references in `TABLE`.

    Activations between operators are float32 on a CPU whatever the weights are: widening them would cost more than
    it saves, and the result is more accurate.
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


def load_ops(device: str, dtype: torch.dtype) -> Ops:
    """The fastest operators this machine has for `device` ("cpu", or "reference" for plain PyTorch).

    dtype is that of weights and KV cache. Raises ConfigError for a device or dtype nobody implements.
    """
    if device not in TABLE:
        raise ConfigError(f"device {device!r} has no operators; known: {', '.join(TABLE)}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(
            f"dtype {str(dtype).removeprefix('torch.')} is not supported; supported: float32, bfloat16"
        )
    names = TABLE["reference"] | (TABLE[device] if is_available(device) else {})
    return Ops(device=device, activation_dtype=torch.float32, **{op: resolve(at) for op, at in names.items()})


def resolve(at: str) -> Any:
    """The object that "module:attribute" names."""
    module, attribute = at.split(":")
    return getattr(importlib.import_module(module), attribute)


def is_available(device: str) -> bool:
    """Whether the fast operators of `device` can run on this machine; says why not in a log line."""
    if device == "cpu":
        from xllm.ops.cpu.library import load

        return load() is not None
    return True
