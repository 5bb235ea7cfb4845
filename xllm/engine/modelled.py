"""Instances without a model, for tests of routers and for replaying traces: all but the model's runner is real.

`ModelledInstance` runs in threads, dozens of them in one process; `python -m xllm.engine.modelled` makes them in a
process of their own, which registers in etcd as `xllm serve` does (`modelled_process`).
"""

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xllm.cluster.instance import InstanceInfo, KvFacts, Role, epoch_now
from xllm.config.decided import (
    CacheConfig,
    EngineConfig,
    ExecutorConfig,
    MemoryConfig,
    ModelConfig,
    SchedulerConfig,
)
from xllm.engine.admission import Admission
from xllm.engine.core import EngineCore
from xllm.engine.kv_events import EventStream
from xllm.engine.modelled_hub import Gate, Killed, MortalHub
from xllm.engine.modelled_runner import EOS, Lateness, ModelledRunner, Speed, Words
from xllm.executor.executor import Executor
from xllm.kv.events import DEVICE
from xllm.kv.pool import BlockPool
from xllm.scheduler.scheduler import Scheduler
from xllm.wire.doors import Listen
from xllm.wire.hub import Hub
from xllm.wire.messages import Heartbeat, Ready

if TYPE_CHECKING:
    from xllm.engine.peers import Peers  # brings torch

HEARTBEAT_S = 0.25
DEPTH = 2  # steps in flight
TRANSPORT = "modelled"


@dataclass(frozen=True, slots=True)
class Shape:
    """How large a modelled instance is."""

    num_blocks: int = 2048
    block_size: int = 16
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 1024
    max_model_len: int = 16384
    max_num_queued: int | None = None


class ModelledInstance:
    """One engine in threads of this process; its hub listens on tcp for routers.

    `start` after `stop` or `kill` begins the next incarnation: another epoch and address, an empty cache. `fetch_s` are the
    seconds that a token's KV takes from another instance; None: none comes from others or goes there.
    """

    def __init__(
        self,
        id: str,
        speed: Speed | None = None,
        shape: Shape | None = None,
        words: Words | None = None,
        *,
        model: str = "modelled",
        token: str | None = None,
        listen: str = "tcp://127.0.0.1:*",
        epoch: int | None = None,
        role: Role = "both",
        fetch_s: float | None = None,
    ):
        self.id, self.model = id, model
        self.role, self.fetch_s = role, fetch_s
        self.speed, self.shape, self.words = speed or Speed(), shape or Shape(), words or Words()
        self.token = token
        self._listen = Listen(listen, token)
        self.epoch = epoch_now() if epoch is None else epoch
        self._running: _Incarnation | None = None
        self._last: _Incarnation | None = None

    def start(self) -> "ModelledInstance":
        assert self._running is None, "it runs"
        if self._last is not None:
            self.epoch = epoch_now(self.epoch)
        self._running = self._last = _Incarnation(self)
        return self

    @property
    def info(self) -> InstanceInfo:
        shape = self.shape
        return InstanceInfo(
            id=self.id,
            epoch=self.epoch,
            address=self.address,
            model=self.model,
            kv=KvFacts(shape.block_size, "float32", shape.num_blocks, _fingerprint(self.model)),
            max_num_seqs=shape.max_num_seqs,
            max_model_len=shape.max_model_len,
            max_num_batched_tokens=shape.max_num_batched_tokens,
            max_num_queued=shape.max_num_queued,
            role=self.role,
            transport=None if self.fetch_s is None else TRANSPORT,
        )

    @property
    def address(self) -> str:
        """Of the last incarnation."""
        return self._incarnation.hub.addresses[0]

    @property
    def core(self) -> EngineCore:
        """To look at; it belongs to its thread."""
        return self._incarnation.core

    @property
    def lateness(self) -> Lateness:
        return self._incarnation.runner.lateness

    @property
    def clients(self) -> int:
        return self._incarnation.hub.clients

    @property
    def outstanding(self) -> int:
        """Requests of all clients that have not ended."""
        return self._incarnation.hub.outstanding

    def stop(self) -> None:
        """What runs is left to its clients, who hear a goodbye. Nothing where it does not run."""
        if (running := self._take()) is not None:
            running.stop()

    def kill(self) -> None:
        """Connections end without a word, as when its process is killed. Nothing where it does not run."""
        if (running := self._take()) is not None:
            running.kill()

    def hang(self) -> None:
        """Connections stay and nothing answers, as when its process is stopped."""
        self._incarnation.gate.hang()

    def resume(self) -> None:
        self._incarnation.gate.resume()

    @property
    def _incarnation(self) -> "_Incarnation":
        assert self._last is not None, "it was not started"
        return self._last

    def _take(self) -> "_Incarnation | None":
        running, self._running = self._running, None
        return running

    def __enter__(self) -> "ModelledInstance":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class _Incarnation:
    """Threads and sockets of a running instance."""

    def __init__(self, of: ModelledInstance):
        self.gate = Gate()
        config = _config(of)
        self.hub = MortalHub(of._listen, self.gate, of.id)
        self.runner = ModelledRunner(of.speed, of.words, self.gate)
        self.core = _core(of, config, self.runner, self.hub)
        self._stop = threading.Event()
        ready = Ready(config=config, addresses=self.hub.addresses, kv_transport=self.core.kv_transport)
        self.hub.send(ready)
        self._threads = [self._thread("loop", self._loop), self._thread("heart", self._beat)]

    def _thread(self, what: str, run: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=self._mortal, args=(run,), name=f"modelled-{what}", daemon=True)
        thread.start()
        return thread

    def _mortal(self, run: Callable[[], None]) -> None:
        try:
            run()
        except Killed:
            self._stop.set()

    def _loop(self) -> None:
        while not self.core.stopping:
            self.gate()
            self.core.turn(wait_s=1.0)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            self.gate()
            core = self.core
            self.hub.send(Heartbeat(progress=core.progress, busy=core.busy, stats=core.last_stats))

    def stop(self) -> None:
        self.gate.resume()
        self._end()
        self.hub.close()

    def kill(self) -> None:
        self.gate.kill()
        self._end()
        self.hub.bury()

    def _end(self) -> None:
        self.core.stopping = True
        self._stop.set()
        self.hub.wake()
        for thread in self._threads:
            thread.join()
        self.core.close()


def _core(of: ModelledInstance, config: EngineConfig, runner: ModelledRunner, hub: Hub) -> EngineCore:
    cache, scheduling = config.cache, config.scheduler
    events = EventStream(None, cache.block_size)
    pool = BlockPool(cache.num_blocks, cache.block_size, cache.prefix_caching, events.log)
    events.cached = {DEVICE: pool.index.names}
    scheduler = Scheduler(scheduling, pool, peers=of.fetch_s is not None)
    executor = Executor(lambda: runner, depth=DEPTH, asynchronous=True)
    admission = Admission(
        scheduler, eos_ids=frozenset(config.model.eos_ids), max_model_len=scheduling.max_model_len,
        seed=config.executor.seed, vocab_size=config.model.vocab_size,
    )  # fmt: skip
    peers = None if of.fetch_s is None else _peers(of, of.fetch_s, scheduler, admission, hub)
    return EngineCore(scheduler, executor, hub, admission, depth=DEPTH, events=events, peers=peers)


def _peers(
    of: ModelledInstance, fetch_s: float, scheduler: Scheduler, admission: Admission, hub: Hub
) -> "Peers":
    from xllm.engine.modelled_peers import modelled_peers  # torch comes with it: only who needs it pays

    size = of.shape.block_size
    return modelled_peers(
        scheduler, admission, hub, name=of.id, block_size=size, block_s=fetch_s * size,
        fingerprint=_fingerprint(of.model), token=of.token,
    )  # fmt: skip


def _config(of: ModelledInstance) -> EngineConfig:
    shape = of.shape
    return EngineConfig(
        model=ModelConfig(
            directory=of.model, architecture="Modelled", vocab_size=of.words.vocab_size, hidden_size=0, num_layers=0,
            num_heads=0, num_kv_heads=0, head_dim=0, max_position=shape.max_model_len, eos_ids=(EOS,),
            load_format="modelled", hf={},
        ),
        scheduler=SchedulerConfig(
            max_model_len=shape.max_model_len, max_num_seqs=shape.max_num_seqs,
            max_num_batched_tokens=shape.max_num_batched_tokens, chunked_prefill=True, long_prefill_token_threshold=0,
            batching="chunked", order="fcfs", admission="optimistic", depth=DEPTH,
        ),
        cache=CacheConfig(shape.block_size, shape.num_blocks, True, 0, "float32"),
        memory=MemoryConfig(None, 0.0, False),
        executor=ExecutorConfig("modelled", "float32", 1, 0),
        reasons=(),
    )  # fmt: skip


def _fingerprint(model: str) -> str:
    return hashlib.sha256(f"modelled {model}".encode()).hexdigest()[:32]


if __name__ == "__main__":
    from xllm.engine.modelled_process import main

    main()
