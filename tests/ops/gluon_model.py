"""A model of what `hopper_kernel` needs of Gluon, on a CPU: every partition is a thread, and what a card does in its own
time happens late. Kernels written for a card run in it from their own source, slowly.

- A copy lands when a copy thread gets to it, in any order; a product is computed when it is waited for. So whoever
  gives a place away too early, or reads it too early, multiplies something else. Shared memory begins as NaN.
- Barriers count as the hardware's do: a phase is over when all arrivals and all bytes expected have come.
- If nobody can go on, `Stuck` is raised. Threads take turns at random, from a seed.

Of layouts it knows only that columns lie together in panels of 64. Registers, banks and fences are not modelled.
"""

import importlib.util
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

PANEL = 64


class Stuck(Exception):
    pass


class Program:
    """One program's threads, of which one runs at a time."""

    current: "Program"

    def __init__(self, index: int, programs: int, seed: int):
        self.index, self.programs = index, programs
        self.random = random.Random(seed)
        self.turn = threading.Condition()
        self.waiting: dict[object, Callable[[], bool]] = {}  # what each thread waits for
        self.running: object = None
        self.failure: BaseException | None = None
        self.copies: list[Callable[[], None]] = []
        self.own = threading.local()  # products that the thread has not waited for
        Program.current = self

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others go first, and go on once `ready`."""
        with self.turn:
            self.waiting[threading.get_ident()] = ready
            self._choose()
            self._wait()

    def _wait(self) -> None:
        me = threading.get_ident()
        while self.running != me:
            if self.failure is not None:
                raise SystemExit
            self.turn.wait()
        del self.waiting[me]

    def _choose(self) -> None:
        """Copies land when nobody can go on, or at random before that."""
        while self.failure is None:
            able = [who for who, ready in self.waiting.items() if ready()]
            if self.copies and (not able or self.random.random() < 0.3):
                self.copies.pop(self.random.randrange(len(self.copies)))()
                continue
            if not able and self.waiting:
                self.failure = Stuck(f"{len(self.waiting)} threads wait for one another")
            self.running = self.random.choice(able) if able else None
            break
        self.turn.notify_all()

    def run(self, partitions: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        def body(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
            try:
                with self.turn:
                    self.waiting[threading.get_ident()] = lambda: True
                    if len(self.waiting) == len(partitions):
                        self._choose()
                    self._wait()
                function(*arguments)
            except BaseException as error:
                self.failure = self.failure or error
            with self.turn:
                self._choose()

        threads = [threading.Thread(target=body, args=given, daemon=True) for given in partitions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure


class Barrier:
    def init(self, count: int) -> None:
        self.count, self.arrived, self.bytes, self.phase = count, 0, 0, 0

    def index(self, _: object) -> "Barrier":
        return self

    def change(self, arrivals: int, bytes_: int) -> None:
        self.arrived += arrivals
        self.bytes += bytes_
        assert self.arrived <= self.count, "more arrivals than a phase has"
        if self.arrived == self.count and self.bytes == 0:
            self.arrived, self.phase = 0, self.phase + 1

    def wait(self, parity: Any) -> None:
        """Over is the phase of that parity: that now under way has the other."""
        Program.current.pause(lambda: self.phase & 1 != int(parity))


class Shared:
    """Numbers in shared memory, panel by panel."""

    def __init__(self, raw: torch.Tensor, shape: list[int], swapped: bool = False):
        self.raw, self.shape, self.swapped = raw, shape, swapped

    def index(self, i: Any) -> "Shared":
        size = self.raw.numel() // self.shape[0]
        assert 0 <= int(i) < self.shape[0]
        return Shared(self.raw[int(i) * size : (int(i) + 1) * size], self.shape[1:])

    def _reinterpret(self, _: object, shape: list[int], __: object) -> "Shared":
        assert torch.Size(shape).numel() == self.raw.numel()
        return Shared(self.raw, shape)

    def permute(self, _: object) -> "Shared":
        return Shared(self.raw, self.shape, True)

    def _panels(self) -> torch.Tensor:
        rows, columns = self.shape
        return self.raw.view(columns // PANEL, rows, PANEL)

    def load(self, _: object = None) -> torch.Tensor:
        value = self._panels().transpose(0, 1).flatten(1)
        return value.T.clone() if self.swapped else value.clone()

    def store(self, value: torch.Tensor) -> None:
        assert list(value.shape) == self.shape and value.dtype == self.raw.dtype
        self._panels().copy_(value.unflatten(1, (-1, PANEL)).transpose(0, 1))


class Pointer:
    def __init__(self, numbers: torch.Tensor, at: Any = 0):
        self.numbers, self.at = numbers, at

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.numbers, self.at + other)


def load(pointer: Pointer, mask: Any = True, other: float = 0, volatile: bool = False) -> torch.Tensor:
    at = torch.as_tensor(pointer.at)
    there = torch.as_tensor(mask).broadcast_to(at.shape)
    return torch.where(
        there, pointer.numbers[torch.where(there, at, 0)], torch.tensor(other, dtype=pointer.numbers.dtype)
    )


def store(pointer: Pointer, value: torch.Tensor, mask: torch.Tensor) -> None:
    there = mask.broadcast_to(value.shape)
    pointer.numbers[pointer.at[there]] = value[there]


class Product:
    def __init__(self, compute: Callable[[], torch.Tensor]):
        self.compute = compute
        self.value: torch.Tensor | None = None
        if not hasattr(Program.current.own, "products"):
            Program.current.own.products = []
        Program.current.own.products.append(self)


def multiply(
    a: Any, b: Shared, sum_: torch.Tensor, *, use_acc: bool = True, is_async: bool = False
) -> Product:
    def compute() -> torch.Tensor:
        left = a.load() if isinstance(a, Shared) else a
        product = left.float() @ b.load().float()
        return sum_ + product if use_acc else product

    assert is_async and (not use_acc or isinstance(sum_, torch.Tensor))
    return Product(compute)


def wait_for_products(outstanding: int, deps: list[Any]) -> Any:
    products = Program.current.own.products
    Program.current.pause()
    while len(products) > outstanding:
        product = products.pop(0)
        product.value = product.compute()
    values = [dep.value if isinstance(dep, Product) else dep for dep in deps]
    assert all(isinstance(value, torch.Tensor) for value in values), "used before it is there"
    return values[0] if len(values) == 1 else tuple(values)


def copy(kv: torch.Tensor, at: list[Any], barrier: Barrier, place: Shared) -> None:
    row, column = map(int, at)
    rows, columns = place.shape
    assert row >= 0 and row + rows <= kv.shape[0] and column >= 0 and column + columns <= kv.shape[1]

    def land() -> None:
        place.store(kv[row : row + rows, column : column + columns])
        barrier.change(0, -rows * columns * 2)

    Program.current.copies.append(land)
    Program.current.pause()


def arrive(barrier: Barrier) -> None:
    barrier.change(1, 0)
    Program.current.pause()


def allocate(dtype: torch.dtype, shape: list[int], _: object) -> Any:
    if dtype == torch.int64:
        barriers = [Barrier() for _ in range(shape[0])]
        return SimpleNamespace(index=lambda i: barriers[int(i)])
    return Shared(torch.full((torch.Size(shape).numel(),), float("nan"), dtype=dtype), shape)


def nothing(*_: Any, **__: Any) -> None:
    pass


def modules() -> dict[str, Any]:
    """What stands for Triton's modules."""

    def jit(function: Any = None, **_: Any) -> Any:
        return function or (lambda later: later)

    language = SimpleNamespace(
        constexpr=lambda value: value, static_range=range, bfloat16=torch.bfloat16, float32=torch.float32,
        int32=torch.int32, int64=torch.int64, load=load, store=store, allocate_shared_memory=allocate,
        NVMMASharedLayout=nothing, NVMMADistributedLayout=nothing, DotOperandLayout=nothing, SliceLayout=nothing,
        BlockedLayout=nothing, thread_barrier=nothing, exp2=torch.exp2, convert_layout=lambda value, _: value,
        program_id=lambda _: torch.tensor(Program.current.index, dtype=torch.int32),
        num_programs=lambda _: torch.tensor(Program.current.programs, dtype=torch.int32),
        arange=lambda begin, end, layout: torch.arange(begin, end, dtype=torch.int32),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        where=torch.where, max=lambda value, axis: value.amax(axis), sum=lambda value, axis: value.sum(axis),
        maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
        minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
        inline_asm_elementwise=lambda *given, **_: given[2][0],
        warp_specialize=lambda partitions, *_: Program.current.run(partitions),
    )  # fmt: skip
    barriers = SimpleNamespace(
        MBarrierLayout=nothing,
        init=lambda barrier, count: barrier.init(count),
        expect=lambda barrier, bytes_: barrier.change(1, int(bytes_)),
        arrive=arrive,
        wait=lambda barrier, parity: barrier.wait(parity),
    )
    hopper = SimpleNamespace(
        fence_async_shared=nothing,
        mbarrier=barriers,
        tma=SimpleNamespace(async_copy_global_to_shared=copy),
        warpgroup_mma=multiply,
        warpgroup_mma_wait=wait_for_products,
    )
    gluon = SimpleNamespace(jit=jit, language=language)
    at = "triton.experimental.gluon"
    return {
        "triton": SimpleNamespace(),
        "triton.experimental": SimpleNamespace(gluon=gluon),
        at: gluon,
        f"{at}.language": language,
        f"{at}.language.nvidia": SimpleNamespace(),
        f"{at}.language.nvidia.hopper": hopper,
    }


@contextmanager
def pretended() -> Iterator[None]:
    names = modules()
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(names)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def read_kernel(path: Path) -> ModuleType:
    """A module of kernels, as functions of this model."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_modelled", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pretended():
        spec.loader.exec_module(module)
    return module
