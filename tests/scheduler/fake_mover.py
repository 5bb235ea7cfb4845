"""Moves fingerprints between a fake executor's memory and lower tiers: late, in order, and with what goes wrong below.

Damage is never silent: a slot that lost or changed its content fails its check, as checksums see to.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.scheduler.fake_executor import FakeExecutor
from xllm.core.transfer import (
    Disown,
    Load,
    Loaded,
    Look,
    News,
    Order,
    Save,
    Saved,
    Seen,
    Send,
    Sent,
    Source,
    Written,
)

Content = tuple[bytes, list[int]]  # name, fingerprint of each position
Aside = Look | Send | Disown


@dataclass
class FakeMover:
    executor: FakeExecutor
    host: dict[int, Content] = field(default_factory=dict)
    disk: dict[int, Content] = field(default_factory=dict)
    queue: deque[tuple[int, Order | Save]] = field(default_factory=deque)  # steps that must have run, order
    writes: deque[Save] = field(default_factory=deque)
    store: dict[tuple[int, bytes], Content] = field(default_factory=dict)  # others may use it as well
    realm: int = 0  # of this engine in the store
    asides: deque[tuple[int, Aside]] = field(
        default_factory=deque
    )  # realm, what the store is asked, sent, or to forget
    realms: dict[int, int] = field(default_factory=dict)  # of loads, by ticket
    told: list[News] = field(default_factory=list)
    fails: Callable[[], bool] = lambda: False  # asked wherever something can go wrong

    def start(self, orders: Sequence[Order], void: Sequence[int]) -> None:
        for slot in void:
            self.disk.pop(slot, None)
        submitted = self.executor.steps_run + len(self.executor.queue)
        for order in orders:
            if isinstance(order, Disown) and order.names is None:
                self.realm = id(self)
            elif isinstance(order, Aside):
                self.asides.append((self.realm, order))
            else:
                self.realms[order.ticket] = self.realm
                self.queue.append((submitted, order))

    @property
    def can_work(self) -> bool:
        return bool(self.writes or self.asides) or bool(
            self.queue and self.queue[0][0] <= self.executor.steps_run
        )

    def work(self) -> bool:
        """One thing that is due; False where there is none."""
        if self.queue and self.queue[0][0] <= self.executor.steps_run:
            _, order = self.queue.popleft()
            if isinstance(order, Save):
                self._save(order)
            elif isinstance(order, Load):
                self._load(order)
        elif self.writes:
            self._write(self.writes.popleft())
        elif self.asides:
            self._aside(*self.asides.popleft())
        else:
            return False
        return True

    def news(self) -> list[News]:
        news, self.told = self.told, []
        return news

    def _save(self, order: Save) -> None:
        self.host.pop(order.host_slot, None)
        kept = not self.fails()
        if kept:
            size = self.executor.block_size
            found = [self.executor.memory.get((order.block, offset), 0) for offset in range(size)]
            self.host[order.host_slot] = order.name, found
        self.told.append(Saved(order.ticket, kept))
        if order.disk_slot is not None:
            self.writes.append(order)

    def _aside(self, realm: int, order: Aside) -> None:
        fails = self.fails()
        match order:
            case Look() if fails:
                self.told.append(Seen(order.ticket, 0, 0.5, pause=0.05))
            case Look():
                there = [(realm, name) in self.store for name in order.names]
                self.told.append(Seen(order.ticket, [*there, False].index(False), 0.001))
            case Send():
                content = self.host.get(order.host_slot)
                sound = content is not None and content[0] == order.name and not fails
                if sound and content is not None:
                    self.store.setdefault((realm, order.name), content)
                self.told.append(Sent(order.ticket, sound))
            case Disown():
                for name in () if fails else order.names or ():
                    self.store.pop((realm, name), None)

    def _write(self, order: Save) -> None:
        assert order.disk_slot is not None
        content = self.host.get(order.host_slot)
        kept = content is not None and content[0] == order.name and not self.fails()
        self.disk.pop(order.disk_slot, None)
        if kept and content is not None:
            self.disk[order.disk_slot] = content
        self.told.append(Written(order.ticket, kept))

    def _load(self, order: Load) -> None:
        while self.writes:  # orders of one slot take effect in their order
            self._write(self.writes.popleft())
        while self.asides:
            self._aside(*self.asides.popleft())
        for i, (source, block) in enumerate(zip(order.sources, order.blocks, strict=True)):
            content = self._read(source, self.realms[order.ticket])
            if content is None:
                self.told.append(Loaded(order.ticket, i, [i], 0.001))
                return
            for offset, fingerprint in enumerate(content[1]):
                self.executor.memory[block, offset] = fingerprint
        self.told.append(Loaded(order.ticket, len(order.sources), [], 0.001))

    def _read(self, source: Source, realm: int) -> Content | None:
        if source.disk_slot is not None:
            self.host.pop(source.host_slot, None)
            found = self.disk.get(source.disk_slot)
            if found is not None and found[0] == source.name and not self.fails():
                self.host[source.host_slot] = found
        if source.stored:
            self.host.pop(source.host_slot, None)
            found = self.store.get((realm, source.name))
            if found is not None and not self.fails():
                self.host[source.host_slot] = found
        content = self.host.get(source.host_slot)
        if content is None or content[0] != source.name or self.fails():
            return None
        return content
