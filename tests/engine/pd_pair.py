"""Engines of one model in this process, each behind a hub, that exchange KV."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.engine.bare import options_for
from tests.engine.dialling import dialled, ended, listen, until
from tests.engine.kv_in_process import Network
from tests.engine.pools import BLOCK_BYTES
from xllm.core.output import SequenceOutput
from xllm.core.peers import KvFrom, PeerStats
from xllm.core.sampling import SamplingParams
from xllm.core.stats import SchedulerStats
from xllm.engine.build import build_core, decide
from xllm.engine.core import EngineCore
from xllm.engine.fetches import Patience
from xllm.engine.sharing import Sharing
from xllm.wire.dial import Dial
from xllm.wire.doors import Listen
from xllm.wire.hub import Hub
from xllm.wire.messages import Submit

QUICK = Patience(progress_s=1.0, connect_s=1.0, pause_s=0.0)
COMPILING = Patience(
    progress_s=60.0, connect_s=1.0, pause_s=0.0
)  # on a card kernels are, before a first step


class Over(Sharing):
    """By way of a network of ours."""

    def __init__(self, network: Network, **settings: Any):
        super().__init__(**settings)
        object.__setattr__(self, "network", network)

    def connect(self, memory, mapped):
        return self.network.open(memory)  # type: ignore[attr-defined]


@dataclass
class Member:
    name: str
    hub: Hub
    core: EngineCore
    loop: threading.Thread
    dial: Dial
    epoch: int = 1
    stopped: bool = field(default=False)

    def kv_from(self, compute: bool = True) -> KvFrom:
        return KvFrom(self.hub.addresses[0], self.name, self.epoch, compute)

    def run(self, *requests: Submit) -> tuple[dict[str, list[int]], dict[str, SequenceOutput]]:
        for one in requests:
            self.dial.send(one)
        tokens, ends, _ = listen(self.dial, ended(*(one.request_id for one in requests)))
        return tokens, ends

    @property
    def stats(self) -> PeerStats:
        return PeerStats() if self.core.last_stats is None else self.core.last_stats.peers

    @property
    def overall(self) -> SchedulerStats:
        assert self.core.last_stats is not None
        return self.core.last_stats

    def at_rest(self) -> bool:
        core = self.core
        return not core.busy and (core._peers is None or not core._peers.busy)

    def stop(self) -> None:
        if not self.stopped:
            self.stopped = True
            self.core.stopping = True
            self.loop.join()
            self.core.close()
            self.dial.close()
            self.hub.close()


@contextlib.contextmanager
def member(model: Any, network: Network | str, name: str, backend: str = "cpu", *, give_up_s: float = 2.0, patience: Patience | None = None, **changes: Any) -> Iterator[Member]:  # fmt: skip
    hub = Hub([Listen("tcp://127.0.0.1:*")], name=name)
    patience = patience or (COMPILING if backend.startswith("cuda") else QUICK)
    settings: dict[str, Any] = {"name": name, "patience": patience, "give_up_s": give_up_s}
    sharing = Over(network, **settings) if isinstance(network, Network) else Sharing(network, **settings)
    changes = {"kv_cache_memory_bytes": 512 * BLOCK_BYTES, **changes}
    config = decide(options_for(model, backend, **changes))
    core, _ = build_core(config, hub, hub.send, {}, sharing=sharing)
    loop = threading.Thread(target=core.run, name=f"loop of {name}", daemon=True)
    loop.start()
    made = Member(name, hub, core, loop, dialled(hub.addresses[0]))
    try:
        yield made
        if not made.stopped:
            until(made.at_rest, f"{name} comes to rest")
            assert made.core.scheduler.pool.usage == 0
    finally:
        made.stop()
    made.core.scheduler.audit()


def asked(id: str, prompt: list[int], kv_from: KvFrom | None = None, max_tokens: int = 12, **params: Any) -> Submit:  # fmt: skip
    params.setdefault("temperature", 0.0)
    return Submit(
        request_id=id, prompt_token_ids=prompt, kv_from=kv_from,
        params=SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params),
    )  # fmt: skip
