"""Moves the bytes of KV blocks between the device, host memory and what is below while steps run: orders in, news out.

Which block goes where is decided elsewhere (`xllm.kv.tiers`). Here an order is one or two tasks, and each runs in a
thread made for its kind, as soon as no task ahead of it needs the same place (`Turns`):

    saver     copies from the device to host memory, behind the steps that a save was ordered after, and waits for it
    loader    copies from host memory to the device, at once, and waits for it: a request waits, too
    hashers   read blocks for their checksums, on behalf of the two

What concerns disk or store is done beside that, by `DiskMover` and `RemoteMover`.
Whatever fails becomes news. No error leaves its task, so no thread ends before `close`.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from xllm.core.transfer import (
    Disown,
    Load,
    Loaded,
    Look,
    News,
    Order,
    Save,
    Saved,
    Send,
    Sent,
    Source,
    Written,
)
from xllm.device.table import Device, Mark
from xllm.executor.block_copies import BlockCopies
from xllm.executor.disk_mover import DiskMover
from xllm.executor.host_tier import Hashers, HostTier
from xllm.executor.remote_mover import RemoteMover
from xllm.executor.remote_tier import RemoteTier
from xllm.executor.turns import CopyDown, LoadUp, SendOut, Task, Turns, Void, Write, failed

if TYPE_CHECKING:
    import torch

    from xllm.executor.disk_tier import DiskTier  # wants a system with file locks

log = logging.getLogger(__name__)

GROUP = 16  # blocks that are copied down before they are waited for, or checked before they are copied up
CLOSE_S = 5.0


class Mover:
    """`start` belongs to the thread that submits steps; everybody may ask for news. Owns the tiers behind host memory."""

    def __init__(
        self, device: Device, kv_cache: "torch.Tensor", host: HostTier, disk: "DiskTier | None" = None,
        remote: RemoteTier | None = None, *, workers: int = 2, ready: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        """As `BlockCopies`. `workers` threads hash what is saved, as many what is loaded, as many read from disk, as many
        fetch from the store."""
        self._device = device
        self._block_copies = BlockCopies(device, kv_cache, host, ready)
        self._host = host

        # under the lock of `_changed`
        self._changed = threading.Condition()
        self._turns = Turns()
        self._copies: deque[CopyDown] = deque()
        self._loads: deque[LoadUp] = deque()
        self._news: list[News] = []
        self._unfinished = 0  # tasks
        self._closing = False
        self._complaints: set[tuple[str, type]] = set()

        # the last load from the same tiers; the loader's
        self._ended: dict[frozenset[tuple[bool, bool]], float] = {}
        self._sealers, self._checkers = Hashers(host, workers), Hashers(host, workers)
        ends, comes = self._finish, self._brought
        self._disk = self._remote = None
        if disk is not None:
            self._disk = DiskMover(host, disk, brought=comes, finish=ends, readers=workers)
        if remote is not None:
            self._remote = RemoteMover(
                host, remote, answered=self._tell, brought=comes, finish=ends, fetchers=workers
            )
        self._threads = [
            threading.Thread(target=self._run_saver, name="xllm-kv-save", daemon=True),
            threading.Thread(target=self._run_loader, name="xllm-kv-load", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # for the executor

    def start(self, orders: Sequence[Order], void: Sequence[int] = ()) -> None:
        """Records in the disk slots `void` are to be believed no more, after a restart neither; then `orders`, behind
        all steps submitted so far. Returns at once."""
        begun = time.perf_counter()
        mark: Mark | None = None
        if orders:
            try:
                mark = self._device.mark()
            except Exception as e:  # the device is lost, as the next step will say
                self._complain("ordered", e)
        with self._changed:
            if void and self._disk is not None and not self._closing:
                self._enter(Void(void))
            for order in orders:
                if isinstance(
                    order, Disown
                ):  # no error of the device or end of the engine makes sound what is not
                    assert self._remote is not None, "only what lies in a store is disowned"
                    self._remote.disown(order)
                elif mark is None or self._closing:
                    self._news += failed(order)
                else:
                    self._start(order, mark, begun)
            self._changed.notify_all()

    def _start(self, order: Order, mark: Mark, begun: float) -> None:
        remote = self._remote
        match order:
            case Load():
                self._enter(LoadUp(order, begun, "" if remote is None else remote.realm))
            case Save():
                self._enter(CopyDown(order, mark))
                if order.disk_slot is not None:
                    self._enter(Write(order, order.disk_slot))
            case Send():
                assert remote is not None, "nothing is sent where there is no store"
                self._enter(SendOut(order, remote.realm))
            case Look():
                assert remote is not None, "nothing is asked where there is no store"
                remote.look(order, begun)

    def news(self) -> list[News]:
        """What has happened since the last call."""
        with self._changed:
            news, self._news = self._news, []
        return news

    def wait(self, seconds: float) -> bool:
        """Until there is news; False where there is none after so long."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._news), seconds)

    def recover(self) -> list[tuple[int, bytes]]:
        """As `DiskTier.recover`; before the first order."""
        return [] if self._disk is None else self._disk.recover()

    def close(self) -> None:
        """Ends all orders: copies are made, records voided, what waits to be read or written is left. Steps must have
        ended. Where a disk or a device hangs, it is left alone after some seconds."""
        below = [mover for mover in (self._disk, self._remote) if mover is not None]
        for mover in below:
            mover.end()
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            ended = self._changed.wait_for(lambda: not self._unfinished, CLOSE_S)
        if not ended:  # the file stays open: a late write must not find another one under its number
            log.warning("KV blocks were still on their way after %.0f s and have been given up", CLOSE_S)
            return
        for thread in self._threads:
            thread.join()
        self._sealers.close()
        self._checkers.close()
        for mover in below:
            mover.close()

    # tasks begin and end: the lock is held by who calls, but for `_finish`

    def _enter(self, task: Task) -> None:
        self._unfinished += 1
        if self._turns.enter(task):
            self._begin(deque([task]))

    def _begin(self, ready: deque[Task]) -> None:
        while ready:
            match ready.popleft():
                case CopyDown() as task:
                    self._copies.append(task)
                case LoadUp() as task if task.unread:
                    self._fill(task)
                case LoadUp() as task:
                    self._loads.append(task)
                case Void() as task:
                    assert self._disk is not None, "nothing is void without a disk"
                    self._disk.void(task)
                case Write() as task:
                    nowhere = Written(task.order.ticket, disk=False)
                    refused = nowhere if self._disk is None else self._disk.write(task)
                    if refused is not None:
                        ready += self._leave(task, refused)
                case SendOut() as task:
                    if self._remote is None or not self._remote.send(task):
                        ready += self._leave(task, Sent(task.order.ticket, stored=False))
        self._changed.notify_all()

    def _fill(self, task: LoadUp) -> None:
        """Has the host slots filled that are to be. Where there is nothing to fill them from they will hold nothing."""
        lost = [] if self._disk is not None else [source for source, _ in task.to_read]
        lost += [] if self._remote is not None else [*task.to_fetch]
        for source in lost:
            self._host.unseal(source.host_slot)
        if self._disk is not None:
            self._disk.read(task)
        if self._remote is not None:
            self._remote.fetch(task)
        task.unread -= len(lost)
        if not task.unread:
            self._loads.append(task)

    def _leave(self, task: Task, *news: News) -> list[Task]:
        self._unfinished -= 1
        self._news += news
        return self._turns.leave(task)

    def _finish(self, task: Task, *news: News) -> None:
        with self._changed:
            self._begin(deque(self._leave(task, *news)))

    def _tell(self, news: News) -> None:
        with self._changed:
            self._news.append(news)
            self._changed.notify_all()

    def _brought(self, task: LoadUp, count: int = 1) -> None:
        """So many sources of a load have come into their host slots, or will not."""
        with self._changed:
            task.unread -= count
            if not task.unread:
                self._loads.append(task)
                self._changed.notify_all()

    # device and host

    def _run_saver(self) -> None:
        while group := self._next_saves():
            self._save(group)

    def _run_loader(self) -> None:
        while (task := self._next_load()) is not None:
            self._load(task)

    def _next_load(self) -> LoadUp | None:
        """None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._loads or self._is_over())
            return self._loads.popleft() if self._loads else None

    def _next_saves(self) -> list[CopyDown]:
        """Some behind the same mark. None of them at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._copies or self._is_over())
            mark = self._copies[0].mark if self._copies else None
            group: list[CopyDown] = []
            while self._copies and self._copies[0].mark is mark and len(group) < GROUP:
                group.append(self._copies.popleft())
            return group

    def _is_over(self) -> bool:
        return self._closing and not self._unfinished

    def _save(self, group: list[CopyDown]) -> None:
        try:
            for task in group:
                self._host.unseal(task.order.host_slot)
            with self._block_copies.down(group[0].mark):
                self._block_copies.submit([(t.order.block, t.order.host_slot) for t in group], up=False)
            self._sealers.seal([_slot_and_name(task.order) for task in group])
        except Exception as e:
            self._complain("saved", e)
        for task in group:
            held = self._host.sealed(task.order.host_slot, task.order.name) is not None
            self._finish(task, Saved(task.order.ticket, held))

    def _load(self, task: LoadUp) -> None:
        """Copies up what lies before the first bad source, a group while the next is being checked."""
        sources, blocks = task.order.sources, task.order.blocks
        count = 0
        bad: list[int] = []
        try:
            with self._block_copies.up():
                sound = self._checkers.check([_slot_and_name(source) for source in sources])
                for first in range(0, len(sources), GROUP):
                    group = range(first, min(first + GROUP, len(sources)))
                    bad += [i for i in group if not next(sound)]
                    good = [i for i in group if not bad or i < bad[0]]
                    self._block_copies.submit([(blocks[i], sources[i].host_slot) for i in good], up=True)
            count = bad[0] if bad else len(sources)
        except Exception as e:
            self._complain("loaded", e)
        self._finish(task, Loaded(task.order.ticket, count, bad, self._took(task)))

    def _took(self, task: LoadUp) -> float:
        """Seconds that a load which has just ended was under way alone: of those before it, each has counted its own."""
        tiers = frozenset((source.disk_slot is not None, source.stored) for source in task.order.sources)
        now, before = time.perf_counter(), self._ended.get(tiers, 0.0)
        self._ended[tiers] = now
        return now - max(task.begun, before)

    def _complain(self, what: str, e: Exception) -> None:
        """Once per kind: a device that is lost fails with every order."""
        kind = (what, type(e))
        level = logging.DEBUG if kind in self._complaints else logging.WARNING
        self._complaints.add(kind)
        log.log(level, "a KV block could not be %s: %s", what, e, exc_info=e)


def _slot_and_name(of: Save | Source) -> tuple[int, bytes]:
    return of.host_slot, of.name
