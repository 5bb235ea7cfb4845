"""The device's thread: plans go in, futures of results come out, in the order they went in."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from xllm.core.plan import StepPlan, StepResult

T = TypeVar("T")


class RunsPlans(Protocol):
    progress: int  # grows as long as the device advances, also inside a long step

    def run(self, plan: StepPlan) -> StepResult: ...


class Executor:
    """All work on the device happens in one thread of its own, so that the loop can plan while a step runs.

    `build` runs in that thread too (threads, streams and contexts belong to who uses them). With depth 1 nothing
    would overlap: the caller's thread does the work itself and saves two thread hops.
    """

    def __init__(self, build: Callable[[], RunsPlans], *, depth: int):
        self._inline = depth == 1
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="xllm-executor")
        self._runner = self._call(build).result()

    @property
    def progress(self) -> int:
        return self._runner.progress

    def submit(self, plan: StepPlan) -> "Future[StepResult]":
        return self._call(lambda: self._runner.run(plan))

    def close(self) -> None:
        """Waits for steps in flight."""
        self._thread.shutdown(wait=True)

    def _call(self, work: Callable[[], T]) -> "Future[T]":
        if not self._inline:
            return self._thread.submit(work)
        future: Future[T] = Future()
        try:
            future.set_result(work())
        except Exception as e:
            future.set_exception(e)
        return future
