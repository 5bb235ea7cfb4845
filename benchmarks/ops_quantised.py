"""Products with quantised weights on a card beside the plain one: `python -m benchmarks.ops_quantised [--model 8b]`.

Every way a product can be computed is timed for every number of tokens, whichever the operators would choose, so that
the borders in `xllm.ops.cuda.quantised` can be set from the table. Microseconds of a replayed graph; the weights are
cycled through more memory than the second-level cache holds, as the layers of a model are.
"""

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from xllm.ops.cuda import quantised
from xllm.ops.cuda.linear import linear
from xllm.ops.cuda.quantised_gemv import byte_gemv, int4_gemv
from xllm.ops.cuda.quantised_tiles import byte_tiles, int4_tiles
from xllm.ops.quantised import Fp8Weight, Int4Weight, Int8Weight, store_rows

SHAPES = {
    "0.6b": {"qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072)},
    "8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)},
}
CYCLED = 256 << 20  # bytes
CALLS = 24  # in a graph, at least
Product = Callable[[torch.Tensor, Any, torch.Tensor], Any]


def into(kernel: Callable[..., None]) -> Product:
    return lambda x, weight, y: kernel(x, weight, None, y)


def tokens_in_8_bits(x: torch.Tensor, weight: Fp8Weight, y: torch.Tensor) -> None:
    """What `fp8_linear` does with many tokens, whatever their number."""
    numbers, scales = quantised.quantise_tokens(x)
    torch._scaled_mm(
        numbers, weight.numbers.T, scales[:, None], weight.scales[None, :], out_dtype=torch.bfloat16
    )


# name -> (class of the weight, product, tokens it is for)
WAYS: dict[str, tuple[Any, Product, range]] = {
    "plain": (None, lambda x, weight, y: linear(x, weight, None), range(1, 1 << 20)),
    "plain cuBLAS": (None, lambda x, weight, y: F.linear(x, weight), range(1, 1 << 20)),
    "fp8 gemv": (Fp8Weight, into(byte_gemv), range(1, 2)),
    "fp8 tiles": (Fp8Weight, into(byte_tiles), range(1, 65)),
    "fp8 tokens too": (Fp8Weight, tokens_in_8_bits, range(1, 1 << 20)),
    "int8 gemv": (Int8Weight, into(byte_gemv), range(1, 2)),
    "int8 tiles": (Int8Weight, into(byte_tiles), range(1, 1025)),
    "int8 parts": (Int8Weight, into(quantised.by_parts), range(64, 1 << 20)),
    "int4 gemv": (Int4Weight, into(int4_gemv), range(1, 2)),
    "int4 tiles": (Int4Weight, into(int4_tiles), range(1, 1025)),
    "int4 parts": (Int4Weight, into(quantised.by_parts), range(64, 1 << 20)),
}


def weights(kind: Any, rows: int, columns: int) -> list[Any]:
    def make() -> Any:
        floats = torch.randn(rows, columns, dtype=torch.bfloat16)
        if kind is None:
            return floats
        weight = kind(rows, columns)
        store_rows(weight, 0, floats)
        return weight

    bytes_each = rows * columns * {None: 2, Int4Weight: 0.5}.get(kind, 1)
    return [make() for _ in range(int(CYCLED // bytes_each) + 1)]


def microseconds(call: Callable[[], Any], calls: int) -> float:
    """The median of a few replays of a graph of so many calls."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(7):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / calls)
    return sorted(times)[len(times) // 2]


def time_of(product: Product, made: list[Any], tokens: int, rows: int, columns: int) -> float:
    x = torch.randn(tokens, columns, dtype=torch.bfloat16)
    y = torch.empty(tokens, rows, dtype=torch.bfloat16)
    cycled = itertools.cycle(made)
    return microseconds(lambda: product(x, next(cycled), y), max(CALLS, len(made)))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="8b")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 2, 8, 16, 32, 64, 128, 256, 512, 2048])
    given = parser.parse_args()
    torch.set_default_device("cuda")
    for name, (rows, columns) in SHAPES[given.model].items():
        print(f"\n{name} {rows} x {columns}, us\n{'':16}" + "".join(f"{tokens:9}" for tokens in given.tokens))
        for way, (kind, product, meant_for) in WAYS.items():
            made = weights(kind, rows, columns)
            times = [
                f"{time_of(product, made, tokens, rows, columns):9.1f}" if tokens in meant_for else " " * 9
                for tokens in given.tokens
            ]
            print(f"{way:16}" + "".join(times), flush=True)
            del made
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
