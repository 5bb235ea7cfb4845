"""Moves the bytes of KV blocks between the device, host memory and disk while steps run: orders in, news out.

Which block goes where is decided elsewhere (`xllm.kv.tiers`). Here an order is one or two tasks, and each runs in a
thread made for its kind, as soon as no task ahead of it needs the same place (`Turns`):

    copier    copies between device and host memory, in the device's order beside its work, and waits for them
    readers   bring records from disk into host slots
    writer    puts host slots on disk, and voids records there
    hashers   read blocks for their checksums, on behalf of the copier

Whatever fails becomes news. No error leaves its task, so no thread ends before `close`.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from xllm.core.transfer import Load, Loaded, News, Order, Save, Saved, Source, Written
from xllm.device.table import Device, Mark
from xllm.executor.block_copies import BlockCopies
from xllm.executor.host_tier import Hashers, HostTier
from xllm.executor.turns import CopyDown, LoadUp, Task, Turns, Void, Write

if TYPE_CHECKING:
    import torch

    from xllm.executor.disk_tier import DiskTier  # wants a system with file locks

log = logging.getLogger(__name__)

GROUP = 16  # blocks that are copied down before they are waited for, or checked before they are copied up
QUEUED_WRITES = 256  # blocks, and at most half the host's slots: the rest stays in memory alone
CLOSE_S = 5.0


class Mover:
    """`start` belongs to the thread that submits steps; everybody may ask for news. Owns the disk tier."""

    def __init__(
        self, device: Device, kv_cache: "torch.Tensor", host: HostTier, disk: "DiskTier | None" = None,
        *, workers: int = 2,
    ):  # fmt: skip
        """As `BlockCopies`. `workers` threads hash, as many read."""
        self._device = device
        self._block_copies = BlockCopies(device, kv_cache, host)
        self._host = host
        self._disk = disk
        self._workers = workers
        self._most_writes = max(1, min(QUEUED_WRITES, host.slots // 2))

        # under the lock of `_changed`
        self._changed = threading.Condition()
        self._turns = Turns()
        self._copies: deque[CopyDown] = deque()
        self._loads: deque[LoadUp] = deque()
        self._writes: deque[Write | Void] = deque()
        self._news: list[News] = []
        self._unfinished = 0  # tasks
        self._closing = False
        self._complaints: set[tuple[str, type]] = set()

        self._readers = ThreadPoolExecutor(workers, thread_name_prefix="xllm-kv-read")
        self._hashers = Hashers(host, workers)
        self._threads = [
            threading.Thread(target=run, name=f"xllm-kv-{name}", daemon=True)
            for name, run in (("copy", self._run_copier), ("write", self._run_writer))
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
                if mark is None or self._closing:
                    self._news += _failed(order)
                elif isinstance(order, Load):
                    self._enter(LoadUp(order, mark, begun))
                else:
                    self._enter(CopyDown(order, mark))
                    if order.disk_slot is not None:
                        self._enter(Write(order, order.disk_slot))
            self._changed.notify_all()

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
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            ended = self._changed.wait_for(lambda: not self._unfinished, CLOSE_S)
        if not ended:  # the file stays open: a late write must not find another one under its number
            log.warning("KV blocks were still on their way after %.0f s and have been given up", CLOSE_S)
            return
        for thread in self._threads:
            thread.join()
        self._readers.shutdown()
        self._hashers.close()
        if self._disk is not None:
            self._disk.close()

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
                    for _ in range(min(self._workers, task.unread)):
                        self._readers.submit(self._read_for, task)
                case LoadUp() as task:
                    self._loads.append(task)
                case Void() as task:
                    self._writes.append(task)
                case Write() as task:
                    if self._may_write(task.order):
                        self._writes.append(task)
                    else:
                        ready += self._leave(task, Written(task.order.ticket, disk=False))
        self._changed.notify_all()

    def _may_write(self, order: Save) -> bool:
        if self._disk is None or self._closing or len(self._writes) >= self._most_writes:
            return False
        return self._host.sealed(order.host_slot, order.name) is not None  # else it was not saved

    def _leave(self, task: Task, *news: News) -> list[Task]:
        self._unfinished -= 1
        self._news += news
        return self._turns.leave(task)

    def _finish(self, task: Task, *news: News) -> None:
        with self._changed:
            self._begin(deque(self._leave(task, *news)))

    # device and host

    def _run_copier(self) -> None:
        while work := self._next_copies():
            if isinstance(work, LoadUp):
                self._load(work)
            else:
                self._save(work)

    def _next_copies(self) -> LoadUp | list[CopyDown] | None:
        """A load if there is one, since a request waits for it; else some saves behind the same mark. None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._loads or self._copies or self._is_over())
            if self._loads:
                return self._loads.popleft()
            mark = self._copies[0].mark if self._copies else None
            group: list[CopyDown] = []
            while self._copies and self._copies[0].mark is mark and len(group) < GROUP:
                group.append(self._copies.popleft())
            return group or None

    def _is_over(self) -> bool:
        return self._closing and not self._unfinished

    def _save(self, group: list[CopyDown]) -> None:
        try:
            for task in group:
                self._host.unseal(task.order.host_slot)
            with self._block_copies.after(group[0].mark):
                self._block_copies.submit([(t.order.block, t.order.host_slot) for t in group], up=False)
            self._hashers.seal([_slot_and_name(task.order) for task in group])
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
            with self._block_copies.after(task.mark):
                sound = self._hashers.check([_slot_and_name(source) for source in sources])
                for first in range(0, len(sources), GROUP):
                    group = range(first, min(first + GROUP, len(sources)))
                    bad += [i for i in group if not next(sound)]
                    good = [i for i in group if not bad or i < bad[0]]
                    self._block_copies.submit([(blocks[i], sources[i].host_slot) for i in good], up=True)
            count = bad[0] if bad else len(sources)
        except Exception as e:
            self._complain("loaded", e)
        seconds = time.perf_counter() - task.begun
        self._finish(task, Loaded(task.order.ticket, count, bad, seconds))

    # host and disk

    def _read_for(self, task: LoadUp) -> None:
        """Read sources of a load as long as there are any, beside the other readers."""
        while True:
            try:
                source, disk_slot = task.to_read.popleft()
            except IndexError:
                return
            self._read(source, disk_slot)
            with self._changed:
                task.unread -= 1
                if not task.unread:
                    self._loads.append(task)
                    self._changed.notify_all()

    def _read(self, source: Source, disk_slot: int) -> None:
        """Bring one source into its host slot, under a seal if it is sound."""
        try:
            self._host.unseal(source.host_slot)
            if self._disk is not None and not self._closing:
                known = self._disk.read(disk_slot, source.name, self._host.array(source.host_slot))
                if known is not None:
                    self._host.seal(source.host_slot, source.name, known)
        except Exception as e:
            self._complain("read from disk", e)

    def _run_writer(self) -> None:
        while (task := self._next_write()) is not None:
            assert self._disk is not None, "nothing is queued without a disk"
            if isinstance(task, Write):
                self._finish(task, Written(task.order.ticket, self._write(task, self._disk)))
                continue
            for slot in task.slots:
                self._disk.invalidate(slot)
            self._finish(task)

    def _next_write(self) -> Write | Void | None:
        with self._changed:
            self._changed.wait_for(lambda: self._writes or self._is_over())
            return self._writes.popleft() if self._writes else None

    def _write(self, task: Write, disk: "DiskTier") -> bool:
        slot, name = _slot_and_name(task.order)
        # Checked first, or damage in host memory would be told as a block on disk. The record carries the checksum of
        # when the block was saved, so that damage between here and the disk is found as well.
        try:
            known = self._host.sealed(slot, name)
            if known is None or self._closing or not self._host.check(slot, name):
                return False
            return disk.write(task.disk_slot, name, self._host.array(slot), known)
        except Exception as e:
            self._complain("written to disk", e)
            return False

    def _complain(self, what: str, e: Exception) -> None:
        """Once per kind: a device that is lost fails with every order."""
        kind = (what, type(e))
        level = logging.DEBUG if kind in self._complaints else logging.WARNING
        self._complaints.add(kind)
        log.log(level, "a KV block could not be %s: %s", what, e, exc_info=e)


def _slot_and_name(of: Save | Source) -> tuple[int, bytes]:
    return of.host_slot, of.name


def _failed(order: Order) -> list[News]:
    if isinstance(order, Load):
        return [Loaded(order.ticket, 0, (), 0.0)]
    written = [] if order.disk_slot is None else [Written(order.ticket, disk=False)]
    return [Saved(order.ticket, host=False), *written]
