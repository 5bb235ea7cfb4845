"""What comes back from disk is what went there or nothing, whatever happens to the file, the disk or the process."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from xllm.core.errors import ConfigError
from xllm.executor import disk_tier
from xllm.executor.disk_tier import PAGE, DiskTier
from xllm.executor.host_tier import checksum

SLOTS, BLOCK = 4, 5000
ROOT = Path(__file__).parents[2]


def name_of(n):
    return n.to_bytes(16, "big")


def block_of(n, size=BLOCK):
    return np.random.default_rng(n).integers(0, 256, size, dtype=np.uint8)


def open_tier(directory, *, slots=SLOTS, block=BLOCK, fingerprint=b"model"):
    return DiskTier(directory / "kv.bin", slots, block, fingerprint)


def write(tier, slot, n):
    data = block_of(n, tier.block_bytes)
    return tier.write(slot, name_of(n), data, checksum(name_of(n), data))


def read(tier, slot, n):
    """Whether block n is read from the slot; if so it is the right one."""
    into = np.zeros(tier.block_bytes, dtype=np.uint8)
    known = tier.read(slot, name_of(n), into)
    if known is None:
        return False
    assert into.tobytes() == block_of(n, tier.block_bytes).tobytes()
    assert known == checksum(name_of(n), into)
    return True


@pytest.fixture
def tier(tmp_path):
    tier = open_tier(tmp_path)
    yield tier
    tier.close()


def test_what_was_written_is_read(tier):
    assert write(tier, 2, 7)
    assert write(tier, 0, 8)
    assert read(tier, 2, 7)
    assert read(tier, 0, 8)
    assert not read(tier, 2, 8), "another name"
    assert not read(tier, 1, 7), "never written"
    assert not read(tier, 3, 7), "behind the end"
    assert write(tier, 2, 9)
    assert read(tier, 2, 9)
    assert not read(tier, 2, 7)


def test_a_block_that_changed_on_its_way_is_not_read(tier):
    data = block_of(1)
    known = checksum(name_of(1), data)
    data[4000] ^= 1
    assert tier.write(0, name_of(1), data, known)
    assert not read(tier, 0, 1)


def test_a_voided_slot_holds_nothing(tmp_path, tier):
    write(tier, 0, 1)
    write(tier, 1, 2)
    assert tier.invalidate(0)
    assert tier.invalidate(3), "behind the end there is nothing to void"
    assert not read(tier, 0, 1)
    tier.close()
    again = open_tier(tmp_path)
    assert again.recover() == [(1, name_of(2))]
    again.close()


def test_the_next_run_finds_what_this_one_left_in_the_order_it_was_written(tmp_path, tier):
    for slot, n in ((3, 30), (0, 31), (2, 32), (0, 33)):
        write(tier, slot, n)
    tier.close()
    again = open_tier(tmp_path)
    assert again.recover() == [(3, name_of(30)), (2, name_of(32)), (0, name_of(33))]
    assert all(read(again, slot, n) for slot, n in ((3, 30), (2, 32), (0, 33)))
    write(again, 3, 34)
    again.close()
    third = open_tier(tmp_path)
    assert third.recover() == [(2, name_of(32)), (0, name_of(33)), (3, name_of(34))]
    third.close()


def test_a_name_in_two_slots_is_told_once(tmp_path, tier):
    for slot in (1, 3, 0):
        write(tier, slot, 5)
    tier.close()
    again = open_tier(tmp_path)
    assert again.recover() == [(0, name_of(5))]
    again.close()


@pytest.mark.parametrize(
    "other", [{"fingerprint": b"another model"}, {"block": BLOCK + 1}, {"block": 2 * BLOCK}], ids=str
)
def test_a_file_of_something_else_is_begun_anew(tmp_path, tier, caplog, other):
    write(tier, 0, 1)
    tier.close()
    changed = open_tier(tmp_path, **other)
    assert changed.recover() == []
    assert not read(changed, 0, 1)
    assert "begun anew" in caplog.text
    assert write(changed, 0, 2)
    assert read(changed, 0, 2)
    changed.close()


def test_a_new_file_is_nothing_to_speak_of(tier, caplog):
    assert tier.recover() == []
    assert not caplog.records


def test_a_version_of_its_own(tmp_path, tier, monkeypatch):
    write(tier, 0, 1)
    tier.close()
    monkeypatch.setattr(disk_tier, "VERSION", disk_tier.VERSION + 1)
    changed = open_tier(tmp_path)
    assert changed.recover() == []
    changed.close()


def test_more_and_fewer_slots(tmp_path, tier):
    for slot in range(SLOTS):
        write(tier, slot, slot)
    tier.close()
    fewer = open_tier(tmp_path, slots=2)
    assert fewer.recover() == [(0, name_of(0)), (1, name_of(1))]
    assert fewer.path.stat().st_size == PAGE + 2 * (PAGE + 2 * PAGE), "what is too much is given back"
    fewer.close()
    more = open_tier(tmp_path, slots=9)
    assert more.recover() == [(0, name_of(0)), (1, name_of(1))]
    assert write(more, 8, 80)
    assert read(more, 8, 80)
    more.close()


def test_one_file_for_two_engines_is_refused(tmp_path, tier):
    write(tier, 0, 1)
    with pytest.raises(ConfigError, match="in use by another engine"):
        open_tier(tmp_path, fingerprint=b"another model")
    assert read(tier, 0, 1), "who was refused has left it alone"
    tier.close()
    open_tier(tmp_path).close()


def test_a_place_that_cannot_be_had(tmp_path):
    (tmp_path / "kv.bin").mkdir()
    with pytest.raises(ConfigError, match="cannot be kept in"):
        open_tier(tmp_path)


def test_others_may_not_read_it(tier):
    assert tier.path.stat().st_mode & 0o077 == 0


# damage


def test_no_flipped_bit_makes_a_wrong_block(tmp_path, tier):
    """One in every byte that means something, and here and there in what fills up pages."""
    for slot in range(2):
        write(tier, slot, slot)
    tier.close()
    path = tmp_path / "kv.bin"
    whole = path.read_bytes()
    stride = 3 * PAGE
    header, data = range(80), range(PAGE, PAGE + BLOCK)
    places = {*range(60), *range(0, len(whole), 1997)}
    places |= {PAGE + slot * stride + i for slot in range(2) for i in (*header, *data[::97], *data[-9:])}
    lost = 0
    for place in sorted(places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        again = open_tier(tmp_path)
        found = dict(again.recover())
        assert found.items() <= {0: name_of(0), 1: name_of(1)}.items()
        lost += 2 - sum(read(again, slot, int.from_bytes(name, "big")) for slot, name in found.items())
        again.close()
    assert lost > 250


def test_damage_while_it_is_open(tier):
    write(tier, 1, 1)
    with open(tier.path, "r+b") as file:
        file.seek(PAGE + 3 * PAGE + PAGE + 4321)
        file.write(bytes([block_of(1)[4321] ^ 16]))
    assert not read(tier, 1, 1)
    assert write(tier, 1, 1)
    assert read(tier, 1, 1)


def test_no_truncation_makes_a_wrong_block(tmp_path, tier):
    for slot in range(3):
        write(tier, slot, slot)
    tier.close()
    path = tmp_path / "kv.bin"
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 1021), *range(0, len(whole), PAGE), 1, PAGE - 1, len(whole) - 1]:
        path.write_bytes(whole[:size])
        again = open_tier(tmp_path)
        for slot, name in again.recover():
            assert name == name_of(slot)
            assert read(again, slot, slot) == (size >= PAGE + slot * 3 * PAGE + PAGE + BLOCK)
        assert write(again, 1, 11)
        assert read(again, 1, 11)
        again.close()


# a disk that fails


def failing(monkeypatch, call, after, error):
    """Lets so many bytes through, then fails."""
    real, left = getattr(os, call), [after]

    def fake(fd, buffer, offset):
        if left[0] <= 0:
            raise OSError(error, os.strerror(error))
        part = memoryview(buffer)[: left[0]]
        left[0] -= len(part)
        return real(fd, part, offset)

    monkeypatch.setattr(os, call, fake)


@pytest.mark.parametrize("after", [0, 100, PAGE, PAGE + 1, PAGE + 4999, PAGE + BLOCK, PAGE + BLOCK + 70])
def test_a_full_disk(tmp_path, tier, monkeypatch, caplog, after):
    write(tier, 0, 1)
    write(tier, 1, 2)
    with monkeypatch.context() as patch:
        failing(patch, "pwrite", after, errno.ENOSPC)
        assert not write(tier, 1, 3)
        assert not write(tier, 2, 4)
        assert not read(tier, 1, 3)
        assert not read(tier, 2, 4)
        assert read(tier, 0, 1)
    assert caplog.text.count("No space left") == 2, "not written, and not even voided; each said once"
    tier.close()
    again = open_tier(tmp_path)
    for slot, name in again.recover():
        n = int.from_bytes(name, "big")
        assert (slot, n) in {(0, 1), (1, 2)}
        assert read(again, slot, n) or (slot, n) == (1, 2)
    assert write(again, 1, 5), "once there is room again"
    assert read(again, 1, 5)
    again.close()


def test_writes_that_arrive_in_pieces(tier, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, memoryview(data)[:777], at))
    assert write(tier, 1, 1)
    assert read(tier, 1, 1)


@pytest.mark.parametrize("call", ["pread", "preadv"])
def test_a_read_error(tier, monkeypatch, caplog, call):
    write(tier, 0, 1)

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        assert not read(tier, 0, 1)
        assert not read(tier, 0, 1)
        if call == "pread":
            assert tier.recover() == []
    assert caplog.text.count("Input/output error") == 1
    assert read(tier, 0, 1)


# a process that is killed

DIES = """
import os, signal, sys
from pathlib import Path
from tests.executor.test_disk_tier import open_tier, write

directory, fatal, through = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
tier = open_tier(directory)
for slot in range(3):
    write(tier, slot, slot)
calls, real = [0], os.pwrite

def pwrite(fd, data, at):
    calls[0] += 1
    if calls[0] == fatal:
        real(fd, memoryview(data)[: int(len(data) * through)], at)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(fd, data, at)

os.pwrite = pwrite
write(tier, 1, 11)
"""

RUNS_ON = """
import sys
from pathlib import Path
from tests.executor.test_disk_tier import open_tier, write

tier = open_tier(Path(sys.argv[1]), block=1 << 20)
for n in range(1_000_000):
    write(tier, n % 4, n)
    if n == 20:
        print("running", flush=True)
"""


def child(code, *args):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_killed_in_the_middle_of_a_write(tmp_path):
    """At each of the three writes of a record, with nothing, a part or all of it on the disk."""
    points = [(1, 0.0), (1, 0.01), (2, 0.0), (2, 0.6), (3, 0.0), (3, 0.01), (3, 0.6), (3, 1.0)]
    directories = [tmp_path / f"{fatal}-{through}" for fatal, through in points]
    for first in range(0, len(points), 4):
        batch = list(zip(points, directories, strict=True))[first : first + 4]
        for process in [child(DIES, directory, *point) for point, directory in batch]:
            process.communicate(timeout=60)
            assert process.returncode == -signal.SIGKILL
    for (fatal, through), directory in zip(points, directories, strict=True):
        tier = open_tier(directory)
        found = dict(tier.recover())
        assert {0: name_of(0), 2: name_of(2)}.items() <= found.items(), "the others are untouched"
        assert read(tier, 0, 0)
        assert read(tier, 2, 2)
        if fatal == 1 and through == 0.0:
            assert read(tier, 1, 1), "nothing of it had been touched"
        else:
            assert read(tier, 1, 11) == (found.get(1) == name_of(11)) == (fatal == 3 and through > 0.5)
            assert (1 in found) == (fatal == 3 and through > 0.5)
        tier.close()


def test_killed_at_any_moment(tmp_path):
    process = child(RUNS_ON, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.kill()
    process.communicate(timeout=60)
    tier = open_tier(tmp_path, block=1 << 20)
    found = tier.recover()
    assert len(found) >= 3, "one at most was being written"
    assert all(read(tier, slot, int.from_bytes(name, "big")) for slot, name in found)
    tier.close()
