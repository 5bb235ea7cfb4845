"""What the scheduler sees of the tiers below the device: it saves blocks there, asks for names, and loads them back.

Every decision falls here: which slot a block goes to, what is evicted, what a piece of news means. Bytes are moved by
whoever takes `orders` and brings `take` their news (`xllm.core.transfer`). The ways of a slot:

    save    host slot filling ── Saved ──▶ ready; with a disk slot, pinned until Written, since the write reads it
            disk slot filling ─ Written ─▶ ready
    load    host slot pinned until Loaded; of a block on disk a host slot is filled from a disk slot, pinned likewise

A name is forgotten at once, also while its bytes are under way. So when news arrives, what counts is whether the slot
still has the name: it cannot have been given to another. Not thread-safe: it belongs to the scheduler's thread.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from xllm.core.transfer import Load, Loaded, News, Order, Save, Saved, Source, TierStats, Written
from xllm.kv.events import Origin
from xllm.kv.tiers.cost import Cost
from xllm.kv.tiers.slots import SlotIndex


@dataclass(frozen=True, slots=True)
class Released:
    """A save has no more use for this device block: end the reference that was taken for it."""

    block: int


@dataclass(frozen=True, slots=True)
class Arrived:
    """A load has ended: the first `count` of its device blocks hold what was asked for, the others nothing of use."""

    ticket: int
    count: int


Done = Released | Arrived


class Offload:
    """Tiers `host` and perhaps `disk` under one roof. Operations are O(1) per block."""

    def __init__(self, host: SlotIndex, disk: SlotIndex | None, cost: Cost):
        self.host = host
        self.disk = disk
        self.cost = cost
        self._tiers = (host,) if disk is None else (host, disk)
        self._last_ticket = 0
        self._queue: list[Order] = []
        self._saves: dict[int, Save] = {}  # by ticket, without their Saved yet
        self._writes: dict[int, Save] = {}  # without their Written yet
        self._loads: dict[int, Load] = {}  # without their Loaded yet
        self._waiting: set[int] = (
            set()
        )  # of those, which wait for what other orders bring: they measure nothing

    # saving

    def save(self, name: bytes, block: int, origin: Origin | None = None) -> bool:
        """Queue a save of a device block to every tier that has not the name. True means that the caller keeps one
        more reference to the block, until `Released`. False where the host tier has the name, or will, or is full of
        what must not be evicted. `origin` is for the events alone."""
        there = self.host.slot_of(name)
        if there is not None:
            self.host.touch(there)
            return False
        host_slot = self.host.reserve(name, origin)
        if host_slot is None:
            return False
        disk_slot = self._reserve_disk(name, origin)
        order = Save(self._next_ticket(), name, block, host_slot, disk_slot)
        self._queue.append(order)
        self._saves[order.ticket] = order
        if disk_slot is not None:
            self.host.pin(host_slot)
            self._writes[order.ticket] = order
        return True

    def _reserve_disk(self, name: bytes, origin: Origin | None) -> int | None:
        if self.disk is None:
            return None
        there = self.disk.slot_of(name)
        if there is None:
            return self.disk.reserve(name, origin)
        self.disk.touch(there)
        return None

    def touch(self, names: Sequence[bytes]) -> None:
        """A sequence of these blocks was used or has ended: its tail is to be evicted before its head, and both after
        what was used less recently."""
        for name in reversed(names):
            for tier in self._tiers:
                slot = tier.find(name)
                if slot is not None:
                    tier.touch(slot)

    # loading

    def find(self, names: Sequence[bytes]) -> int:
        """How many of `names` from the front can be loaded."""
        for i, name in enumerate(names):
            if all(tier.find(name) is None for tier in self._tiers):
                return i
        return len(names)

    def on_disk(self, names: Sequence[bytes]) -> int:
        """How many of `names`, all of which can be loaded, would be read from disk."""
        return sum(self.host.slot_of(name) is None for name in names)

    def worthwhile(self, blocks: int, block_size: int, disk_blocks: int = 0) -> bool:
        """Whether to load `blocks` blocks, of which `disk_blocks` lie on disk, rather than to compute them. Ask once
        per load (see `Cost`)."""
        return self.cost.worthwhile(blocks - disk_blocks, disk_blocks, block_size)

    def load(
        self, names: Sequence[bytes], blocks: Sequence[int], origins: Sequence[Origin] | None = None
    ) -> tuple[int, int]:
        """Queue a load of `names`, all different, into as many device blocks. Returns its ticket and how many blocks from the
        front it covers: fewer where a name is in no tier, or no host slot can be had to bring it up through. The others
        are the caller's again; the covered ones are not to be touched until `Arrived`. (0, 0): there is no load.

        `origins` tell the events what comes up from disk into the host tier; without them they are not told.
        """
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
        order = Load(self._next_ticket(), sources, list(blocks[: len(sources)]))
        self._queue.append(order)
        self._loads[order.ticket] = order
        if any(source.disk_slot is None and self.host.is_filling(source.host_slot) for source in sources):
            self._waiting.add(order.ticket)
        return order.ticket, len(sources)

    def _bring_up(self, name: bytes, origins: Sequence[Origin] | None, index: int) -> Source | None:
        """The source of a block that only the disk has, or None where no host slot can be had for it."""
        assert self.disk is not None
        disk_slot = self.disk.find(name)
        assert disk_slot is not None
        host_slot = self.host.reserve(name, None if origins is None else origins[index])
        if host_slot is None:
            return None
        self.host.pin(host_slot)
        self.disk.pin(disk_slot)
        return Source(name, host_slot, disk_slot)

    # orders out, news in

    def orders(self) -> list[Order]:
        """What is to be moved, in this order. Each order is returned once."""
        orders, self._queue = self._queue, []
        return orders

    def take(self, news: Iterable[News]) -> list[Done]:
        """Account news of orders. `KeyError` where no order waits for it."""
        done: list[Done] = []
        for one in news:
            match one:
                case Saved():
                    done.append(self._saved(one))
                case Written():
                    self._written(one)
                case Loaded():
                    done.append(self._loaded(one))
        return done

    def _saved(self, news: Saved) -> Released:
        order = self._saves.pop(news.ticket)
        if news.host:
            self.host.ready(order.host_slot)
        else:
            self.host.cancel(order.host_slot)
            self.host.failures += 1
        return Released(order.block)

    def _written(self, news: Written) -> None:
        order = self._writes.pop(news.ticket)
        assert self.disk is not None and order.disk_slot is not None
        self.host.unpin(order.host_slot)
        if news.disk:
            self.disk.ready(order.disk_slot)
        else:
            self.disk.cancel(order.disk_slot)
            self.disk.failures += 1

    def _loaded(self, news: Loaded) -> Arrived:
        sources = self._loads.pop(news.ticket).sources
        sound = min([news.count, *news.bad])
        trusted = next((i for i in range(sound) if not self._is_trusted(sources[i])), sound)
        for i, source in enumerate(sources):
            if source.disk_slot is not None:
                if i < sound:
                    self.host.ready(source.host_slot)
                else:
                    self.host.cancel(source.host_slot)
        for i in news.bad:
            self._drop_damaged(sources[i])
        for source in reversed(sources):  # the head becomes the most recently used
            self._let_go(source)
        num_disk = sum(source.disk_slot is not None for source in sources[:trusted])
        self.host.hits += trusted - num_disk
        if self.disk is not None:
            self.disk.hits += num_disk
        if trusted == len(sources) and news.ticket not in self._waiting:
            self.cost.loaded(trusted - num_disk, num_disk, news.seconds)
        self._waiting.discard(news.ticket)
        return Arrived(news.ticket, trusted)

    def _is_trusted(self, source: Source) -> bool:
        """Whether what was loaded has not been forgotten while it was under way."""
        return self.host.name_of(source.host_slot) == source.name

    def _drop_damaged(self, source: Source) -> None:
        """Forget a bad source in the tier it was read from, if that has not happened yet."""
        if source.disk_slot is not None:
            assert self.disk is not None
            self.disk.failures += 1
            self.disk.drop(source.disk_slot)
        elif self._is_trusted(source):
            self.host.failures += 1
            self.host.drop(source.host_slot)
            for write in self._writes.values():  # what is written from a damaged slot is damaged too
                if write.host_slot == source.host_slot and self.disk is not None:
                    self.disk.forget(write.name)

    def _let_go(self, source: Source) -> None:
        self.host.unpin(source.host_slot)
        if self.disk is None:
            return
        if source.disk_slot is not None:
            self.disk.unpin(source.disk_slot)
        elif (slot := self.disk.find(source.name)) is not None:
            self.disk.touch(slot)  # so that what is in use above is not the first to be evicted below

    # forgetting

    def forget(self, names: Iterable[bytes]) -> None:
        """The content of these blocks is not to be trusted: nobody finds them from now on, whatever is under way of
        them is void, and a load of them that has not arrived ends before the first of them."""
        for name in names:
            for tier in self._tiers:
                tier.forget(name)

    def clear(self) -> None:
        """Forget everything, as `forget` does. Events tell of each name; call this before the device's index is cleared,
        whose event says that no tier has anything."""
        for tier in self._tiers:
            tier.clear()

    def distrusted(self) -> list[int]:
        """Disk slots whose records, whatever they say, must not be believed after a restart (`SlotIndex.distrusted`).
        Ask before `orders`, and have them invalidated before those orders start: an order may write a sound record
        there again."""
        return [] if self.disk is None else self.disk.distrusted()

    def recover(self, entries: Iterable[tuple[int, bytes]]) -> int:
        """Blocks that an earlier run left on disk, as (slot, name), least recently used first. Returns how many there
        are of use: a name counts once, and only in a slot that this tier has."""
        if self.disk is None:
            raise ValueError("there is no disk tier to recover")
        return sum(self.disk.adopt(slot, name) for slot, name in entries if 0 <= slot < self.disk.capacity)

    # how it stands

    @property
    def busy(self) -> bool:
        """Whether any order, queued or taken, has news to come."""
        return bool(self._saves or self._writes or self._loads)

    def blocks_held(self) -> list[int]:
        """Device blocks of saves that are queued or under way, once for each."""
        return [order.block for order in self._saves.values()]

    @property
    def stats(self) -> tuple[TierStats, ...]:
        """Of the host tier and, where there is one, the disk tier."""
        return tuple(tier.stats for tier in self._tiers)

    def audit(self) -> None:
        """Raise `AssertionError` with a sentence where slots and the orders under way disagree. O(slots)."""
        saves, writes = self._saves.values(), self._writes.values()
        sources = [source for load in self._loads.values() for source in load.sources]
        from_disk = [source for source in sources if source.disk_slot is not None]
        self.host.audit(
            filling=[save.host_slot for save in saves] + [source.host_slot for source in from_disk],
            pinned=[write.host_slot for write in writes] + [source.host_slot for source in sources],
        )
        if self.disk is not None:
            self.disk.audit(
                filling=[write.disk_slot for write in writes if write.disk_slot is not None],
                pinned=[source.disk_slot for source in from_disk if source.disk_slot is not None],
            )

    def _next_ticket(self) -> int:
        self._last_ticket += 1
        return self._last_ticket
