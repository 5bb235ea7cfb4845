"""Ways to keep weights in fewer bits, by the names that `--quantization` takes. Torch-free: memory is planned from it.

A new one is a weight class in a file of its own (see `xllm.ops.quantised`), one line here, and a product for each device
in `xllm.ops.table.QUANTISED`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from xllm.core.errors import ConfigError

GROUP = 128  # columns that share a scale where nobody says otherwise
CHUNK, BLOCK = 16, 128  # columns, see `xllm.ops.quantised.Int4Weight`


@dataclass(frozen=True, slots=True)
class Scheme:
    what: str  # for the start-up plan
    weight: str  # "module:class"
    row_bytes: Callable[[int, int | None], int]  # (columns, group or None) -> bytes one row takes


def int4_group(columns: int) -> int:
    """Columns to a group when we quantise ourselves: 128, or the widest narrower one that divides the row."""
    for group in (GROUP, 64, 32, 16):
        if columns % group == 0:
            return group
    raise ConfigError(f"int4 needs rows of a multiple of 16 columns, not {columns}")


def int4_shape(columns: int, group: int) -> tuple[int, int]:
    """(blocks, groups) of a row."""
    if group % CHUNK or columns % group:
        raise ConfigError(
            f"groups of {group} in rows of {columns} columns are not supported: a group must divide the row "
            f"and be a multiple of {CHUNK}"
        )
    return -(-columns // BLOCK), columns // group


def _byte_row(columns: int, group: int | None) -> int:
    return columns + 4  # a float32 scale


def _int4_row(columns: int, group: int | None) -> int:
    blocks, groups = int4_shape(columns, group or int4_group(columns))
    return blocks * BLOCK // 2 + 4 * groups


_INT4 = "xllm.ops.quantised:Int4Weight"
SCHEMES: dict[str, Scheme] = {
    "fp8": Scheme("8-bit floats, a scale per output; tokens too", "xllm.ops.quantised:Fp8Weight", _byte_row),
    "int8": Scheme("8-bit integers, a scale per output", "xllm.ops.quantised:Int8Weight", _byte_row),
    "int4": Scheme("4-bit integers, a scale per 128 inputs", _INT4, _int4_row),
    "awq": Scheme("4-bit integers of an AWQ checkpoint", _INT4, _int4_row),
    "gptq": Scheme("4-bit integers of a GPTQ checkpoint", _INT4, _int4_row),
}
