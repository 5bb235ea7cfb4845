"""From the pool's log to its subscribers: one batch for each turn of the loop that changed what is cached."""

import time
from collections.abc import Sequence

from xllm.config.decided import KvEventsConfig
from xllm.core.stats import EventStats
from xllm.kv.events import Cleared, Event, EventLog, Removed, Stored
from xllm.wire import kv_events as wire
from xllm.wire.publisher import Publisher


class EventStream:
    """`ConfigError` with a sentence where an endpoint cannot be opened.

    `epoch`, in every event, is when this incarnation of the cache began, in nanoseconds since 1970: another one means
    another process, whose numbers begin at 0 and whose cache began empty. For readers that know nothing of epochs the
    first event of all is a `Cleared`.
    """

    def __init__(self, config: KvEventsConfig, block_size: int):
        self.log = EventLog()
        self.log.cleared()
        self.epoch = time.time_ns()
        self._block_size = block_size
        self._publisher: Publisher[tuple[float, Sequence[Event]]] = Publisher(config, self._encode)

    def flush(self) -> None:
        """Publish what the log holds, if anything. Never blocks."""
        if events := self.log.drain():
            self._publisher.publish((time.time(), events))

    @property
    def stats(self) -> EventStats:
        return EventStats(batches=self._publisher.published, dropped=self._publisher.dropped)

    def close(self) -> None:
        self.flush()
        self._publisher.close()

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
