"""The engine in this process for terminal commands: its event loop in a thread, we in the main one."""

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Coroutine
from queue import SimpleQueue
from typing import Any, TypeVar

from xllm.config.options import EngineOptions
from xllm.core.errors import EngineFault
from xllm.core.output import RequestOutput
from xllm.core.sampling import SamplingParams
from xllm.engine.async_llm import AsyncLLM
from xllm.server.answer import Answer, Piece
from xllm.server.console import Console
from xllm.server.templates import choose_template
from xllm.wire.messages import Loading

T = TypeVar("T")


class LocalModel:
    def __init__(self, options: EngineOptions, sampling: dict[str, Any]):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="xllm-terminal", daemon=True)
        self._thread.start()
        self._sampling = sampling
        try:
            self._engine = self._await(_start(options))
        except BaseException:
            self._end_loop()
            raise
        self._template = choose_template(self._engine.tokenizer, None)

    def chat(self, messages: list[dict[str, str]]) -> Answer:
        """Raises `XllmError`, for one when the conversation no longer fits."""
        if self._template is None:
            raise EngineFault("the model has no chat template; use `xllm complete`")
        text = self._template.render(messages)
        return self._answer(self._engine.tokenizer.encode(text, add_special_tokens=False))

    def complete(self, prompt: str) -> Answer:
        return self._answer(self._engine.tokenizer.encode(prompt))

    def close(self) -> None:
        self._await(self._engine.shutdown())
        self._end_loop()

    def _answer(self, ids: list[int]) -> Answer:
        params = SamplingParams(**({"max_tokens": None} | self._engine.default_params | self._sampling))
        queue: SimpleQueue[RequestOutput | None] = SimpleQueue()
        pump = asyncio.run_coroutine_threadsafe(_pump(self._engine.generate(ids, params), queue), self._loop)
        try:
            while (output := queue.get()) is not None:
                if output.error is not None:
                    raise EngineFault(output.error)
                for completion in output.outputs:
                    yield Piece(completion.text, len(completion.token_ids))
            pump.result()
        finally:
            pump.cancel()

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


async def _start(options: EngineOptions) -> AsyncLLM:
    console = Console(out=sys.stderr)

    def on_event(event: str | Loading) -> None:
        if isinstance(event, Loading) and sys.stderr.isatty():
            console.on_event(event)

    try:
        return await AsyncLLM.start(options, in_process=True, on_event=on_event)
    finally:
        console.end_progress()


async def _pump(outputs: AsyncIterator[RequestOutput], queue: "SimpleQueue[RequestOutput | None]") -> None:
    try:
        async for output in outputs:
            queue.put(output)
    finally:
        queue.put(None)
