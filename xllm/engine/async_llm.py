"""The engine for asyncio programs: tokenises, submits, and streams deltas back. The HTTP server's only way to it."""

import asyncio
import contextlib
import itertools
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import partial
from typing import Any

from xllm.config.decided import EngineConfig
from xllm.config.options import EngineOptions
from xllm.core.errors import ConfigError, InvalidRequest, Unavailable
from xllm.core.output import RequestOutput
from xllm.core.sampling import SamplingParams
from xllm.core.seeds import SeedSource
from xllm.core.stats import SchedulerStats
from xllm.core.targets import NO_TARGETS, Targets
from xllm.engine.build import decide
from xllm.engine.checkpoint import open_tokenizer, sampling_defaults
from xllm.engine.client import EngineClient, InlineClient, ProcessClient
from xllm.engine.gate import Gate
from xllm.engine.health import Health, HealthMonitor
from xllm.engine.outputs import OutputProcessor
from xllm.engine.prompts import Prompt, PromptReader
from xllm.engine.validate import Validator, kv_limit
from xllm.text.tokenizer import Tokenizer
from xllm.wire.doors import Listening
from xllm.wire.messages import (
    Abort,
    Heartbeat,
    LimitKv,
    Loading,
    Message,
    Outputs,
    Reply,
    ResetPrefixCache,
    Sleep,
    StartTrace,
    StopTrace,
    Submit,
    WakeUp,
)

log = logging.getLogger(__name__)
PUMP_WAIT_S = 0.1
ASLEEP = "the engine sleeps; POST /wake_up wakes it"
WATCH_S = 0.5


class AsyncLLM:
    """Belongs to one event loop. A pump thread receives from the engine (in-process: that thread *is* the engine)."""

    def __init__(
        self, options: EngineOptions, config: EngineConfig, client: EngineClient, tokenizer: Tokenizer,
        *, seeds: SeedSource | None = None, addresses: Sequence[str] = (), limit: int | None = None,
    ):  # fmt: skip
        """`seeds` for requests that bring none are those of the engine's seed by default. They are drawn here, so that a
        client can let another engine go on with a request. `addresses` are where others use the same engine."""
        self.options = options
        self.config = config
        self.tokenizer = tokenizer
        self.default_params = sampling_defaults(options, config)
        self.startup_s = client.startup_s
        self.addresses = addresses
        # how other engines read this one's KV, if they do
        self.kv_transport = client.kv_transport if isinstance(client, ProcessClient) else None
        self._client = client
        self._seeds = seeds or SeedSource(config.executor.seed)
        self._outputs = OutputProcessor(tokenizer)
        self._prompts = PromptReader(tokenizer, config.scheduler.max_model_len - 1)
        self._validator = Validator(
            vocab_size=config.model.vocab_size,
            max_model_len=config.scheduler.max_model_len,
            max_logprobs=options.max_logprobs,
        )
        self._gate = Gate(limit or options.max_num_queued_reqs + config.scheduler.max_num_seqs)
        self._streams: dict[str, asyncio.Queue[RequestOutput]] = {}
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._calls = itertools.count()
        self._idle = asyncio.Event()
        self._idle.set()
        self._unused = asyncio.Event()  # by others, as its last sign of life says
        self._monitor = HealthMonitor(time.monotonic())
        self._health = Health(True, "ok")
        self._stats: SchedulerStats | None = None
        self._loop = asyncio.get_running_loop()
        self._gone: asyncio.Future[str] = self._loop.create_future()
        self._stop = threading.Event()
        self._pump = threading.Thread(target=self._receive, name="xllm-pump", daemon=True)
        self._pump.start()
        self._watch = self._loop.create_task(self._watch_health())

    @classmethod
    async def start(
        cls,
        options: EngineOptions,
        *,
        in_process: bool = False,
        on_event: Callable[[str | Loading], None] | None = None,
        listening: Listening | None = None,
    ) -> "AsyncLLM":
        """Decide, start the engine (by default in a process of its own) and wait until it takes requests. With `listening`
        others may send it requests too (`wire.dial.Dial`); it has to have a process of its own then.

        `on_event` gets the decisions as sentences, then loading progress. Raises ConfigError or EngineFault.
        """
        if options.skip_tokenizer_init:
            raise ConfigError(
                "serving needs a tokenizer; --skip-tokenizer-init is for LLM(...) and offline use"
            )
        if in_process and listening is not None:
            raise ConfigError("only an engine in a process of its own listens to others")
        report = on_event or (lambda _: None)
        config = await asyncio.to_thread(decide, options)
        for reason in config.reasons:
            report(reason)
        open_client: Callable[..., EngineClient] = InlineClient
        if not in_process:
            open_client = partial(ProcessClient, listening=listening)
        starting = asyncio.to_thread(open_client, config, report)
        reading = asyncio.to_thread(open_tokenizer, options, config)
        client, tokenizer = await asyncio.gather(starting, reading, return_exceptions=True)
        if isinstance(client, BaseException):
            raise client
        if isinstance(tokenizer, BaseException):
            await asyncio.to_thread(client.close)
            raise tokenizer
        for reason in client.config.reasons[len(config.reasons) :]:
            report(reason)
        addresses = client.addresses if isinstance(client, ProcessClient) else ()
        return cls(options, client.config, client, tokenizer, addresses=addresses)

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None,
        priority: int = 0, deadline_s: float | None = None, cache_salt: str = "", targets: Targets = NO_TARGETS,
    ) -> AsyncIterator[RequestOutput]:  # fmt: skip
        """Yields deltas: new text, ids and logprobs of the completions that advanced; the last has `finished` set.

        Raises InvalidRequest (also for a `request_id` in use), Overloaded or Unavailable before anything is yielded.
        Leaving the iteration early aborts the request.
        """
        params = SamplingParams(**self.default_params) if params is None else params
        self._gate.enter(params.n)
        self._idle.clear()
        id = request_id or f"req-{uuid.uuid4().hex}"
        mine = finished = False  # mine: the id is, so that what ends here is not another's request
        try:
            text, ids = await self._prompts.read_async(prompt)
            self._validator.check(ids, params)
            if id in self._streams:
                raise InvalidRequest("the request id is in use", param="request_id")
            queue = self._streams[id] = asyncio.Queue()
            mine = True
            for child_id, child_params in self._outputs.add(id, text, ids, params, time.monotonic()):
                self._client.send(
                    Submit(
                        request_id=child_id, prompt_token_ids=ids, params=child_params,
                        priority=priority, deadline_s=deadline_s, cache_salt=cache_salt,
                        seed=self._seeds.draw() if child_params.seed is None else None,
                        ttft_s=targets.ttft_s, tpot_s=targets.tpot_s,
                    )
                )  # fmt: skip
            while not finished:
                output = await queue.get()
                finished = output.finished
                yield output
        finally:
            if mine:
                if not finished:
                    self._send_abort(self._outputs.abort(id))
                del self._streams[id]
            self._gate.leave(params.n)
            if self._gate.in_flight == 0:
                self._idle.set()

    async def abort(self, request_id: str) -> None:
        """Ends a request with finish_reason "abort"; whoever iterates over it gets that as the last item."""
        deltas, children = self._outputs.cancel(request_id)
        self._deliver(deltas)
        self._send_abort(children)

    def health(self) -> Health:
        return self._health

    def missing(self) -> str | None:
        """Why no request can be taken at present though the engine is well, None where it can."""
        return self._client.missing()

    async def wait_lost(self) -> str:
        """Returns, with the reason, when the engine is gone for good; never otherwise."""
        return await asyncio.shield(self._gone)

    async def stats(self) -> SchedulerStats | None:
        """As of the engine's last sign of life; None before the first."""
        return self._stats

    @property
    def last_stats(self) -> SchedulerStats | None:
        """The same, without waiting."""
        return self._stats

    def count(self) -> int:
        """Sequences in flight."""
        return self._gate.in_flight

    def stop_accepting(self, because: str = "the server is shutting down") -> None:
        self._gate.closed_because = because

    async def drain(self, timeout_s: float) -> bool:
        """Waits for what runs to end, of others too; False when it did not within the time-out."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
                if self.addresses and not self._gone.done():
                    self._unused.clear()  # until the engine says so again
                    await self._unused.wait()
        except TimeoutError:
            return False
        return True

    async def reset_prefix_cache(self) -> bool:
        return bool(await self._ask(lambda id: ResetPrefixCache(call_id=id)))

    async def sleep(self, wait_s: float = 0.0) -> None:
        """Give a card's memory back; requests are turned away until `wake_up`. What runs may go on for so many seconds.
        Raises Unavailable where some still does then: nothing has changed, but for who was turned away meanwhile."""
        if self._gate.closed_because is not None:  # asleep already, or ending
            return
        self._gate.closed_because = ASLEEP
        try:
            await self.drain(wait_s)
            await self._ask(lambda id: Sleep(call_id=id))
        except BaseException:
            if self._gate.closed_because == ASLEEP:
                self._gate.closed_because = None
            raise

    async def wake_up(self) -> None:
        """Raises Unavailable where the memory is not there; the engine sleeps on then."""
        await self._ask(lambda id: WakeUp(call_id=id))
        if self._gate.closed_because == ASLEEP:
            self._gate.closed_because = None

    async def limit_kv_memory(self, nbytes: int | None) -> int:
        """As `LLM.limit_kv_memory`."""
        blocks = kv_limit(nbytes, self.config)
        taken = await self._ask(lambda id: LimitKv(call_id=id, blocks=blocks))
        return int(taken) * self.config.cache.block_bytes

    async def start_profile(self) -> None:
        """Record what the device does until `stop_profile`. Raises Unavailable while that is being done already."""
        await self._ask(lambda id: StartTrace(call_id=id))

    async def stop_profile(self, directory: str) -> str:
        """Writes the trace into `directory`, on the engine's machine; the file's path. Raises Unavailable without one."""
        return str(await self._ask(lambda id: StopTrace(call_id=id, directory=directory)))

    @property
    def asleep(self) -> bool:
        return self._gate.closed_because == ASLEEP

    async def _ask(self, message: Callable[[int], Message]) -> Any:
        call_id = next(self._calls)
        reply = self._replies[call_id] = self._loop.create_future()
        self._client.send(message(call_id))
        answer: Reply = await reply
        if answer.refused is not None:
            raise Unavailable(answer.refused)
        return answer.value

    async def shutdown(self) -> None:
        """Ends what still runs with an error, then the engine and its threads."""
        self.stop_accepting()
        self._watch.cancel()
        self._deliver(self._outputs.fail_all("the server is shutting down"))
        self._stop.set()
        await asyncio.to_thread(self._pump.join)
        await asyncio.to_thread(self._client.close)

    # ---- pump thread

    def _receive(self) -> None:
        while not self._stop.is_set():
            try:
                message = self._client.receive(PUMP_WAIT_S)
            except Exception as e:
                log.error("the engine loop failed", exc_info=e)
                self._loop.call_soon_threadsafe(self._lost, f"{type(e).__name__} in the engine loop")
                return
            if message is not None:
                self._loop.call_soon_threadsafe(self._on_message, message)
            elif reason := self._client.dead():
                self._loop.call_soon_threadsafe(self._lost, reason)
                return

    # ---- event loop

    def _on_message(self, message: Message) -> None:
        if isinstance(message, Outputs):
            self._stats = message.stats
            deltas, stopped = self._outputs.process(message.outputs)
            self._deliver(deltas)
            self._send_abort(stopped)
        elif isinstance(message, Heartbeat):
            self._stats = message.stats or self._stats
            if message.outstanding == 0:
                self._unused.set()
        elif isinstance(message, Reply) and (future := self._replies.pop(message.call_id, None)):
            future.set_result(message)

    def _deliver(self, deltas: Iterable[RequestOutput]) -> None:
        for delta in deltas:
            if queue := self._streams.get(delta.request_id):
                queue.put_nowait(delta)

    def _send_abort(self, child_ids: list[str]) -> None:
        if child_ids:
            with contextlib.suppress(Unavailable):  # an engine that is gone runs nothing
                self._client.send(Abort(request_ids=child_ids))

    def _lost(self, reason: str) -> None:
        self._health = Health(False, reason)
        if not self._gone.done():
            self._gone.set_result(reason)
        self._unused.set()
        self.stop_accepting(f"the engine is gone: {reason}")
        self._deliver(self._outputs.fail_all(reason))
        for reply in self._replies.values():
            if not reply.done():  # whoever asked may have gone away
                reply.set_exception(Unavailable(f"the engine is gone: {reason}"))
        self._replies.clear()

    async def _watch_health(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            beat, silent_s = self._client.pulse()
            health = self._monitor.observe(
                time.monotonic(),
                progress=beat.progress,
                busy=beat.busy,
                silent_s=silent_s,
                dead=self._client.dead(),
            )
            if self._health.ok and not health.ok:
                log.error("unhealthy: %s", health.reason)
                self._client.dump_stacks()
            self._health = health
            if self._monitor.hopeless and self._streams:
                ids = self._outputs.child_ids()
                self._deliver(self._outputs.fail_all(health.reason))
                self._send_abort(ids)  # for the case that it comes back
