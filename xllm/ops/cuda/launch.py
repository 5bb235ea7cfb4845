"""How kernels are started: a short way from Python, and programmatic dependent launch.

Programmatic dependent launch (PDL; CUDA programming guide, "Programmatic Dependent Launch and Synchronization"; PTX
`griddepcontrol`) lets a kernel start while its predecessor in the stream still runs:

- A program of a kernel launched with `pdl` may start as soon as every program of the predecessor has called `trigger`
  or ended. `wait` returns once the predecessor is complete and what it wrote can be seen.
- The rule here: **every program waits, before it triggers, before its first store, and before it loads anything that
  its predecessor may have written.**

What follows from it, whoever the neighbours in the stream are:

- When `wait` returns, everything before is complete, not only the predecessor. One from here could not end before its
  own wait returned. One without the attribute (PyTorch, cuBLAS) started after all others were complete. Where cuBLAS
  links two kernels of its own in this way, the second does not end before the first.
- PyTorch and cuBLAS do not trigger for us: behind them our programs start as theirs have ended. If one did, `wait`
  would still wait for its end. A successor without the attribute starts when we are complete, whatever we triggered.
- All stores come after the wait, so memory that is used again (freed outputs, workspaces, counters, the residual) is
  no longer read by anybody before us.
- Weights may be loaded before the wait: no kernel of a forward pass writes them. Whoever changes weights while an
  engine lives synchronises before the next step. What else was written two or more kernels earlier may be loaded too
  where the predecessor is known to be from here: it waited before it triggered.
- Nothing can hang: programs start early only when all programs of the predecessor have started, and none of ours
  spins on another.
- In a captured graph the edge between two such kernels is a programmatic one and any other edge a full one: the same.

To trigger right after the wait pays where the successor has weights to load before its own wait; elsewhere it costs.
"""

import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
import triton
from triton import AsyncCompileMode
from triton import language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PDL = True  # what a benchmark turns off: 1 to 2 % of a layer at 32 to 256 tokens, more at fewer


@functools.cache
def has_pdl() -> bool:
    """Hopper and later have it; Triton's interpreter has not."""
    return os.environ.get("TRITON_INTERPRET") != "1" and torch.cuda.get_device_capability() >= (9, 0)


def uses_pdl() -> bool:
    """Whether kernels are launched with `pdl`."""
    return PDL and has_pdl()


@triton.jit
def wait(PDL: tl.constexpr):
    if PDL:
        gdc_wait()


@triton.jit
def trigger(PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()


_only_compiling: ContextVar[bool] = ContextVar("only_compiling", default=False)


@contextmanager
def compiling(threads: int) -> Iterator[None]:
    """Whatever this thread launches in here is compiled, on several threads, and does not run: results are garbage.

    Triton keeps what it compiled on disk, so this takes its time on a machine's first start only. What fails to compile
    is left to the launch that needs it.
    """
    with ThreadPoolExecutor(threads) as pool, AsyncCompileMode(pool, ignore_errors=True):
        token = _only_compiling.set(True)
        try:
            yield
        finally:
            _only_compiling.reset(token)


def only_compiling() -> bool:
    """Whether launches of this thread are compilations (see `compiling`)."""
    return _only_compiling.get()


def _compile_starter(kernel: Any) -> None:
    """Triton starts each kernel by a piece of C, which it has compiled when the kernel first runs: a quarter of a second
    each, one after the other. Where `kernel` is on its way, that piece comes right behind it, in the same thread."""
    future = getattr(kernel, "future", None)
    if future is not None and not hasattr(future, "starter_follows"):
        future.starter_follows = True
        future.add_done_callback(_compile_starter_of)


def _compile_starter_of(future: Any) -> None:
    with suppress(Exception):  # what fails here is tried again by the first launch, which says why it fails
        kernel = future.result()
        triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)  # keeps it on disk


def launch(function: Any, grid: tuple[int, ...], *arguments: object, **constants_and_options: object) -> Any:
    """`function[grid](...)`, or its compilation alone (see `compiling`)."""
    if _only_compiling.get():
        kernel = function.warmup(*arguments, grid=grid, **constants_and_options)
        _compile_starter(kernel)
        return kernel
    return function[grid](*arguments, **constants_and_options)


class Kernel:
    """A Triton kernel whose second and later launches with the same constants skip Triton's dispatch.

    Parameters are pointers and integers first, then constants (`tl.constexpr`), the last of them PDL. Triton compiles
    a kernel anew for other dtypes, other constants, and where a pointer or an integer is divisible by 16 or not. Here
    integers are declared `do_not_specialize`, so where dtypes and constants are the same and all pointers are aligned,
    the compiled kernel is the same. What is not aligned goes through Triton every time.
    """

    def __init__(self, function: Any):
        self._function = function
        self._compiled: dict[tuple[object, ...], Any] = {}

    def __call__(
        self,
        programs: int,
        *arguments: torch.Tensor | int,
        warps: int = 4,
        stages: int = 1,
        pdl: bool = False,
        **constants: object,
    ) -> None:
        """Launch so many programs. Constants come in the order of the kernel's parameters; integers have 32 bits."""
        values: list[int] = []
        kind: list[object] = [warps, stages, pdl, *constants.values()]
        addresses = 0
        for argument in arguments:
            if isinstance(argument, int):
                values.append(argument)
            else:
                address = argument.data_ptr()
                addresses |= address
                values.append(address)
                kind.append(argument.dtype)
        aligned = addresses % 16 == 0
        key = tuple(kind)
        only_compiling = _only_compiling.get()
        compiled = self._compiled.get(key) if aligned and not only_compiling else None
        if compiled is not None:
            compiled[(programs, 1, 1)](*values, *constants.values(), pdl)
            return
        options = {"num_warps": warps, "num_stages": stages, "launch_pdl": pdl}
        compiled = launch(self._function, (programs,), *arguments, **constants, PDL=pdl, **options)
        if aligned and compiled is not None and not only_compiling:  # the interpreter returns None
            assert self._function.arg_names[len(arguments) :] == [*constants, "PDL"]
            self._compiled[key] = compiled
