"""Files of a shared directory: whole or not there, whoever writes them, and about as many as the quota says."""

import errno
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from xllm.core.errors import ConfigError
from xllm.executor.stores.directory import DirectoryStore
from xllm.executor.stores.table import Address

RECORD = 5000


def key(n, realm="realm"):
    return f"{realm}-{n:032x}"


def record(n):
    return np.random.default_rng(n).integers(0, 256, RECORD, dtype=np.uint8)


def open_store(path, size=""):
    return DirectoryStore(Address(f"file://{path}" + (f"?size={size}" if size else "")))


def put(store, *numbers):
    return store.put([key(n) for n in numbers], [record(n) for n in numbers])


def get(store, *numbers):
    """Of each: whether it is there; if so it is the right one."""
    into = np.zeros((len(numbers), RECORD), dtype=np.uint8)
    there = store.get([key(n) for n in numbers], [*into])
    for n, row, came in zip(numbers, into, there, strict=True):
        assert not came or row.tobytes() == record(n).tobytes()
    return there


def files(path):
    return list(path.glob("*/??/*"))


@pytest.fixture
def store(tmp_path):
    store = open_store(tmp_path)
    yield store
    store.close()


def test_what_was_put_is_there_for_all(tmp_path, store):
    assert put(store, 1, 2) == [True, True]
    other = open_store(tmp_path)
    assert get(other, 2, 3, 1) == [True, False, True]
    assert other.exists([key(n) for n in (1, 2, 3)]) == [True, True, False]
    assert other.exists([key(n) for n in (3, 1)]) == [False, False], "behind a missing one nobody looks"
    assert other.exists([key(1, "another")]) == [False]
    other.remove([key(1), key(7)])
    assert get(store, 1, 2) == [False, True]


def test_a_record_never_changes(tmp_path, store):
    put(store, 1)
    (file,) = files(tmp_path)
    before = file.stat().st_ino
    assert put(store, 1) == [True]
    assert file.stat().st_ino == before


def test_others_may_not_read_it(tmp_path, store):
    put(store, 1)
    (file,) = files(tmp_path)
    assert file.stat().st_mode & 0o077 == 0
    assert file.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("size", [0, 1, RECORD - 1, RECORD + 1])
def test_a_file_of_another_length_is_no_record(tmp_path, store, size):
    put(store, 1)
    (file,) = files(tmp_path)
    file.write_bytes(bytes(size))
    assert get(store, 1) == [False]


def test_two_that_write_the_same(tmp_path):
    stores = [open_store(tmp_path) for _ in range(4)]
    threads = [threading.Thread(target=put, args=(store, *range(50))) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(get(stores[0], *range(50)))
    assert len(files(tmp_path)) == 50, "no unfinished ones are left"


def test_a_full_disk_is_no_failure_of_the_store(store, tmp_path, monkeypatch, caplog):
    real = os.write

    def full(fd, data):
        if len(data) == RECORD:
            return real(fd, data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert put(store, 1, 2) == [False, False]
    assert caplog.text.count("No space left") == 1
    assert files(tmp_path) == []
    assert put(store, 1) == [True]


def test_what_does_not_answer_raises(store, tmp_path, monkeypatch):
    put(store, 1)

    def fail(*args, **kwargs):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        with pytest.raises(OSError, match="Stale"):
            put(store, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        with pytest.raises(OSError, match="Stale"):
            get(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", fail)
        with pytest.raises(OSError, match="Stale"):
            store.exists([key(1)])


def test_a_directory_that_cannot_be_had(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be kept in"):
        open_store(tmp_path / "file")


# the quota


def wait_until(true):
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def age(path, n, seconds):
    """As if it had been used so long ago."""
    then = time.time() - seconds
    os.utime(path / "realm" / f"{n:032x}"[:2] / f"{n:032x}", (then, then))


def test_more_than_the_quota_goes_least_recently_used_first(tmp_path):
    store = open_store(tmp_path)
    put(store, *range(40))
    for n in range(40):
        age(tmp_path, n, 1000 - n)
    assert get(store, 3) == [True], "which counts as used"
    small = open_store(tmp_path, size=f"{20 * RECORD}")
    wait_until(lambda: len(files(tmp_path)) <= 18)
    assert get(small, 3, 39, 38, 30) == [True] * 4
    assert get(small, 0, 1, 2, 4) == [False] * 4
    small.close()


def test_nobody_writes_far_beyond_the_quota(tmp_path):
    store = open_store(tmp_path, size=f"{20 * RECORD}")
    for n in range(200):
        put(store, n)
    assert len(files(tmp_path)) <= 22
    wait_until(lambda: put(store, 1000) == [True])
    assert get(store, 1000) == [True]
    store.close()


def test_strays_are_swept_away(tmp_path):
    store = open_store(tmp_path)
    put(store, 1)
    (file,) = files(tmp_path)
    old, young = (file.with_name(f"{name}.part") for name in ("old", "young"))
    for part in (old, young):
        part.write_bytes(b"unfinished")
    os.utime(old, (1, 1))
    open_store(tmp_path, size="1GiB")
    wait_until(lambda: not old.exists())
    assert young.exists()
    assert file.exists()
