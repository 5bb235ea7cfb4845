"""A directory that several engines share, on NFS say: one file a record.

A file is written under another name and then renamed, so it is there whole or not at all. With a quota, what was used least
recently goes when there is more: each engine looks around now and then and deletes, by the times of last use that the
files carry, so what lies there is about the quota, not exactly.
"""

import contextlib
import errno
import itertools
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from xllm.config.memory import gib
from xllm.core.errors import ConfigError
from xllm.executor.stores.table import Address

log = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)
LEFT = 0.9  # of the quota, after deleting
UNSEEN = 1 / 16  # of the quota may be written before an engine looks around again
OVER = 1 + UNSEEN  # of the quota: nothing more is written
FRESH_S = 60.0  # a use is not noted again so soon
STRAY_S = 3600.0  # older than this, an unfinished file is nobody's
UNFINISHED = ".part"


class DirectoryStore:
    """`file:///DIR?size=500GiB`; without a size it fills what there is."""

    def __init__(self, address: Address):
        self._root, self._quota = _settings(address)
        self._own = os.urandom(8).hex()  # process numbers are not unique among machines
        self._count = itertools.count()
        self._full = False
        self._held = 0  # bytes, when somebody last looked
        self._written = 0  # since then, by this engine
        self._refused = False  # a record, since then
        self._changed = threading.Condition()
        self._closing = False
        try:
            self._root.mkdir(parents=True, exist_ok=True, mode=0o700)  # KV tells what was in a prompt
            probe = self._root / f".{self._own}{UNFINISHED}"
            probe.touch()
            probe.unlink()
        except OSError as e:
            raise ConfigError(f"--kv-remote: KV blocks cannot be kept in {self._root}: {e.strerror}") from e
        if self._quota:
            threading.Thread(target=self._tidy, name="xllm-kv-tidy", daemon=True).start()

    @staticmethod
    def check(address: Address) -> int:
        _settings(address)
        return 0

    def register(self, memory: np.ndarray) -> None:
        pass

    def put(self, keys: Sequence[str], records: Sequence[np.ndarray]) -> list[bool]:
        return [self._put(self._path(key), record) for key, record in zip(keys, records, strict=True)]

    def get(self, keys: Sequence[str], into: Sequence[np.ndarray]) -> list[bool]:
        got = [_read(self._path(key), record) for key, record in zip(keys, into, strict=True)]
        for key, there in reversed(list(zip(keys, got, strict=True))):  # the head is to go last
            if there:
                _use(self._path(key))
        return got

    def exists(self, keys: Sequence[str]) -> list[bool]:
        there = [*itertools.takewhile(lambda key: _is_there(self._path(key)), keys)]
        return [True] * len(there) + [False] * (len(keys) - len(there))

    def remove(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._path(key).unlink(missing_ok=True)

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    # one file

    def _path(self, key: str) -> Path:
        realm, _, name = key.rpartition("-")
        return self._root / realm / name[:2] / name

    def _put(self, path: Path, record: np.ndarray) -> bool:
        if _use(path):
            return True
        with self._changed:
            refused = bool(self._quota) and self._held + self._written + record.nbytes > OVER * self._quota
            self._refused |= refused
            self._written += 0 if refused else record.nbytes
            self._changed.notify_all()
        if refused:
            return False
        part = path.with_name(f"{path.name}.{self._own}-{next(self._count)}{UNFINISHED}")
        try:
            _write(part, record)
            os.replace(part, path)
        except OSError as e:
            _delete(part)
            if e.errno not in FULL:
                raise
            log.log(
                logging.DEBUG if self._full else logging.WARNING, "KV blocks: %s: %s", self._root, e.strerror
            )
            self._full = True
            return False
        self._full = False
        return True

    # the quota

    def _tidy(self) -> None:
        """Looks around at the start, and whenever enough has been written since."""
        while True:
            seen, refused, self._refused = self._written, self._refused, False
            try:
                held = self._prune(self._quota if not refused else LEFT * self._quota)
            except Exception as e:
                log.warning("KV blocks in %s could not be counted: %s", self._root, e)
                held = self._held
            with self._changed:
                self._held = held
                self._written -= seen  # what came meanwhile may count twice
                self._changed.wait_for(self._is_due)
                if self._closing:
                    return

    def _is_due(self) -> bool:
        return self._closing or self._refused or self._written > UNSEEN * self._quota

    def _prune(self, most: float) -> int:
        """Delete what is too much where there are more bytes than `most`; returns how many are left."""
        found = sorted(self._files())
        held = sum(size for _, size, _ in found)
        if held <= most:
            return held
        gone = 0
        for _, size, path in found:
            if held <= LEFT * self._quota or self._closing:
                break
            _delete(path)
            held -= size
            gone += 1
        log.info("%s held more than %s of KV blocks: %d deleted", self._root, gib(self._quota), gone)
        return held

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of all records of all engines; strays are deleted on the way."""
        now = time.time()
        for path in self._root.glob("*/??/*"):
            try:
                stat = path.stat()
            except OSError:  # somebody else has deleted it
                continue
            if path.name.endswith(UNFINISHED) and now - stat.st_mtime > STRAY_S:
                _delete(path)
            else:
                yield stat.st_mtime, stat.st_size, path


def _settings(address: Address) -> tuple[Path, int]:
    path, size = unquote(address.path), address.size("size", 0)
    address.end()
    if address.place not in ("", "localhost") or not path.strip("/"):
        raise ConfigError(
            f"--kv-remote {address.url}: file:// wants an absolute path, as in file:///shared/kv"
        )
    return Path(path), size


def _write(path: Path, record: np.ndarray) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        fd = os.open(path, flags, 0o600)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(path, flags, 0o600)
    try:
        rest = memoryview(record.data)
        while rest:
            rest = rest[os.write(fd, rest) :]
    finally:
        os.close(fd)  # where the server of a network file system says that it is full, this does


def _read(path: Path, into: np.ndarray) -> bool:
    try:
        with path.open("rb", buffering=0) as file:
            rest = memoryview(into.data)
            while rest:
                count = file.readinto(rest)
                if not count:
                    return False  # shorter than a record
                rest = rest[count:]
            return not file.read(1)
    except FileNotFoundError:
        return False


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def _use(path: Path) -> bool:
    """Note a use; False where there is no such file."""
    try:
        if time.time() - path.stat().st_mtime > FRESH_S:
            os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
