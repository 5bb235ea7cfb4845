"""How much memory a model takes, from its config alone. Torch-free: memory is planned before torch is imported."""

from xllm.config.decided import ModelConfig
from xllm.core.errors import ConfigError
from xllm.models.quantisation import is_quantised, read_packing
from xllm.models.spec import Parameter
from xllm.models.table import find_family
from xllm.ops.schemes import SCHEMES

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
KV_ITEM_BYTES = ITEM_BYTES | {"float8_e4m3fn": 1}


def weight_bytes(config: ModelConfig, dtype: str, quantization: str | None = None) -> int:
    """Bytes of all parameters once loaded; norms and biases are kept in float32."""
    size = item_bytes(dtype, ITEM_BYTES)
    packing = read_packing(config.hf)

    def bytes_of(parameter: Parameter) -> int:
        if quantization is None or not is_quantised(parameter):
            return parameter.numel * (size if parameter.kind == "weight" else 4)
        rows, columns = parameter.shape
        group = (packing.group or columns) if packing else None
        return rows * SCHEMES[quantization].row_bytes(columns, group)

    return sum(map(bytes_of, find_family(config.architecture).parameters(config)))


def kv_bytes_per_token(config: ModelConfig, dtype: str) -> int:
    """Bytes one token takes in the KV cache over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * item_bytes(dtype, KV_ITEM_BYTES)


def item_bytes(dtype: str, known: dict[str, int]) -> int:
    if dtype not in known:
        raise ConfigError(f"dtype {dtype!r} is not supported; supported: {', '.join(known)}")
    return known[dtype]
