"""KV blocks in one file on a local disk, for this run and for the next.

The file is a header of one page and then records at a fixed stride, one per slot:

    page      a record header (`xllm.executor.records`): number of the write, fingerprint, name, checksum
    pages     the block, filled up to whole pages

A record is never believed when it is torn or damaged. It is voided before anything of it is overwritten, its page is
written last, and whoever reads it compares the checksum of what was read. So a process may be killed at any point:
writes of a process arrive in the system's memory in their order. Nothing is flushed, so after a loss of power they may
be on the disk in any other; then the checksum alone decides, and a record that fails is one block to compute again.
"""

import errno
import fcntl
import logging
import os
import struct
from pathlib import Path

import numpy as np

from xllm.core.errors import ConfigError
from xllm.executor import records
from xllm.executor.host_tier import checksum
from xllm.executor.records import Record

log = logging.getLogger(__name__)

PAGE = 4096
VERSION = 1
FILE_MAGIC = b"xllm-kv\0"
_FILE = struct.Struct("<8sIIQQ16s")  # magic, version, page, block_bytes, stride, owner


class DiskTier:
    """Slots 0 to `slots` - 1 of `block_bytes` each. The file grows as far as slots are used.

    Threads may use different slots at once; where two meet in one slot, a reader gets a whole block or nothing.
    """

    def __init__(self, path: str | Path, slots: int, block_bytes: int, fingerprint: bytes):
        """Opens the file, or begins it anew where it is of another `fingerprint` (what the bytes depend on beside
        their names: model, dtype, layout) or form. ConfigError where it cannot be had or another engine has it."""
        self.path = Path(path)
        self.slots = slots
        self.block_bytes = block_bytes
        self._owner = records.owner_of(fingerprint)
        self._stride = PAGE + -(-block_bytes // PAGE) * PAGE
        self._complaints: set[tuple[str, int | None]] = set()
        self._number = 0  # of the last write
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)  # KV tells what was in a prompt
        except OSError as e:
            raise ConfigError(f"KV blocks cannot be kept in {self.path}: {e.strerror}") from e
        try:
            self._lock()
            self._open()
        except BaseException:
            self.close()
            raise

    # the blocks

    def write(self, slot: int, name: bytes, data: np.ndarray, known: int) -> bool:
        """Put a block (uint8 [block_bytes]) into a slot, with the checksum `known` of what it should be. False where the
        disk is full or fails; then the slot holds nothing."""
        assert data.nbytes == self.block_bytes
        at = self._offset(slot)
        self._number += 1
        record = records.pack(Record(self._number, name, known), self.block_bytes, self._owner)
        try:
            self._write_all(bytes(PAGE), at)
            self._write_all(data.data, at + PAGE)
            self._write_all(
                record.ljust(PAGE, b"\0"), at
            )  # whole pages: the system need not read one to change it
        except OSError as e:
            self._complain("written", e)
            self.invalidate(slot)
            return False
        return True

    def read(self, slot: int, name: bytes, into: np.ndarray) -> int | None:
        """Fill `into` (uint8 [block_bytes]) with the block called `name` and return its checksum. None where the slot
        does not hold it whole; then what is in `into` is of no use."""
        assert into.nbytes == self.block_bytes
        at = self._offset(slot)
        try:
            record = self._parse(os.pread(self._fd, PAGE, at))
            if record is None or record.name != name or not self._read_all(into.data, at + PAGE):
                return None
        except OSError as e:
            self._complain("read", e)
            return None
        return record.known if checksum(name, into) == record.known else None

    def invalidate(self, slot: int) -> bool:
        """The slot holds nothing, after a restart neither. False where that could not be written."""
        at = self._offset(slot)
        try:
            if at < os.fstat(self._fd).st_size:
                self._write_all(bytes(PAGE), at)
        except OSError as e:
            self._complain("voided", e)
            return False
        return True

    def recover(self) -> list[tuple[int, bytes]]:
        """(slot, name) of all that an earlier run has left, in the order it was written. To be called before the first
        write. A name that lies in two slots is told once, as the younger. The blocks have not been looked at: `read`
        says which of them are whole."""
        found: dict[bytes, tuple[int, int]] = {}
        room = (
            os.fstat(self._fd).st_size - 2 * PAGE - self.block_bytes
        )  # in front of a block that ends where the file does
        for slot in range(min(self.slots, room // self._stride + 1)):
            try:
                record = self._parse(os.pread(self._fd, PAGE, self._offset(slot)))
            except OSError as e:
                self._complain("read", e)
                continue
            if record is not None:
                self._number = max(self._number, record.number)
                found[record.name] = max(found.get(record.name, (-1, -1)), (record.number, slot))
        return [(slot, name) for name, (_, slot) in sorted(found.items(), key=lambda item: item[1])]

    def close(self) -> None:
        """Ends the lock. Nobody may be reading or writing any more."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    # the file

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ConfigError(
                    f"{self.path} is in use by another engine; give each a place of its own"
                ) from e
            raise ConfigError(f"{self.path} cannot be locked: {e.strerror}") from e

    def _open(self) -> None:
        form = _FILE.pack(FILE_MAGIC, VERSION, PAGE, self.block_bytes, self._stride, self._owner)
        header = records.sealed(form).ljust(PAGE, b"\0")
        try:
            size = os.fstat(self._fd).st_size
            if os.pread(self._fd, PAGE, 0) != header:
                if size:
                    log.warning(
                        "%s is of another model, layout or version, or damaged: begun anew", self.path
                    )
                os.ftruncate(self._fd, 0)
                self._write_all(header, 0)
            elif size > self._offset(self.slots):
                os.ftruncate(self._fd, self._offset(self.slots))  # fewer slots than before
        except OSError as e:
            raise ConfigError(f"KV blocks cannot be kept in {self.path}: {e.strerror}") from e

    def _offset(self, slot: int) -> int:
        return PAGE + slot * self._stride

    def _parse(self, page: bytes) -> Record | None:
        return records.parse(page, self.block_bytes, self._owner)

    def _write_all(self, data: bytes | memoryview, at: int) -> None:
        rest = memoryview(data)
        while rest:
            done = os.pwrite(self._fd, rest, at)  # less than asked for where a disk is filling up
            rest, at = rest[done:], at + done

    def _read_all(self, into: memoryview, at: int) -> bool:
        """False where the file ends before."""
        rest = into
        while rest:
            done = os.preadv(self._fd, [rest], at)
            if done == 0:
                return False
            rest, at = rest[done:], at + done
        return True

    def _complain(self, what: str, e: OSError) -> None:
        """Once per kind: a full disk fails with every block."""
        if (what, e.errno) not in self._complaints:
            self._complaints.add((what, e.errno))
            log.warning("a KV block could not be %s in %s: %s", what, self.path, e.strerror)
