"""Loads from the tiers below the device, and questions to the store: what is found, what is worth it, what came of it.

Everything comes up through host memory: a block on disk or in the store fills a slot there first, and stays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xllm.core.transfer import Load, Loaded, Look, Order, Seen, Source
from xllm.kv.events import Origin
from xllm.kv.tiers.cost import Blocks, Cost
from xllm.kv.tiers.slots import SlotIndex
from xllm.kv.tiers.store import StoreView


@dataclass(frozen=True, slots=True)
class Arrived:
    """A load has ended: the first `count` of its device blocks hold what was asked for, the others nothing of use."""

    ticket: int
    count: int


@dataclass(frozen=True, slots=True)
class Answered:
    """A question to the store has ended: what it has, as far as that is known, can be found from now on."""

    ticket: int


class Tickets:
    """Orders get their numbers here and wait to be handed over."""

    def __init__(self) -> None:
        self.last = 0
        self._queue: list[Order] = []

    def next(self) -> int:
        self.last += 1
        return self.last

    def give(self, order: Order) -> None:
        self._queue.append(order)

    def take(self) -> list[Order]:
        orders, self._queue = self._queue, []
        return orders


class Loads:
    """Belongs to an `Offload`, which says what its methods mean. `damaged` is told of host slots found so."""

    def __init__(
        self, host: SlotIndex, disk: SlotIndex | None, store: StoreView | None, cost: Cost, tickets: Tickets,
        damaged: Callable[[int], None],
    ):  # fmt: skip
        self.host = host
        self.disk = disk
        self.store = store
        self.cost = cost
        self._tickets = tickets
        self._damaged = damaged
        self._loads: dict[int, Load] = {}  # by ticket, without their Loaded yet
        self._waiting: set[int] = (
            set()
        )  # of those, which wait for what other orders bring: they measure nothing

    @property
    def busy(self) -> bool:
        return bool(self._loads or (self.store is not None and self.store.looks))

    @property
    def sources(self) -> list[Source]:
        """Of all that are under way."""
        return [source for load in self._loads.values() for source in load.sources]

    def find(self, names: Sequence[bytes]) -> int:
        for i, name in enumerate(names):
            if not self._has(name):
                return i
        return len(names)

    def _has(self, name: bytes) -> bool:
        if self.host.find(name) is not None or (self.disk is not None and self.disk.find(name) is not None):
            return True
        return self.store is not None and self.store.has(name)

    def worthwhile(self, names: Sequence[bytes], block_size: int) -> int:
        host = disk = store = 0
        before_disk = before_store = Blocks()  # what lies in front of the first from there
        for name in names[: self.find(names)]:
            if self.host.slot_of(name) is not None:
                host += 1
            elif self.disk is not None and self.disk.find(name) is not None:
                before_disk = before_disk if disk or store else Blocks(host)
                disk += 1
            else:
                before_disk = before_disk if disk or store else Blocks(host)
                before_store = before_store if store else Blocks(host, disk)
                store += 1
        ways = [
            way for way in dict.fromkeys([Blocks(host, disk, store), before_store, before_disk]) if sum(way)
        ]
        chosen = self.cost.choose(ways, block_size)
        return sum(ways[chosen]) if chosen >= 0 else 0

    def look(self, names: Sequence[bytes], block_size: int) -> tuple[int, bytes]:
        if self.store is None:
            return 0, b""
        names = names[self.find(names) :]
        if not names or not self.store.is_open(names[0]) or self.host.slot_of(names[0]) is not None:
            return 0, b""
        if not self.cost.worth_asking(len(names), block_size):
            return 0, b""
        names = [name for name in names if not self._has(name)]
        order = Look(self._tickets.next(), names)
        self._tickets.give(order)
        self.store.look(order.ticket, names)
        return order.ticket, names[0]

    def load(
        self, names: Sequence[bytes], blocks: Sequence[int], origins: Sequence[Origin] | None = None
    ) -> tuple[int, int]:
        if len(names) != len(blocks):
            raise ValueError(f"{len(names)} blocks are to be loaded into {len(blocks)}")
        names = names[: self.find(names)]
        held = [self.host.slot_of(name) for name in names]
        for slot in held:  # first of all, or making room for one could evict another
            if slot is not None:
                self.host.pin(slot)
        sources: list[Source] = []
        for i, (name, slot) in enumerate(zip(names, held, strict=True)):
            source = Source(name, slot, None) if slot is not None else self._bring_up(name, origins, i)
            if source is None:
                for later in held[i:]:
                    if later is not None:
                        self.host.unpin(later)
                break
            sources.append(source)
        if not sources:
            return 0, 0
        order = Load(self._tickets.next(), sources, list(blocks[: len(sources)]))
        self._tickets.give(order)
        self._loads[order.ticket] = order
        if any(not source.fills_host and self.host.is_filling(source.host_slot) for source in sources):
            self._waiting.add(order.ticket)
        return order.ticket, len(sources)

    def _bring_up(self, name: bytes, origins: Sequence[Origin] | None, index: int) -> Source | None:
        """The source of a block that host memory has not, or None where no slot can be had for it there."""
        host_slot = self.host.reserve(name, None if origins is None else origins[index])
        if host_slot is None:
            return None
        self.host.pin(host_slot)
        if self.disk is not None and (disk_slot := self.disk.find(name)) is not None:
            self.disk.pin(disk_slot)
            return Source(name, host_slot, disk_slot)
        return Source(name, host_slot, None, stored=True)

    # news

    def seen(self, news: Seen) -> Answered:
        assert self.store is not None
        if self.store.seen(news):
            self.cost.looked(news.seconds)
        return Answered(news.ticket)

    def loaded(self, news: Loaded) -> Arrived:
        sources = self._loads.pop(news.ticket).sources
        sound = min([news.count, *news.bad])
        trusted = next((i for i in range(sound) if not self._is_trusted(sources[i])), sound)
        for i, source in enumerate(sources):
            if source.fills_host:
                if i < sound:
                    self.host.ready(source.host_slot)
                else:
                    self.host.cancel(source.host_slot)
        for i in news.bad:
            self._drop_damaged(sources[i])
        for source in reversed(sources):  # the head becomes the most recently used
            self._let_go(source)
        blocks = self._count_hits(sources[:trusted])
        if trusted == len(sources) and news.ticket not in self._waiting:
            self.cost.loaded(blocks, news.seconds)
        self._waiting.discard(news.ticket)
        return Arrived(news.ticket, trusted)

    def _count_hits(self, sources: Sequence[Source]) -> Blocks:
        disk = sum(source.disk_slot is not None for source in sources)
        stored = sum(source.stored for source in sources)
        blocks = Blocks(len(sources) - disk - stored, disk, stored)
        self.host.hits += blocks.host
        if self.disk is not None:
            self.disk.hits += blocks.disk
        if self.store is not None:
            self.store.hits += blocks.store
        return blocks

    def _is_trusted(self, source: Source) -> bool:
        """Whether what was loaded has not been forgotten while it was under way."""
        return self.host.name_of(source.host_slot) == source.name

    def _drop_damaged(self, source: Source) -> None:
        """Forget a bad source in the tier it was read from, if that has not happened yet."""
        if source.disk_slot is not None:
            assert self.disk is not None
            self.disk.failures += 1
            self.disk.drop(source.disk_slot)
        elif source.stored:
            assert self.store is not None
            self.store.missed(source.name)
        elif self._is_trusted(source):
            self.host.failures += 1
            self.host.drop(source.host_slot)
            self._damaged(source.host_slot)

    def _let_go(self, source: Source) -> None:
        self.host.unpin(source.host_slot)
        if self.disk is None:
            return
        if source.disk_slot is not None:
            self.disk.unpin(source.disk_slot)
        elif (slot := self.disk.find(source.name)) is not None:
            self.disk.touch(slot)  # so that what is in use above is not the first to be evicted below
