"""What is started ends with its owner, and takes along what it has started itself."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from xllm.cluster.etcd_child import EtcdChild
from xllm.cluster.lifeline import Held

SLEEPS = [sys.executable, "-c", "import time; time.sleep(600)"]
WITH_CHILD = [
    sys.executable,
    "-c",
    "import subprocess, sys, time; c = subprocess.Popen(['sleep', '600']); print(c.pid, flush=True); time.sleep(600)",
]
OWNER = """
import subprocess, sys, time
from xllm.cluster.lifeline import Held
held = Held({argv!r}, out=subprocess.PIPE)
print(held.pid, held.popen.stdout.readline().decode(), flush=True)
time.sleep(600)
"""


def gone(*pids: int, timeout_s: float = 10.0) -> None:
    """Returns when none of them runs; one that nobody has buried does not run either."""
    deadline = time.monotonic() + timeout_s
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still there: {[pid for pid in pids if _runs(pid)]}"
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def group(pid: int) -> list[int]:
    """Who is of the group that `pid` leads."""
    found = []
    for other in psutil.pids():
        try:
            if os.getpgid(other) == pid:
                found.append(other)
        except ProcessLookupError:
            pass
    return found


def test_the_exit_code_is_the_programs_own_and_nothing_stays(tmp_path):
    with (tmp_path / "out").open("wb") as out:
        held = Held([sys.executable, "-c", "import sys; print(sys.stdin.read() == ''); sys.exit(7)"], out=out)
        members = group(held.pid)
        assert held.wait(20) == 7 and not held.alive
    assert (tmp_path / "out").read_text() == "True\n"  # standard input is empty
    gone(held.pid, *members)
    held.kill()  # of no effect any more
    assert held.wait() == 7


def test_the_pipes_keep_neither_outputs_nor_owners_open():
    """The reader of the lifeline holds no output: who reads it sees its end when the program ends."""
    held = Held([sys.executable, "-c", "print('a')"], out=subprocess.PIPE)
    assert held.popen.stdout is not None
    with held.popen.stdout as stdout:
        assert stdout.read() == b"a\n"
    assert held.wait(20) == 0


def test_terminate_asks_the_program_and_kill_ends_its_group():
    held = Held(SLEEPS, out=subprocess.DEVNULL)
    held.terminate()
    assert held.wait(20) == -signal.SIGTERM
    held = Held(WITH_CHILD, out=subprocess.PIPE)
    assert held.popen.stdout is not None
    with held.popen.stdout as stdout:
        grandchild = int(stdout.readline())
        held.kill()
        assert held.wait(20) == -signal.SIGKILL
    gone(held.pid, grandchild)


def test_what_a_dead_program_leaves_is_ended_by_who_waits_for_it():
    held = Held(WITH_CHILD, out=subprocess.PIPE)
    assert held.popen.stdout is not None
    with held.popen.stdout as stdout:
        grandchild = int(stdout.readline())
        os.kill(held.pid, signal.SIGKILL)  # as somebody else might
        held.wait(20)
    gone(grandchild)


def test_an_owner_that_is_killed_takes_all_of_it_along():
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER.format(argv=WITH_CHILD)], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    with owner.stdout as stdout:
        pid, grandchild = map(int, stdout.readline().split())
        members = group(pid)
        assert {pid, grandchild} <= set(members) and len(members) == 3
        owner.kill()
        owner.wait()
        gone(*members)


def test_a_program_that_is_not_there():
    held = Held(["/nowhere/program"], out=subprocess.DEVNULL)
    assert held.wait(20) == 127


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_an_etcd_ends_with_its_owner(how):
    code = (
        "import time; from xllm.cluster.etcd_child import EtcdChild; c = EtcdChild(); print(c.pid, flush=True);"
        "time.sleep(600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    with owner.stdout as stdout:
        members = group(int(stdout.readline()))
        assert len(members) == 2
        owner.send_signal(how)
        owner.wait()
        gone(*members)


def test_an_etcd_that_was_killed_starts_again():
    with EtcdChild() as child:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while child.alive:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.start()
        assert child.alive
