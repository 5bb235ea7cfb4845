"""Moves KV blocks between host memory and disk, in threads of its own:

    readers   bring records from disk into host slots
    writer    puts host slots on disk, and voids records there

Part of the mover (`xllm.executor.mover`), which says whose turn it is and hears of every end.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from xllm.core.transfer import Source, Written
from xllm.executor.host_tier import HostTier
from xllm.executor.turns import LoadUp, Void, Write

if TYPE_CHECKING:
    from xllm.executor.disk_tier import DiskTier  # wants a system with file locks

log = logging.getLogger(__name__)

QUEUED_WRITES = 256  # blocks, and at most half the host's slots: the rest stays in memory alone


class DiskMover:
    """Owns the tier."""

    def __init__(
        self, host: HostTier, disk: "DiskTier", *, brought: Callable[[LoadUp, int], None],
        finish: Callable[..., None], readers: int = 2,
    ):  # fmt: skip
        """`brought` hears of so many more sources that have come or will not, `finish` of writes (task, perhaps news); neither
        is called under a lock of this object."""
        self._host = host
        self._disk = disk
        self._brought = brought
        self._finish = finish
        self._workers = readers
        self._most_writes = max(1, min(QUEUED_WRITES, host.slots // 2))
        self._closing = False
        self._changed = threading.Condition()
        self._writes: deque[Write | Void | None] = deque()  # under its lock
        self._complaints: set[tuple[str, type]] = set()
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="xllm-kv-read")
        self._writer = threading.Thread(target=self._run_writer, name="xllm-kv-write", daemon=True)
        self._writer.start()

    # for the mover; returns at once

    def read(self, task: LoadUp) -> None:
        for _ in range(min(self._workers, len(task.to_read))):
            self._readers.submit(self._read_for, task)

    def write(self, task: Write) -> Written | None:
        """Why it will not be, where it will not."""
        order = task.order
        if self._closing or self._host.sealed(order.host_slot, order.name) is None:  # it was not saved
            return Written(order.ticket, disk=False)
        if len(self._writes) >= self._most_writes:
            return Written(order.ticket, disk=False, behind=True)
        self._queue(task)
        return None

    def void(self, task: Void) -> None:
        self._queue(task)

    def recover(self) -> list[tuple[int, bytes]]:
        return self._disk.recover()

    def end(self) -> None:
        """What waits to be read or written is left; records are voided still."""
        self._closing = True

    def close(self) -> None:
        """After `end`, once all tasks have ended."""
        self._queue(None)
        self._writer.join()
        self._readers.shutdown()
        self._disk.close()

    def _queue(self, one: Write | Void | None) -> None:
        with self._changed:
            self._writes.append(one)
            self._changed.notify()

    # threads

    def _read_for(self, task: LoadUp) -> None:
        """Read sources of a load as long as there are any, beside the other readers."""
        while True:
            try:
                source, disk_slot = task.to_read.popleft()
            except IndexError:
                return
            self._read(source, disk_slot)
            self._brought(task, 1)

    def _read(self, source: Source, disk_slot: int) -> None:
        """Bring one source into its host slot, under a seal if it is sound."""
        try:
            self._host.unseal(source.host_slot)
            if not self._closing:
                known = self._disk.read(disk_slot, source.name, self._host.array(source.host_slot))
                if known is not None:
                    self._host.seal(source.host_slot, source.name, known)
        except Exception as e:
            self._complain("read from disk", e)

    def _run_writer(self) -> None:
        while (task := self._next_write()) is not None:
            if isinstance(task, Write):
                self._finish(task, Written(task.order.ticket, self._write(task)))
                continue
            for slot in task.slots:
                self._disk.invalidate(slot)
            self._finish(task)

    def _next_write(self) -> Write | Void | None:
        with self._changed:
            self._changed.wait_for(lambda: self._writes)
            return self._writes.popleft()

    def _write(self, task: Write) -> bool:
        slot, name = task.order.host_slot, task.order.name
        # Checked first, or damage in host memory would be told as a block on disk. The record carries the checksum of
        # when the block was saved, so that damage between here and the disk is found as well.
        try:
            known = self._host.sealed(slot, name)
            if known is None or self._closing or not self._host.check(slot, name):
                return False
            return self._disk.write(task.disk_slot, name, self._host.array(slot), known)
        except Exception as e:
            self._complain("written to disk", e)
            return False

    def _complain(self, what: str, e: Exception) -> None:
        """Once per kind: a disk that fails, fails again and again."""
        kind = (what, type(e))
        level = logging.DEBUG if kind in self._complaints else logging.WARNING
        self._complaints.add(kind)
        log.log(level, "a KV block could not be %s: %s", what, e, exc_info=e)
