"""From the pool's log to whoever keeps a copy: one message for each turn of the loop that changed what is cached.

There are two kinds of readers. Subscribers get events over sockets of their own, as routers of any make read them
(`Publisher`); followers are clients of the engine and get less (`KvChanges`), without the tokens. One log serves both.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from xllm.config.decided import KvEventsConfig
from xllm.core.stats import EventStats
from xllm.kv.events import Cleared, Event, EventLog, Removed, Stored
from xllm.wire import kv_events as wire
from xllm.wire.messages import KvChange, KvChanges
from xllm.wire.publisher import Publisher

Cached = Mapping[
    str, Callable[[], Iterable[bytes]]
]  # by medium: the names that can be found there, whenever it is asked


class EventStream:
    """`ConfigError` with a sentence where an endpoint cannot be opened. Without a `config` there are no subscribers. All but
    `_encode` belongs to the engine's loop.

    `epoch`, in every event, is when this incarnation of the cache began, in nanoseconds since 1970: another one means
    another process, whose numbers begin at 0 and whose cache began empty. For readers that know nothing of epochs the
    first event of all is a `Cleared`.
    """

    def __init__(self, config: KvEventsConfig | None, block_size: int):
        self.log = EventLog()
        self.log.cleared()
        self.cached: Cached | None = None  # what a follower is told at first; None: there can be none
        self.epoch = time.time_ns()
        self._block_size = block_size
        self._number = 0  # of the next message to followers
        self._followed = False
        self._publisher: Publisher[tuple[float, Sequence[Event]]] | None = None
        if config is not None:
            self._publisher = Publisher(config, self._encode)

    def flush(self) -> KvChanges | None:
        """Publish what the log holds, if anything. Never blocks. Returns what followers are to get."""
        events = self.log.drain()
        if not events:
            return None
        if self._publisher is not None:
            self._publisher.publish((time.time(), events))
        number, self._number = self._number, self._number + 1
        return KvChanges(number, self._changes(events)) if self._followed else None

    def follow(self) -> dict[str, Any]:
        """What is cached, as of the last flush, and the number of the changes that come next. From here on `flush` returns
        them."""
        assert self.cached is not None, "nobody can follow"
        self._followed = True
        blocks = {medium: _hashes(names()) for medium, names in self.cached.items()}
        return {"number": self._number, "blocks": blocks}

    @property
    def stats(self) -> EventStats:
        if self._publisher is None:
            return EventStats(changes=self._number)
        return EventStats(self._publisher.published, self._publisher.dropped, self._number)

    def close(self) -> None:
        self.flush()
        if self._publisher is not None:
            self._publisher.close()

    def _changes(self, events: Sequence[Event]) -> list[KvChange]:
        if any(
            isinstance(event, Cleared) for event in events
        ):  # tiers may have kept what they had: said again as it stands
            stored = ((medium, _hashes(names())) for medium, names in (self.cached or {}).items())
            return [KvChange("cleared"), *(KvChange("stored", medium, h) for medium, h in stored if h)]
        return [
            KvChange("stored" if isinstance(event, Stored) else "removed", event.medium, _hashes(event.names))
            for event in events
            if not isinstance(event, Cleared)
        ]

    def _encode(self, batch: tuple[float, Sequence[Event]]) -> bytes:
        """In the publisher's thread."""
        ts, events = batch
        return wire.encode(wire.KVEventBatch(ts, [self._on_the_wire(event) for event in events], 0))

    def _on_the_wire(self, event: Event) -> wire.BlockStored | wire.BlockRemoved | wire.AllBlocksCleared:
        match event:
            case Stored():
                salt = event.salt.encode(
                    "utf-8", "replace"
                ).decode()  # any text is a salt, msgpack takes less
                return wire.BlockStored(
                    block_hashes=[wire.block_hash(name) for name in event.names],
                    parent_block_hash=None if event.parent is None else wire.block_hash(event.parent),
                    token_ids=event.token_ids,
                    block_size=self._block_size,
                    lora_id=None,
                    medium=event.medium,
                    lora_name=None,
                    extra_keys=[[salt], *[None] * (len(event.names) - 1)] if salt else None,
                    epoch=self.epoch,
                )
            case Removed():
                hashes = [wire.block_hash(name) for name in event.names]
                return wire.BlockRemoved(block_hashes=hashes, medium=event.medium, epoch=self.epoch)
            case Cleared():
                return wire.AllBlocksCleared(epoch=self.epoch)


def _hashes(names: Iterable[bytes]) -> list[int]:
    return [wire.block_hash(name) for name in names]
