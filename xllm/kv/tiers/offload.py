"""What the scheduler sees of the tiers below the device: it saves blocks there, asks for names, and loads them back.

Every decision falls here: which slot a block goes to, what is evicted, what a piece of news means. Bytes are moved by
whoever takes `orders` and brings `take` their news (`xllm.core.transfer`). The ways of a slot:

    save    host slot filling ── Saved ──▶ ready; with a disk slot, pinned until Written, since the write reads it
            disk slot filling ─ Written ─▶ ready
    send    host slot pinned from its save on: first until the steps that filled the block have ended well, since others
            will believe it, then until Sent
    load    host slot pinned until Loaded; of a block on disk a host slot is filled from a disk slot, pinned likewise, of
            one in the store from there

A name is forgotten at once, also while its bytes are under way. So when news arrives, what counts is whether the slot
still has the name: it cannot have been given to another. Not thread-safe: it belongs to the scheduler's thread.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from xllm.core.transfer import Disown, Loaded, News, Order, Save, Saved, Seen, Send, Sent, TierStats, Written
from xllm.kv.events import Origin
from xllm.kv.tiers.cost import Cost
from xllm.kv.tiers.loads import Answered, Arrived, Loads, Tickets
from xllm.kv.tiers.slots import SlotIndex
from xllm.kv.tiers.store import StoreView


@dataclass(frozen=True, slots=True)
class Released:
    """A save has no more use for this device block: end the reference that was taken for it."""

    block: int


Done = Released | Arrived | Answered


class Offload:
    """Tiers `host`, perhaps `disk`, and perhaps a store under one roof. Operations are O(1) per block."""

    def __init__(self, host: SlotIndex, disk: SlotIndex | None, cost: Cost, store: StoreView | None = None):
        self.host = host
        self.disk = disk
        self.cost = cost
        self.store = store
        self._tiers = (host,) if disk is None else (host, disk)
        self._tickets = Tickets()
        self._loads = Loads(host, disk, store, cost, self._tickets, self._damaged)
        self._saves: dict[int, Save] = {}  # by ticket, without their Saved yet
        self._writes: dict[int, Save] = {}  # without their Written yet
        self._fresh: list[Save] = []  # to be sent; nobody knows yet which steps filled their blocks
        self._unsent: deque[tuple[int, Save]] = deque()  # with the last step that may have
        self._sends: dict[int, Send] = {}  # without their Sent yet
        self._left = 0  # ticket of the last order before the store was left

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
        order = Save(self._tickets.next(), name, block, host_slot, disk_slot)
        self._tickets.give(order)
        self._saves[order.ticket] = order
        if disk_slot is not None:
            self.host.pin(host_slot)
            self._writes[order.ticket] = order
        if self.store is not None and self.store.wants(name):
            self.host.pin(host_slot)
            self._fresh.append(order)
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
        return self._loads.find(names)

    def worthwhile(self, names: Sequence[bytes], block_size: int) -> int:
        """How many of `names` from the front to load rather than to compute: all that can be found, or those in front of
        the first from a slower tier, or none. Ask once per load (see `Cost`)."""
        return self._loads.worthwhile(names, block_size)

    def look(self, names: Sequence[bytes], block_size: int) -> tuple[int, bytes]:
        """Queue a question to the store about those of `names` that nothing is known of. Returns its ticket and the first
        name in it; `Answered` follows. (0, b""): there is nothing to ask, or it is not worth the time."""
        return self._loads.look(names, block_size)

    def load(self, names: Sequence[bytes], blocks: Sequence[int], origins: Sequence[Origin] | None = None) -> tuple[int, int]:  # fmt: skip
        """Queue a load of `names`, all different, into as many device blocks. Returns its ticket and how many blocks from the
        front it covers: fewer where a name is in no tier, or no host slot can be had to bring it up through. The others
        are the caller's again; the covered ones are not to be touched until `Arrived`. (0, 0): there is no load.

        `origins` tell the events what comes up into the host tier; without them they are not told.
        """
        return self._loads.load(names, blocks, origins)

    # orders out, news in

    def orders(self, begun: int = 0, done: int = 0) -> list[Order]:
        """What is to be moved, in this order. Each order is returned once.

        `begun` is the last step submitted so far, to be called before another is, and `done` the last that is known to have
        ended well, like all before it."""
        self._unsent += [(begun, save) for save in self._fresh]
        self._fresh.clear()
        while self._unsent:
            step, save = self._unsent[0]
            forgotten = self.host.name_of(save.host_slot) != save.name
            if not forgotten and (step > done or save.ticket in self._saves):
                break
            self._unsent.popleft()
            self._send(save, forgotten)
        return self._tickets.take()

    def _send(self, save: Save, forgotten: bool) -> None:
        assert self.store is not None
        if forgotten or not self.store.wants(save.name):
            self.host.unpin(save.host_slot)
            return
        order = Send(self._tickets.next(), save.name, save.host_slot)
        self._sends[order.ticket] = order
        self._tickets.give(order)

    def take(self, news: Iterable[News]) -> list[Done]:
        """Account news of orders. `KeyError` where no order waits for it."""
        done: list[Done] = []
        for one in news:
            match one:
                case Saved():
                    done.append(self._saved(one))
                case Written():
                    self._written(one)
                case Sent():
                    self._sent(one)
                case Loaded():
                    done.append(self._loads.loaded(one))
                case Seen():
                    done.append(self._loads.seen(one))
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
            if news.behind:
                self.disk.skipped += 1
            else:
                self.disk.failures += 1

    def _sent(self, news: Sent) -> None:
        order = self._sends.pop(news.ticket)
        assert self.store is not None
        self.host.unpin(order.host_slot)
        self.store.sent(order.name, news.stored and news.ticket > self._left)

    def _damaged(self, host_slot: int) -> None:
        """What is written from there is damaged too; what is sent is compared before it leaves."""
        for write in self._writes.values():
            if write.host_slot == host_slot and self.disk is not None:
                self.disk.forget(write.name)

    # forgetting

    def forget(self, names: Iterable[bytes]) -> None:
        """The content of these blocks is not to be trusted: nobody finds them from now on, whatever is under way of
        them is void, and a load of them that has not arrived ends before the first of them."""
        names = list(names)
        for name in names:
            for tier in self._tiers:
                tier.forget(name)
        if self.store is not None and names:
            self.store.disown(names)
            self._tickets.give(Disown(names))

    def clear(self) -> None:
        """Forget everything here, as `forget` does. Events tell of each name; call this before the device's index is cleared,
        whose event says that no tier has anything. What lies in the store was computed well, or by others."""
        for tier in self._tiers:
            tier.clear()

    def leave(self) -> None:
        """Everything was forgotten since names mean something else from here on: nothing that lies in the store is what
        it is called any more, not to this engine."""
        if self.store is not None:
            self.store.clear()
            self._tickets.give(Disown(None))
            self._left = self._tickets.last

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

    def told(self) -> dict[str, Callable[[], Iterable[bytes]]]:
        """By tier, which names the events have told of and that can be found, whenever it is asked."""
        return {tier.medium: tier.told for tier in self._tiers}

    @property
    def busy(self) -> bool:
        """Whether any order, queued or taken, has news to come."""
        sending = self._fresh or self._unsent or self._sends
        return bool(self._saves or self._writes or sending) or self._loads.busy

    def blocks_held(self) -> list[int]:
        """Device blocks of saves that are queued or under way, once for each."""
        return [order.block for order in self._saves.values()]

    @property
    def stats(self) -> tuple[TierStats, ...]:
        """Of the host tier and, where there are such, the disk tier and the store."""
        store = () if self.store is None else (self.store.stats,)
        return (*(tier.stats for tier in self._tiers), *store)

    def audit(self) -> None:
        """Raise `AssertionError` with a sentence where slots and the orders under way disagree. O(slots)."""
        saves, writes = self._saves.values(), self._writes.values()
        unsent = [*self._fresh, *(save for _, save in self._unsent)]
        sources = self._loads.sources
        from_disk = [source for source in sources if source.disk_slot is not None]
        self.host.audit(
            filling=[save.host_slot for save in saves]
            + [source.host_slot for source in sources if source.fills_host],
            pinned=[save.host_slot for save in (*writes, *unsent)]
            + [send.host_slot for send in self._sends.values()]
            + [source.host_slot for source in sources],
        )
        if self.disk is not None:
            self.disk.audit(
                filling=[write.disk_slot for write in writes if write.disk_slot is not None],
                pinned=[source.disk_slot for source in from_disk if source.disk_slot is not None],
            )
