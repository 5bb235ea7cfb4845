"""Moves fingerprints between a fake executor's memory and lower tiers: late, in order, and with what goes wrong below.

Damage is never silent: a slot that lost or changed its content fails its check, as checksums see to.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.scheduler.fake_executor import FakeExecutor
from xllm.core.transfer import Load, Loaded, News, Order, Save, Saved, Source, Written

Content = tuple[bytes, list[int]]  # name, fingerprint of each position


@dataclass
class FakeMover:
    executor: FakeExecutor
    host: dict[int, Content] = field(default_factory=dict)
    disk: dict[int, Content] = field(default_factory=dict)
    queue: deque[tuple[int, Order | Save]] = field(default_factory=deque)  # steps that must have run, order
    writes: deque[Save] = field(default_factory=deque)
    told: list[News] = field(default_factory=list)
    fails: Callable[[], bool] = lambda: False  # asked wherever something can go wrong

    def start(self, orders: Sequence[Order], void: Sequence[int]) -> None:
        for slot in void:
            self.disk.pop(slot, None)
        submitted = self.executor.steps_run + len(self.executor.queue)
        self.queue += [(submitted, order) for order in orders]

    @property
    def can_work(self) -> bool:
        return bool(self.writes) or bool(self.queue and self.queue[0][0] <= self.executor.steps_run)

    def work(self) -> bool:
        """One thing that is due; False where there is none."""
        if self.queue and self.queue[0][0] <= self.executor.steps_run:
            _, order = self.queue.popleft()
            self._save(order) if isinstance(order, Save) else self._load(order)
        elif self.writes:
            self._write(self.writes.popleft())
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
        for i, (source, block) in enumerate(zip(order.sources, order.blocks, strict=True)):
            content = self._read(source)
            if content is None:
                self.told.append(Loaded(order.ticket, i, [i], 0.001))
                return
            for offset, fingerprint in enumerate(content[1]):
                self.executor.memory[block, offset] = fingerprint
        self.told.append(Loaded(order.ticket, len(order.sources), [], 0.001))

    def _read(self, source: Source) -> Content | None:
        if source.disk_slot is not None:
            self.host.pop(source.host_slot, None)
            found = self.disk.get(source.disk_slot)
            if found is not None and found[0] == source.name and not self.fails():
                self.host[source.host_slot] = found
        content = self.host.get(source.host_slot)
        if content is None or content[0] != source.name or self.fails():
            return None
        return content
