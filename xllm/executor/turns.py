"""Tasks of the mover, and which of them may run: those that need the same place one after the other, others at once."""

from collections import deque
from collections.abc import Sequence

from xllm.core.transfer import Load, Loaded, Look, News, Order, Save, Saved, Seen, Send, Sent, Source, Written
from xllm.device.table import Mark

Place = tuple[str, int]  # "device" and a block, "host" or "disk" and a slot


class Task:
    """Something that reads places and overwrites others."""

    def __init__(self, reads: Sequence[Place], writes: Sequence[Place]):
        self.reads = reads
        self.writes = writes
        self.ahead = 0  # tasks that must leave before this one begins
        self.behind: list[Task] = []  # tasks that wait for this one


class CopyDown(Task):
    """The first half of a save: a device block to a host slot."""

    def __init__(self, order: Save, mark: Mark):
        super().__init__([("device", order.block)], [("host", order.host_slot)])
        self.order = order
        self.mark = mark


class Write(Task):
    """The second half: the host slot to disk."""

    def __init__(self, order: Save, disk_slot: int):
        super().__init__([("host", order.host_slot)], [("disk", disk_slot)])
        self.order = order
        self.disk_slot = disk_slot


class SendOut(Task):
    """A host slot to a store, which has no places."""

    def __init__(self, order: Send, realm: str):
        super().__init__([("host", order.host_slot)], [])
        self.order = order
        self.realm = realm


class Void(Task):
    """Records on disk that nobody is to believe."""

    def __init__(self, slots: Sequence[int]):
        super().__init__([], [("disk", slot) for slot in slots])
        self.slots = slots


class LoadUp(Task):
    """Host slots to device blocks, some of them by way of the disk or a store."""

    def __init__(self, order: Load, begun: float, realm: str = ""):
        reads: list[Place] = []
        writes: list[Place] = [("device", block) for block in order.blocks]
        self.to_read: deque[tuple[Source, int]] = deque()  # sources that nobody reads yet, and where on disk
        self.to_fetch: deque[Source] = deque()  # that nobody fetches from the store yet
        for source in order.sources:
            (writes if source.fills_host else reads).append(("host", source.host_slot))
            if source.disk_slot is not None:
                reads.append(("disk", source.disk_slot))
                self.to_read.append((source, source.disk_slot))
            elif source.stored:
                self.to_fetch.append(source)
        super().__init__(reads, writes)
        self.unread = len(self.to_read) + len(self.to_fetch)  # those under way included
        self.order = order
        self.begun = begun
        self.realm = realm


class Turns:
    """Tasks take effect on each place as if they ran one by one in the order they entered. Not thread-safe.

    A task waits for the last one ahead of it that overwrites a place it needs and, where it overwrites the place itself,
    for those that read it since. It waits for tasks ahead only, so some task can always run.
    """

    def __init__(self) -> None:
        self._writer: dict[Place, Task] = {}  # the last that has not left
        self._readers: dict[Place, set[Task]] = {}  # behind it

    def enter(self, task: Task) -> bool:
        """True where the task may begin at once; else a `leave` of others will return it."""
        ahead: set[Task] = set()
        for place in (*task.reads, *task.writes):
            if (writer := self._writer.get(place)) is not None:
                ahead.add(writer)
        for place in task.writes:
            ahead |= self._readers.pop(place, set())
            self._writer[place] = task
        for place in task.reads:
            self._readers.setdefault(place, set()).add(task)
        for other in ahead:
            other.behind.append(task)
        task.ahead = len(ahead)
        return not ahead

    def leave(self, task: Task) -> list[Task]:
        """The task has ended. Returns those that may begin by that."""
        for place in task.writes:
            if self._writer.get(place) is task:
                del self._writer[place]
        for place in task.reads:
            if (readers := self._readers.get(place)) is not None:
                readers.discard(task)
                if not readers:
                    del self._readers[place]
        ready = []
        for other in task.behind:
            other.ahead -= 1
            if not other.ahead:
                ready.append(other)
        return ready


def failed(order: Order) -> list[News]:
    """What is told of an order that nobody has begun."""
    match order:
        case Load():
            return [Loaded(order.ticket, 0, (), 0.0)]
        case Look():
            return [Seen(order.ticket, 0, 0.0)]
        case Send():
            return [Sent(order.ticket, stored=False)]
        case Save():
            written = [] if order.disk_slot is None else [Written(order.ticket, disk=False)]
            return [Saved(order.ticket, host=False), *written]
    return []
