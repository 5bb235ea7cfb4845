"""What of the operators for cards is timed, at the shapes of Qwen3: products with weights. The rest of a layer: `cuda_operators`; before and behind the layers: `cuda_ends`.

A case is one operator at one shape, in several ways: as the engine runs it, beside peers, with other settings.
Legend: as in `xllm.ops`.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

from xllm.ops import few, linear
from xllm.ops.cuda import few as half_layers
from xllm.ops.cuda import launch, quantised, tiling
from xllm.ops.cuda.skinny import skinny
from xllm.ops.quantised import store_rows
from xllm.ops.schemes import SCHEMES
from xllm.ops.table import QUANTISED, FewOps, Ops, resolve

COVER = 256 << 20  # bytes that the inputs in turn take together: several times what a card caches
EPS = 1e-6
BLOCK, LONGEST = 64, 40960  # tokens: of a block, of a context
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

Settings = tuple[tuple[object, str, object], ...]  # (module, name, what stands there meanwhile)
Found = Iterator[tuple[str, Settings]]  # settings worth trying, by name


@dataclass(frozen=True)
class Way:
    """One way to do what a case wants."""

    name: str
    step: Callable[
        [int], Any
    ]  # a call on inputs i, of as many as one likes; not pure where the case has a `reset`
    read: Callable[[Any], torch.Tensor] = lambda out: out  # what to check of its result
    settings: Settings = ()
    variant: bool = False  # the engine's way, set otherwise
    checked: bool = True

    def __call__(self, i: int) -> Any:
        with ExitStack() as held:
            for module, name, value in self.settings:
                held.enter_context(patch.object(module, name, value))
            return self.step(i)


@dataclass(frozen=True)
class Case:
    kernel: str
    setting: str
    ways: list[Way]  # the first is what the engine does
    exact: Callable[[], torch.Tensor]  # what inputs 0 should give
    moved: float  # bytes that must pass through memory
    flops: float = 0.0
    sets: int = 1  # of inputs
    reset: Callable[[], object] | None = None  # restores what a call changes
    limit: float = 2e-2  # of the relative error


@dataclass(frozen=True)
class Model:
    name: str
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    layers: int

    @property
    def width(self) -> int:
        """Of a token's query, key and value."""
        return (self.q_heads + 2 * self.kv_heads) * self.head_dim

    @property
    def weights(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of a layer's."""
        return {
            "qkv": (self.width, self.hidden),
            "o": (self.hidden, self.q_heads * self.head_dim),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


MODELS = {
    "0.6B": Model("0.6B", 1024, 16, 8, 128, 3072, 151936, 28),
    "8B": Model("8B", 4096, 32, 8, 128, 12288, 151936, 36),
}
TINY = Model("tiny", 128, 4, 2, 64, 160, 700, 2)


@dataclass(frozen=True)
class Scope:
    model: Model
    ops: Ops
    variants: bool
    dry: bool

    @property
    def few(self) -> FewOps:
        assert self.ops.few is not None
        return self.ops.few

    def cut(self, shapes: Iterable[tuple[int, ...]], *most: int) -> list[tuple[int, ...]]:
        """Smaller ones for a dry run."""
        if self.dry:
            shapes = (tuple(map(min, shape, most)) for shape in shapes)
        return list(dict.fromkeys(shapes))

    def tokens(self, *counts: int) -> list[int]:
        return [count for (count,) in self.cut(((count,) for count in counts), 33)]

    def sets(self, size: int, most: int = 256) -> int:
        """So many inputs of so many bytes are used in turn; `most` where those of a step lie in the cache, too."""
        return 2 if self.dry else min(most, 1 + COVER // size)

    def vary(self, way: Way, found: Found) -> list[Way]:
        if not self.variants:
            return []
        return [replace(way, name=name, settings=settings, variant=True) for name, settings in found]

    def weights(self, rows: int, columns: int) -> list[torch.Tensor]:
        return [draw(rows, columns, scale=columns**-0.5) for _ in range(self.sets(rows * columns * 2))]


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16).mul_(scale)


def constants(module: object, **values: tuple[int, ...]) -> Found:
    """Other values of a module's constants."""
    for name, others in values.items():
        for value in others:
            yield f"{name.lower()} {value}", ((module, name, value),)


def always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def neighbours(cut: Any, **values: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """Settings that differ from these in one number."""
    for name, others in values.items():
        for value in others:
            if value != getattr(cut, name):
                yield f"{name} {value}", replace(cut, **{name: value})


def without_pdl() -> Found:
    """Without dependent launch."""
    yield "no pdl", ((launch, "PDL", False),)


def gemvs(tokens: int, rows: int, columns: int, gated: bool = False) -> Found:
    yield from without_pdl()
    cut = tiling.gemv(tokens, rows, columns, gated)
    found: Iterator[tuple[str, Any]] = iter(())
    if tokens == 1:
        found = neighbours(cut, rows=(2, 4, 8, 16), tile=(512, 1024, 2048), warps=(2, 4, 8), ahead=(0, 1, 3))
    elif tokens == 4:
        found = neighbours(
            cut, rows=(4, 8, 16, 32), tile=(128, 256, 512), warps=(2, 4, 8), ahead=(0, 1), fold=(4, 8), stages=(3, 5)
        )  # fmt: skip
    for name, other in found:
        if tokens == 1:  # all in straight code
            tiles = tiling.programs_for(columns, other.tile)
            other = replace(other, unrolled=tiles, ahead=min(other.ahead, tiles))
        yield name, ((tiling, "gemv", always(other)),)


def skinnies(tokens: int, rows: int, columns: int) -> Found:
    """Around what is chosen for 16 tokens; for 1 token and for more than 16 whether such a kernel pays at all."""
    padded, cut = max(tokens, 16), tiling.skinny(rows, columns, False)
    found: Iterator[tuple[str, Any]] = iter(())
    if tokens == 16:
        yield from without_pdl()
        found = neighbours(cut, rows=(16, 32, 64, 128), tile=(64, 128, 256), splits=(1, 2, 4), stages=(3, 5))
    elif tokens in (1, 32, 64):
        found = chain([("skinny", cut)], neighbours(cut, stages=(3,), warps=(8,)))
    sums = tiling.SPLIT_PROGRAMS * tiling.SPLIT_ROWS * tiling.SKINNY_TOKENS
    for name, other in found:
        programs = tiling.programs_for(rows, other.rows) * other.splits
        tiles = tiling.programs_for(columns, other.tile)
        each = tiling.programs_for(tiles, other.splits)
        room = programs <= tiling.SPLIT_PROGRAMS and programs * other.rows * padded <= sums
        if other.splits == 1 or (room and tiling.programs_for(tiles, each) == other.splits):  # none is empty
            yield name, ((tiling, "skinny", always(other)), (tiling, "SKINNY_TOKENS", padded))


def linear_cases(scope: Scope) -> Iterator[Case]:
    """Products with plain weights, beside cuBLAS."""
    m = scope.model
    for name, shape in (m.weights | {"lm_head": (m.vocab, m.hidden)}).items():
        all_NK = scope.weights(*shape)
        for tokens in scope.tokens(*TOKENS):
            yield _linear(scope, name, all_NK, tokens)


def _linear(scope: Scope, name: str, all_NK: list[torch.Tensor], tokens: int) -> Case:
    (rows, columns), count = all_NK[0].shape, len(all_NK)
    x = draw(tokens, columns)
    way = Way("", lambda i: scope.ops.linear(x, all_NK[i % count], None))
    ways = [way, Way("cuBLAS", lambda i: F.linear(x, all_NK[i % count]))]
    if tokens == 1 and name == "lm_head":  # the other weights see one token in half-layers
        ways += scope.vary(way, gemvs(tokens, rows, columns))
    by_skinny = Way("", lambda i: skinny(x, all_NK[i % count], None))
    return Case(
        f"linear {name}", f"{tokens} tokens", ways + scope.vary(by_skinny, skinnies(tokens, rows, columns)),
        lambda: linear.linear(x.float(), all_NK[0].float(), None),
        moved=2 * (rows * columns + tokens * (rows + columns)), flops=2 * tokens * rows * columns, sets=count,
    )  # fmt: skip


def half_layer_cases(scope: Scope) -> Iterator[Case]:
    """The products of `ops.few`, beside single operators."""
    kernels = {"qkv": "norm_linear", "o": "linear_add", "gate_up": "norm_gate_up", "down": "linear_add"}
    for name, kernel in kernels.items():
        all_NK = scope.weights(*scope.model.weights[name])
        for tokens in scope.tokens(1, 2, 4, 8):
            yield _half_layer(scope, name, kernel, all_NK, tokens)


def _half_layer(scope: Scope, name: str, kernel: str, all_NK: list[torch.Tensor], tokens: int) -> Case:
    adds, gated = kernel == "linear_add", kernel == "norm_gate_up"
    (rows, columns), count = all_NK[0].shape, len(all_NK)
    outputs = rows // 2 if gated else rows
    x, gain, before = draw(tokens, columns), draw(columns), draw(tokens, outputs)
    residual = before.clone()

    def run(ops: Any, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if adds:
            ops.linear_add(x, weight, None, residual)
            return residual
        y: torch.Tensor = getattr(ops, kernel)(x, gain.to(x.dtype), EPS, weight, None)
        return y

    way = Way("", lambda i: run(scope.few, x, all_NK[i % count], residual))
    single = replace(way, name="single operators", settings=((half_layers, "fits", always(False)),))
    return Case(
        f"{kernel} {name}", f"{tokens} tokens",
        [way, single, *scope.vary(way, gemvs(tokens, outputs, columns, gated))],
        lambda: run(few, x.float(), all_NK[0].float(), before.float()),
        moved=2 * (rows * columns + tokens * (outputs + columns)), flops=2 * tokens * rows * columns, sets=count,
        reset=(lambda: residual.copy_(before)) if adds else None,
    )  # fmt: skip


def quantised_cases(scope: Scope) -> Iterator[Case]:
    """Products with quantised weights, beside those with as many plain ones."""
    for name, (rows, columns) in scope.model.weights.items():
        plain = scope.weights(rows, columns)
        for scheme in ("fp8", "int8", "int4"):
            kind = resolve(SCHEMES[scheme].weight)
            weights = [kind(rows, columns)]
            size = weights[0].numbers.nbytes + weights[0].scales.nbytes
            weights += [kind(rows, columns) for _ in range(1, scope.sets(size))]
            for weight in weights:
                store_rows(weight, 0, draw(rows, columns, scale=columns**-0.5))
            for tokens in scope.tokens(1, 16, 256):
                yield _quantised(scope, name, scheme, weights, size, plain, tokens)


def _quantised(
    scope: Scope,
    name: str,
    scheme: str,
    weights: list[Any],
    size: int,
    plain: list[torch.Tensor],
    tokens: int,
) -> Case:
    rows, columns = plain[0].shape
    x, product = draw(tokens, columns), resolve(QUANTISED["cuda"][scheme])
    way = Way("", lambda i: product(x, weights[i % len(weights)], None))
    in_bfloat16 = Way("bfloat16", lambda i: scope.ops.linear(x, plain[i % len(plain)], None), checked=False)

    def found() -> Found:
        yield from without_pdl()
        border = "KEPT_TOKENS" if scheme == "fp8" else "TILED_TOKENS"
        if tokens > 1:  # the kernel of the other side of the border
            above = tokens > getattr(quantised, border)
            yield "other kernel", ((quantised, border, 1 << 30 if above else 1),)

    return Case(
        f"{scheme} {name}", f"{tokens} tokens", [way, in_bfloat16, *scope.vary(way, found())],
        lambda: F.linear(x.float(), weights[0].dequantise()),
        moved=size + 2 * tokens * (rows + columns), flops=2 * tokens * rows * columns, sets=len(weights),
        limit=4e-2,  # fp8 rounds tokens to 8 bits, too
    )  # fmt: skip
