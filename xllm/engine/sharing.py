"""That an engine gives KV to others and fetches it from them, and what it takes to build that."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from xllm.config.decided import EngineConfig
from xllm.core.errors import ConfigError
from xllm.engine.admission import Admission
from xllm.engine.fetches import Means, Patience
from xllm.engine.peers import Peers
from xllm.engine.providing import GIVE_UP_S
from xllm.executor.block_sums import BlockSums
from xllm.executor.fingerprint import fingerprint
from xllm.executor.transports.base import Transport
from xllm.executor.transports.table import open_transport, spoken
from xllm.scheduler.scheduler import Scheduler
from xllm.wire.channel import Channel


@dataclass(frozen=True)
class Sharing:
    transport: str = "auto"  # see `open_transport`
    token: str | None = field(default=None, repr=False)  # shown to peers, and asked of them
    name: str = ""  # told to peers
    listen: str = "127.0.0.1"
    advertise: str | None = None  # the host that peers connect to; None: that of `listen`
    patience: Patience = field(default_factory=Patience)
    give_up_s: float = GIVE_UP_S

    def open(
        self, kv_cache: torch.Tensor, config: EngineConfig, scheduler: Scheduler, admission: Admission, channel: Channel
    ) -> Peers:  # fmt: skip
        """`kv_cache` [places, ...], whose first places are the pool's blocks. ConfigError where KV cannot be shared."""
        memory = kv_cache[: config.cache.num_blocks]
        mapped = config.cache.pool != "paged"
        try:
            transport = self.connect(memory, mapped)
        except ValueError as e:
            raise ConfigError(f"--kv-transport {self.transport}: {e}") from e
        means = Means(
            transport=transport,
            sums=_shared(BlockSums(memory).sums),
            block_size=config.cache.block_size,
            fingerprint=fingerprint(config).hex(),
            token=self.token or "",
            name=self.name,
            patience=self.patience,
        )
        return Peers(
            scheduler,
            admission,
            channel,
            means,
            block_bytes=config.cache.block_bytes,
            give_up_s=self.give_up_s,
            transport_name=spoken(self.transport, on_card=memory.is_cuda, mapped=mapped),
        )

    def connect(self, memory: torch.Tensor, mapped: bool) -> Transport:
        """The way to peers' memory, and theirs to ours."""
        return open_transport(
            self.transport, memory, token=self.token, listen=self.listen, advertise=self.advertise, mapped=mapped
        )  # fmt: skip


def _shared(sums: Callable[[Sequence[int]], list[int]]) -> Callable[[Sequence[int]], list[int]]:
    """For several threads, one at a time."""
    lock = threading.Lock()

    def one_by_one(numbers: Sequence[int]) -> list[int]:
        with lock:
            return sums(numbers)

    return one_by_one
