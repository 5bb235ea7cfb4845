"""How much memory a model takes, from its config alone. Torch-free: memory is planned before torch is imported."""

from xllm.config.decided import ModelConfig
from xllm.core.errors import ConfigError
from xllm.models.table import find_family

ITEM_BYTES = {"float32": 4, "bfloat16": 2}


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of all parameters once loaded; norms and biases are kept in float32."""
    size = item_bytes(dtype)
    parameters = find_family(config.architecture).parameters(config)
    return sum(p.numel * (size if p.kind == "weight" else 4) for p in parameters)


def kv_bytes_per_token(config: ModelConfig, dtype: str) -> int:
    """Bytes one token takes in the KV cache over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * item_bytes(dtype)


def item_bytes(dtype: str) -> int:
    if dtype not in ITEM_BYTES:
        raise ConfigError(f"dtype {dtype!r} is not supported; supported: {', '.join(ITEM_BYTES)}")
    return ITEM_BYTES[dtype]
