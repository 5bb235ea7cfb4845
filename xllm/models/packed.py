"""The tensors of a quantised checkpoint, and the rows they hold. A format is two functions and one line in `FORMATS`.

Legend: n output features of one checkpoint tensor, K input features, G groups of inputs. Eight 4-bit numbers lie in an
int32, the first in its lowest bits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from xllm.core.errors import ConfigError
from xllm.models.quantisation import Packing
from xllm.models.spec import Source
from xllm.ops.quantised import FP8, Fp8Rows, Int4Rows, Rows

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of 8 neighbouring outputs lies in nibble 0, 1, ...


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor that a packed matrix consists of."""

    shapes: tuple[tuple[int, ...], ...]  # any of these
    dtypes: tuple[torch.dtype, ...]
    optional: bool = False


Parts = dict[str, Part]  # last part of the tensor's name -> what it is
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Format:
    parts: Callable[[int, int, int], Parts]  # (n, K, G) -> parts
    read: Callable[[Tensors, Packing], Rows]  # of tensors on the device


def parts_of(source: Source, packing: Packing) -> dict[str, Part]:
    """Names of the checkpoint's tensors for the matrix `source`, whose name ends in ".weight" -> what they are."""
    n, columns = source.shape
    group = packing.group or columns
    if columns % group or (packing.scheme != "fp8" and n % 8):
        raise ConfigError(
            f"{source.tensor} of {n} x {columns} cannot be packed as {packing.scheme} with groups of {group} columns"
        )
    base = source.tensor.removesuffix("weight")
    parts = FORMATS[packing.scheme].parts(n, columns, columns // group)
    return {base + name: part for name, part in parts.items()}


def read_rows(
    source: Source, tensors: Mapping[str, torch.Tensor], packing: Packing, device: torch.device
) -> Rows:
    """The rows of the matrix `source` out of its tensors (by their full names). Raises ConfigError."""
    base = source.tensor.removesuffix("weight")
    there = {name.removeprefix(base): tensor.to(device) for name, tensor in tensors.items()}
    try:
        return FORMATS[packing.scheme].read(there, packing)
    except ConfigError as error:
        raise ConfigError(f"{source.tensor.removesuffix('.weight')}: {error}") from None


def unpack(words: torch.Tensor, axis: int) -> torch.Tensor:
    """int32 -> uint8, `axis` eight times as long: nibbles of a word beside each other."""
    nibbles = [((words >> 4 * i) & 15).to(torch.uint8) for i in range(8)]
    return torch.stack(nibbles, dim=axis + 1).flatten(axis, axis + 1)


def _awq_parts(n: int, columns: int, groups: int) -> Parts:
    return {
        "qweight": Part(((columns, n // 8),), (torch.int32,)),
        "qzeros": Part(((groups, n // 8),), (torch.int32,)),
        "scales": Part(((groups, n),), FLOATS),
    }


def _awq_rows(tensors: Tensors, packing: Packing) -> Int4Rows:
    """Packed along the outputs, which are shuffled within each eight (AutoAWQ's "gemm" version)."""
    place = torch.tensor(AWQ_ORDER, device=tensors["qweight"].device).argsort()

    def outputs(words: torch.Tensor) -> torch.Tensor:
        return unpack(words, 1).unflatten(1, (-1, 8))[:, :, place].flatten(1).T.contiguous()

    return Int4Rows(outputs(tensors["qweight"]), tensors["scales"].T.float(), outputs(tensors["qzeros"]))


def _gptq_parts(n: int, columns: int, groups: int) -> Parts:
    return {
        "qweight": Part(((columns // 8, n),), (torch.int32,)),
        "qzeros": Part(((groups, n // 8),), (torch.int32,)),
        "scales": Part(((groups, n),), FLOATS),
        "g_idx": Part(((columns,),), (torch.int32, torch.int64), optional=True),
    }


def _gptq_rows(tensors: Tensors, packing: Packing) -> Int4Rows:
    """Numbers packed along the inputs, zero points along the outputs (AutoGPTQ and GPTQModel)."""
    numbers_NK = unpack(tensors["qweight"], 0).T.contiguous()
    columns, groups = numbers_NK.shape[1], tensors["scales"].shape[0]
    if "g_idx" in tensors:
        in_order = torch.arange(columns, device=numbers_NK.device) // (columns // groups)
        if not torch.equal(tensors["g_idx"].long(), in_order):
            raise ConfigError(
                "its inputs are grouped out of order (g_idx of a checkpoint made with desc_act=true), which is not "
                "supported; checkpoints made with desc_act=false are"
            )
    # The offset is added to whole words: packers subtract it there, so carries between nibbles undo their borrows.
    zeros_GN = unpack(tensors["qzeros"] + packing.zero_offset * 0x11111111, 1)
    return Int4Rows(numbers_NK, tensors["scales"].T.float(), zeros_GN.T)


def _fp8_parts(n: int, columns: int, groups: int) -> Parts:
    return {
        "weight": Part(((n, columns),), (FP8,)),
        "weight_scale": Part(((), (1,), (n,), (n, 1)), FLOATS),
    }


def _fp8_rows(tensors: Tensors, packing: Packing) -> Fp8Rows:
    """A scale per tensor or per output."""
    numbers_NK = tensors["weight"]
    scales_N = tensors["weight_scale"].float().reshape(-1).expand(numbers_NK.shape[0])
    return Fp8Rows(numbers_NK, scales_N)


FORMATS: dict[str, Format] = {
    "awq": Format(_awq_parts, _awq_rows),
    "gptq": Format(_gptq_parts, _gptq_rows),
    "fp8": Format(_fp8_parts, _fp8_rows),
}
