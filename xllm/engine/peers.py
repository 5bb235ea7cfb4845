"""KV from and to other engines, as the engine's loop sees it."""

import threading
from collections.abc import Sequence

from msgspec.structs import replace

from xllm.core.clock import Clock, monotonic
from xllm.core.output import SequenceOutput
from xllm.core.stats import SchedulerStats
from xllm.engine.admission import Admission
from xllm.engine.fetches import Means
from xllm.engine.fetching import Fetcher
from xllm.engine.providing import GIVE_UP_S, Provider
from xllm.scheduler.scheduler import Scheduler
from xllm.wire.channel import Channel
from xllm.wire.messages import Provide, Taken


class Peers:
    """Owns the transport. All calls belong to the loop."""

    def __init__(
        self, scheduler: Scheduler, admission: Admission, channel: Channel, means: Means, *,
        block_bytes: int = 0, transport_name: str = "", give_up_s: float = GIVE_UP_S, clock: Clock = monotonic,
    ):  # fmt: skip
        self.transport_name = transport_name
        self._scheduler = scheduler
        self._transport = means.transport
        self._block_bytes = block_bytes
        self._clock = clock
        self._news = threading.Event()
        self._fetcher = Fetcher(means, self._news.set)
        self._provider = Provider(
            scheduler, admission, means.transport, means.sums, means.fingerprint, channel.send,
            give_up_s=give_up_s, notify=self._news.set,
        )  # fmt: skip

    @property
    def busy(self) -> bool:
        """Something is under way: blocks will come back without a step."""
        return self._scheduler.peers.busy or self._provider.busy

    def wait(self, seconds: float) -> None:
        """Until there is news, or for so long."""
        self._news.wait(seconds)

    def take(self) -> list[SequenceOutput]:
        """Before a step is planned: what has come, and first tokens among it."""
        self._news.clear()
        news = self._fetcher.news()
        outputs = self._scheduler.take_fetched(news, self._clock()) if news else []
        self._provider.turn(self._clock())
        return outputs

    def give(self) -> None:
        """After something was planned or applied: what is wanted, and what others may have."""
        if orders := self._scheduler.peers.orders():
            self._fetcher.order(orders)
        if self._provider.busy:
            self._provider.turn(self._clock())

    def handle(self, message: Provide | Taken) -> None:
        if isinstance(message, Provide):
            self._provider.provide(message, self._clock())
        else:
            self._provider.taken(message, self._clock())

    def without_ours(self, ids: Sequence[str]) -> list[str]:
        """Provisions among them are ended; the other ids."""
        return [id for id in ids if not self._provider.abort(id)]

    def hidden(self, outputs: list[SequenceOutput]) -> list[SequenceOutput]:
        """Without those of what is computed for peers."""
        return self._provider.hidden(outputs)

    def completed(self, stats: SchedulerStats) -> SchedulerStats:
        """With what the scheduler does not know."""
        counted = replace(stats.peers, fetched_bytes=stats.peers.fetched_blocks * self._block_bytes)
        return replace(stats, peers=counted)

    def close(self) -> None:
        """Nothing is read or written any more; the executor lives still."""
        self._fetcher.close()
        self._provider.close()
        self._transport.close()
