"""Where steps run: plans go in, results come out, in the order they went in."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from xllm.core.places import PlaceOrder
from xllm.core.plan import StepPlan, StepResult
from xllm.core.segments import SegmentNews, SegmentOrder
from xllm.core.stats import ExecutorStats
from xllm.core.transfer import News, Order

if TYPE_CHECKING:
    from xllm.executor.contiguous import ContiguousMemory
    from xllm.executor.kv_memory import ElasticMemory
    from xllm.executor.mover import Mover
    from xllm.executor.trace import Trace  # brings PyTorch's profiler

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class RunsPlans(Protocol):
    progress: int  # grows as long as the device advances, also inside a long step
    memory: "ElasticMemory | None"  # under the KV cache, where it comes and goes
    places: "ContiguousMemory | None"  # the same, where sequences have addresses of their own
    mover: "Mover | None"  # of KV between the device and lower tiers, where there are any

    @property
    def stats(self) -> ExecutorStats: ...

    def run(self, plan: StepPlan) -> StepResult: ...

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Submits a step; what it returns waits for the result."""
        ...

    def improve(self) -> bool:
        """Spare-time work that makes later steps faster; False when there is none."""
        ...

    def sleep(self) -> None: ...

    def wake_up(self) -> None: ...


class Outcome(Protocol[T_co]):
    """What a Future is to who waits for it."""

    def result(self) -> T_co: ...

    def exception(self) -> BaseException | None: ...


class Executor:
    """All work on the device happens in one thread, so that the loop can plan while a step runs.

    On a synchronous device that is a thread of its own. With depth 1 nothing would overlap, and an asynchronous device
    overlaps by itself: there the caller's thread does the work and saves two thread hops. `build` runs in the same
    thread (threads, streams and contexts belong to who uses them).
    """

    def __init__(self, build: Callable[[], RunsPlans], *, depth: int, asynchronous: bool = False):
        self._inline = depth == 1 or asynchronous
        self._asynchronous = asynchronous
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="xllm-executor")
        self._trace: Trace | None = None
        self._runner = self._call(build).result()

    @property
    def progress(self) -> int:
        return self._runner.progress

    def submit(self, plan: StepPlan) -> Outcome[StepResult]:
        if not self._asynchronous:
            return self._call(lambda: self._runner.run(plan))
        try:
            return _Launched(self._runner.launch(plan))
        except Exception as e:
            failed: Future[StepResult] = Future()
            failed.set_exception(e)
            return failed

    @property
    def stats(self) -> ExecutorStats:
        return self._runner.stats

    def move(self, orders: Sequence[Order], void: Sequence[int] = ()) -> None:
        """KV between the device and lower tiers, behind all steps submitted so far; `void` records on disk first."""
        mover = self._runner.mover
        assert mover is not None, "orders come where there are tiers"
        self._call(lambda: mover.start(orders, void))

    def news(self) -> list[News]:
        """What became of orders since the last time."""
        return [] if self._runner.mover is None else self._runner.mover.news()

    def wait_for_news(self, seconds: float) -> None:
        if self._runner.mover is not None:
            self._runner.mover.wait(seconds)

    @property
    def blocks_per_segment(self) -> int:
        """0 where the memory of the KV cache does not come and go."""
        return 0 if self._runner.memory is None else self._runner.memory.blocks_per_segment

    def resize(self, orders: Sequence[SegmentOrder]) -> None:
        """Memory under the KV cache. No step in flight touches what is to go."""
        assert self._runner.memory is not None, "only an elastic pool is resized"
        self._runner.memory.mapper.start(orders)

    def resized(self) -> list[SegmentNews]:
        return [] if self._runner.memory is None else self._runner.memory.mapper.news()

    def wait_until_resized(self, seconds: float) -> None:
        if self._runner.memory is not None:
            self._runner.memory.mapper.wait(seconds)

    @property
    def places(self) -> "ContiguousMemory | None":
        """Where sequences have addresses of their own; to look at."""
        return self._runner.places

    def map(self, orders: Sequence[PlaceOrder]) -> None:
        """Pages of the KV cache. No step in flight touches a place that changes."""
        assert self._runner.places is not None, "only a contiguous pool has places"
        self._runner.places.start(orders)

    def recovered(self) -> list[tuple[int, bytes]]:
        """(slot, name) of blocks that an earlier run left on disk, least recently written first."""
        return [] if self._runner.mover is None else self._runner.mover.recover()

    def improve(self) -> bool:
        """To be called when no step is in flight; False when there was nothing to do."""
        return self._inline and self._runner.improve()

    def sleep(self) -> None:
        """Give the device's memory back; nothing may run until `wake_up`."""
        self._call(self._runner.sleep).result()

    def wake_up(self) -> None:
        """Raises what the device raises where the memory is not there; then it still sleeps."""
        self._call(self._runner.wake_up).result()

    def start_trace(self) -> None:
        """Records steps until `stop_trace`. The caller sees to it that no other trace is being taken."""
        from xllm.executor.trace import Trace

        self._trace = self._call(Trace).result()

    def stop_trace(self, directory: Path) -> tuple[Path, str]:
        """As `Trace.stop`."""
        trace, self._trace = self._trace, None
        assert trace is not None, "only a trace that was started can be stopped"
        return self._call(lambda: trace.stop(directory)).result()

    @property
    def tracing(self) -> bool:
        return self._trace is not None

    def close(self) -> None:
        """Waits for steps in flight, and for KV on its way to host memory."""
        self._thread.shutdown(wait=True)
        if self._runner.mover is not None:
            self._runner.mover.close()
        if self._runner.memory is not None:
            self._runner.memory.close()
        if self._runner.places is not None:
            self._runner.places.close()

    def _call(self, work: Callable[[], T]) -> "Future[T]":
        if not self._inline:
            return self._thread.submit(work)
        future: Future[T] = Future()
        try:
            future.set_result(work())
        except Exception as e:
            future.set_exception(e)
        return future


class _Launched:
    """A step that runs on the device."""

    def __init__(self, finish: Callable[[], StepResult]):
        self._finish = finish

    def result(self) -> StepResult:
        return self._finish()

    def exception(self) -> BaseException | None:
        try:
            self._finish()
        except Exception as e:
            return e
        return None
