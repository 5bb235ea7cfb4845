"""Pages in host memory: what the system holds, keeps apart and refuses."""

import errno
import os
import random
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xllm.core.errors import ConfigError
from xllm.device import pages_cpu
from xllm.device.pages_cpu import CpuPages

MIB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="memfd is Linux")


def held(space):
    """Bytes of memory that the system counts for a space in host memory."""
    return os.fstat(space._file).st_blocks * 512


@linux
def test_the_systems_memory_follows():
    space = CpuPages(MIB, 64, 200)
    assert held(space) == 0
    space.create(0, 64)
    assert held(space) == 64 * MIB, "before anything is touched"
    space.map(0, range(64))
    space.map(100, range(64))
    space.tensor[100 * MIB : 164 * MIB].fill_(1)
    space.unmap(0, 64)
    space.unmap(100, 64)
    space.destroy(10, 20)
    assert held(space) == 44 * MIB == space.created
    space.map(0, range(10))
    assert space.tensor[: 10 * MIB].unique().tolist() == [1]
    space.close()
    with pytest.raises(OSError):
        os.fstat(space._file)


@linux
def test_addresses_for_terabytes():
    places = 1 << 25
    space = CpuPages(MIB // 4, 2, places)
    space.create(0, 2)
    space.map(places - 1, [1])
    space.map(3, [1])
    space.tensor[-1] = 5
    assert space.tensor[4 * MIB // 4 - 1] == 5
    space.close()
    with pytest.raises(MemoryError, match="the system reserves no"):
        CpuPages(1 << 40, 1, 1 << 20)


@linux
def test_a_bare_place_cannot_be_read():
    space = CpuPages(4096, 1, 3)
    space.create(0, 1)
    space.map(1, [0])
    reading, writing = os.pipe()

    numbers: Any = space.tensor.numpy()

    def send(place):  # the system reads for us, and says so where it cannot
        return os.write(writing, numbers[place * 4096 : place * 4096 + 100])

    assert send(1) == 100
    space.unmap(1)
    for place in range(3):
        with pytest.raises(OSError) as caught:
            send(place)
        assert caught.value.errno == errno.EFAULT
    os.close(reading)
    os.close(writing)
    space.close()


@linux
def test_what_the_machine_has_not_free_is_not_taken(monkeypatch):
    space = CpuPages(MIB, 1 << 22, 4)
    with pytest.raises(MemoryError, match=r"4194304 MiB of host memory are not to be had: \d+ MiB are free"):
        space.create(0, 1 << 22)
    monkeypatch.setattr(pages_cpu, "cpu_facts", lambda: SimpleNamespace(free_bytes=10 * MIB))
    with pytest.raises(MemoryError, match="11 MiB of host memory are not to be had: 10 MiB are free"):
        space.create(0, 11)
    assert held(space) == space.created == 0
    space.create(0, 10)
    space.close()


@linux
def test_memory_that_the_system_does_not_give(monkeypatch):
    space = CpuPages(MIB, 4, 4)
    for code, error in ((errno.ENOSPC, MemoryError), (errno.ENOMEM, MemoryError), (errno.EIO, OSError)):

        def refuse(file, offset, nbytes, code=code):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(error, match=os.strerror(code)):
            space.create(0, 4)
        assert space.created == 0
    monkeypatch.undo()
    space.create(0, 4)
    space.close()


class Refusing:
    """The system, which refuses from so many mmaps on."""

    def __init__(self, most):
        self._real, self._most = pages_cpu._libc(), most
        self.laid: list[int] = []  # bytes each

    def mmap(self, address, nbytes, *more):
        if len(self.laid) == self._most:
            return pages_cpu._FAILED
        self.laid.append(nbytes)
        return self._real.mmap(address, nbytes, *more)


@linux
def test_neighbours_among_pages_are_laid_in_one_step(monkeypatch):
    space = CpuPages(4096, 8, 16)
    space.create(0, 8)
    libc = Refusing(99)
    monkeypatch.setattr(pages_cpu, "_libc", lambda: libc)
    space.map(2, [4, 5, 6, 1, 2, 7])
    assert libc.laid == [3 * 4096, 2 * 4096, 4096]
    space.map(10, range(8, 2, -1)[1:])
    assert libc.laid[3:] == [4096] * 5
    monkeypatch.undo()
    space.close()


@linux
@pytest.mark.parametrize("most", range(4))
@pytest.mark.parametrize("undone", [True, False])
def test_pages_are_laid_all_or_none(monkeypatch, most, undone):
    space = CpuPages(4096, 8, 16)
    space.create(0, 8)
    space.map(0, range(8))
    space.tensor[: 8 * 4096].fill_(3)
    apart, libc = space._apart, Refusing(most)
    monkeypatch.setattr(pages_cpu, "_libc", lambda: libc)
    monkeypatch.setattr(pages_cpu, "_last_error", lambda: OSError(errno.ENOMEM, "Cannot allocate memory"))
    plain = space._put

    def put(place, count, access, *more):
        if undone and access == pages_cpu._PROT_NONE:
            libc._most = 99
        plain(place, count, access, *more)

    monkeypatch.setattr(space, "_put", put)
    with pytest.raises(MemoryError, match=r"vm\.max_map_count"):
        space.map(9, [4, 5, 1, 7, 3])
    monkeypatch.undo()
    assert (space.mappings, space._apart) == (8, apart)
    if undone:
        assert abs(kept(space) - apart) <= 1
    space.map(9, [4, 5, 1, 7, 3])
    assert abs(kept(space) - space._apart) <= 1
    assert space.tensor[9 * 4096 : 14 * 4096].unique().tolist() == [3]
    space.close()


def kept(space):
    """How many mappings the system keeps for the space."""
    first, end = space.tensor.data_ptr(), space.tensor.data_ptr() + space.tensor.nbytes
    lines = Path("/proc/self/maps").read_text().splitlines()
    begins = [int(line.split("-")[0], 16) for line in lines]
    return sum(first <= one < end for one in begins)


@linux
def test_the_systems_mappings_are_counted():
    space = CpuPages(4096, 8, 64)
    space.create(0, 8)
    rnd = random.Random(3)
    for _ in range(400):
        place, page, count = rnd.randrange(1, 60), rnd.randrange(8), rnd.randrange(1, 4)
        pages = range(page, page + count) if rnd.random() < 0.5 else rnd.choices(range(8), k=count)
        with suppress(ValueError):
            if rnd.random() < 0.6:
                space.map(place, pages, replace=rnd.random() < 0.3)
            else:
                space.unmap(place, count, bare_ok=rnd.random() < 0.5)
        assert (
            abs(space._apart - kept(space)) <= 1
        )  # a bare end of the range may be one with what lies beside it
    assert space._apart > 30
    space.close()
    assert space._apart == 1


@linux
def test_more_places_than_the_system_keeps_apart(monkeypatch):
    monkeypatch.setattr(pages_cpu, "_mappings_of_a_process", lambda: 16)
    space = CpuPages(4096, 16, 64)
    space.create(0, 16)
    space.map(0, range(16))
    for place in range(16, 25):
        space.map(place, [31 - place])
    assert space._apart == 12
    told = r"no more KV pages can be mapped, there are 12 for .*: the setting vm\.max_map_count limits them"
    with pytest.raises(MemoryError, match=told):
        space.map(25, [0])
    assert space.page_at(25) is None
    space.map(25, range(8, 10))  # goes on where the last one ends, so it is none more
    space.unmap(8)
    space.unmap(20, 3)
    with pytest.raises(MemoryError, match=r"vm\.max_map_count"):
        space.map(40, [0])
    space.map(8, [8])
    space.map(20, [3])
    space.close()


@linux
def test_a_system_that_does_not_map(monkeypatch):
    space = CpuPages(4096, 2, 4)
    space.create(0, 2)
    space.map(3, [0])
    monkeypatch.setattr(pages_cpu, "_libc", lambda: SimpleNamespace(mmap=lambda *a: pages_cpu._FAILED))
    monkeypatch.setattr(pages_cpu, "_last_error", lambda: OSError(errno.ENOMEM, "Cannot allocate memory"))
    for call in (lambda: space.map(0, [0]), lambda: space.unmap(3)):
        with pytest.raises(MemoryError, match=r"Cannot allocate memory: the setting vm\.max_map_count"):
            call()
    assert (space.mappings, space.page_at(0), space.page_at(3)) == (1, None, 0)
    monkeypatch.undo()
    space.close()


@linux
def test_the_limit_that_the_system_has(monkeypatch, tmp_path):
    """Thousands of places apart, and the process is well."""
    limit = pages_cpu._mappings_of_a_process()
    assert limit > 1000
    if limit < 200_000:
        space = CpuPages(4096, 16, limit)
        space.create(0, 16)
        with suppress(MemoryError):
            for place in range(limit):
                space.map(place, [place * 7 % 16])
        assert 0 <= 0.75 * limit - space.mappings < 4
        space.unmap(100)
        space.close()
    monkeypatch.setattr(pages_cpu, "_SETTING", tmp_path / "none")
    assert pages_cpu._mappings_of_a_process() == 65530


@linux
def test_other_errors_of_the_system_are_raised_as_they_are(monkeypatch):
    space = CpuPages(4096, 2, 4)
    space.create(0, 2)
    libc = SimpleNamespace(mmap=lambda *a: pages_cpu._FAILED, fallocate=lambda *a: -1)
    monkeypatch.setattr(pages_cpu, "_libc", lambda: libc)
    monkeypatch.setattr(pages_cpu, "_last_error", lambda: OSError(errno.EPERM, "not here"))
    with pytest.raises(PermissionError, match="not here"):
        space.map(0, [0])
    with pytest.raises(PermissionError, match="not here"):
        space.destroy(0, 1)
    assert (space.created, space.mappings) == (2 * 4096, 0)
    monkeypatch.undo()
    space.close()


@linux
def test_host_memory_lives_as_long_as_a_view():
    space = CpuPages(4096, 1, 3)
    space.create(0, 1)
    space.map(2, [0])
    view = space.tensor[2 * 4096 + 5 : 2 * 4096 + 10]
    del space
    view.fill_(2)
    assert view.sum() == 10


def test_elsewhere_than_on_linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="needs Linux"):
        CpuPages(4096, 1, 1)
