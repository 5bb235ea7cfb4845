"""What the server needs of an engine. `AsyncLLM` is one; the tests' fake is another."""

from collections.abc import AsyncIterator
from typing import Any, Protocol

from xllm.config.decided import EngineConfig
from xllm.core.output import RequestOutput
from xllm.core.sampling import SamplingParams
from xllm.core.stats import SchedulerStats
from xllm.core.targets import NO_TARGETS, Targets
from xllm.engine.health import Health
from xllm.text.tokenizer import Tokenizer


class Engine(Protocol):
    """`generate` yields deltas and raises `InvalidRequest`, `Overloaded` or `Unavailable` on its first step.

    Cancelling or closing the iterator aborts the request.
    """

    config: EngineConfig
    tokenizer: Tokenizer
    default_params: dict[str, Any]

    def generate(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        cache_salt: str = "",
        targets: Targets = NO_TARGETS,
    ) -> AsyncIterator[RequestOutput]: ...

    def health(self) -> Health: ...

    def missing(self) -> str | None:
        """Why no request can be taken at present though the engine is well."""
        ...

    async def stats(self) -> SchedulerStats | None: ...

    def count(self) -> int: ...

    def stop_accepting(self) -> None: ...

    async def drain(self, timeout_s: float) -> bool: ...

    @property
    def asleep(self) -> bool: ...

    async def sleep(self, wait_s: float = 0.0) -> None:
        """Raises `Unavailable` where anything still runs after so long."""
        ...

    async def wake_up(self) -> None: ...

    async def limit_kv_memory(self, nbytes: int | None) -> int:
        """-> bytes that are taken. Raises `InvalidRequest` where that cannot be."""
        ...

    async def start_profile(self) -> None: ...

    async def stop_profile(self, directory: str) -> str: ...

    async def shutdown(self) -> None: ...
