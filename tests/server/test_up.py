"""`xllm up` as a process, with a real etcd and children that pretend: ready, deaths, the orders of ending, nothing left."""

import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Sequence

import psutil

from tests.server.command import Command, command
from xllm.cluster.etcd_child import EtcdChild

UP = ("-m", "tests.server.fake_up", "up")
FLAGS = ("--port", "0", "--device", "cpu")


def everybody(running: Command) -> list[psutil.Process]:
    return [psutil.Process(running.process.pid), *running.children()]


def gone(processes: Sequence[psutil.Process], timeout_s: float = 15.0) -> None:
    """Returns when none of them runs; what nobody has buried does not run."""
    deadline = time.monotonic() + timeout_s
    while left := [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.02)


def named(running: Command, name: str) -> psutil.Process:
    """The child that is called so on its command line."""
    for child in psutil.Process(running.process.pid).children():
        if name in child.cmdline():
            return child
    raise AssertionError(f"no {name} among {[c.cmdline() for c in running.children()]}")


def test_ready_then_ctrl_c_ends_all_in_order(tmp_path):
    logs = tmp_path / "logs"
    with command(
        *UP, "steady", *FLAGS, "--instances", "3", "--log-dir", str(logs), "--api-key", "hidden"
    ) as up:
        up.wait_for(r"for each of 3 instances")
        up.wait_for(r"^Ready: http://127\.0\.0\.1:12345/v1  model=steady  3 instances  \([\d.]+ s\)$", 60)
        up.wait_for(r"^Try:   curl http://127.0.0.1:12345/v1/chat/completions -H .*XLLM_API_KEY")
        there = everybody(up)
        assert not any("hidden" in argument for p in there[1:] for argument in p.cmdline())
        up.ctrl_c()
        assert up.end(30) == 0
        gone(there)
    at = {line: i for i, line in enumerate(up.lines)}
    ended = [
        at[f"{who} | {who.strip()}: ended in order"] for who in ("router    ", "instance-1", "instance-2")
    ]
    assert ended[0] < min(ended[1:]) and up.lines[-1] == "stopped"
    assert "instance-1 | loading 100%" in up.lines and "50%" not in up.text
    assert "loading 100%\n" in (logs / "instance-3.log").read_text() and (logs / "etcd.log").exists()


def test_sigterm_ends_it_as_ctrl_c_does():
    with command(*UP, "steady", *FLAGS, "--instances", "1") as up:
        up.wait_for(r"^Ready: .* 1 instance  ", 60)
        there = everybody(up)
        up.terminate()
        assert up.end(30) == 0
        gone(there)


def test_a_second_ctrl_c_ends_it_at_once():
    with command(*UP, "deaf", *FLAGS, "--instances", "2") as up:
        up.wait_for(r"^Ready: ", 60)
        there = everybody(up)
        up.ctrl_c()
        up.wait_for(r"^stopping; once more to end at once$")
        begin = time.monotonic()
        up.ctrl_c()
        assert up.end(10) == 130 and time.monotonic() - begin < 5
        gone(there)


def test_kill_9_leaves_nobody():
    with command(*UP, "deaf", *FLAGS, "--instances", "2") as up:
        up.wait_for(r"^Ready: ", 60)
        there = everybody(up)
        assert len(there) >= 1 + 1 + 2 * 3 + 3  # up, etcd, and three processes for each of the others
        up.process.kill()
        gone(there)


def test_who_dies_is_started_again():
    with command(*UP, "steady", *FLAGS, "--instances", "2") as up:
        up.wait_for(r"^Ready: ", 60)
        for name in ("instance-2", "router"):
            victim = named(up, name)
            rest = victim.children(recursive=True)
            victim.kill()
            up.wait_for(rf"^{name} +\| \*\* ended unasked: signal SIGKILL")
            up.wait_for(rf"^{name} +\| \*\* is started again in 0\.5 s")
            up.wait_for(rf"^{name} +\| Ready: ")
            gone([victim, *rest])
        etcd = next(c for c in up.children() if c.name() == "etcd")
        etcd.kill()
        up.wait_for(r"^etcd +\| \*\* ended unasked")
        up.wait_for(r"^etcd +\| \*\* is started again")
        there = everybody(up)
        up.ctrl_c()
        assert up.end(30) == 0
        gone(there)


def test_one_that_dies_while_it_starts_delays_readiness(tmp_path):
    with command(*UP, "mortal", *FLAGS, "--instances", "2", env={"XLLM_FAKE_DIR": str(tmp_path)}) as up:
        up.wait_for(r"^Ready: ", 60)
        assert up.text.count("ended unasked: exit code 4") == 2
        up.ctrl_c()
        assert up.end(30) == 0


def test_too_many_deaths_end_it_with_the_last_lines():
    with command(*UP, "doomed", *FLAGS, "--instances", "1") as up:
        etcd = up.wait_for(r"starting with --etcd http://127\.0\.0\.1:(\d+)")
        assert etcd
        there = everybody(up)
        assert up.end(60) == 1
        gone(there)
    assert "xllm: instance-1 has died 5 times within 60 s; its last lines:" in up.text
    assert up.lines[-1] == "  instance-1: the last words"


def test_what_cannot_be_is_not_tried_again():
    with command(*UP, "refused", *FLAGS, "--instances", "1") as up:
        assert up.end(60) == 2
    assert "cannot run:" in up.text and "  xllm: no such thing" in up.lines


def test_without_restart_it_ends_when_nobody_of_a_kind_is_left():
    with command(*UP, "steady", *FLAGS, "--instances", "2", "--no-restart") as up:
        up.wait_for(r"^Ready: ", 60)
        named(up, "instance-1").kill()
        up.wait_for(r"^instance-1 \| \*\* ended unasked")
        named(up, "instance-2").kill()
        assert up.end(30) == 1
    assert "no instance is left, and --no-restart was given" in up.text


def test_a_port_that_is_taken_is_refused_before_anything_starts():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = str(held.getsockname()[1])
        with command(*UP, "steady", "--device", "cpu", "--port", port) as up:
            assert up.end(30) == 1
    assert up.lines == [
        f"xllm: cannot listen on 127.0.0.1 port {port}: Address already in use; choose another with --port"
    ]


def test_on_a_terminal_there_is_a_live_table():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (30, 80))
    argv = [sys.executable, *UP, "steady", *FLAGS]
    up = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, start_new_session=True,
        env={k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(theirs)
    try:
        screen = Screen(ours)
        screen.wait_for(r"Ready: http://127\.0\.0\.1:12345/v1  model=steady  2 instances")
        screen.wait_for(r"instance-2 +both +ready +2 +0 +━+ +0% +0 +0")
        there = psutil.Process(up.pid).children(recursive=True)
        next(p for p in there if "instance-2" in p.cmdline()).kill()
        screen.wait_for(r"instance-2 +(both)? +(gone|starting)")
        screen.wait_for(r"instance-2 +both +ready .* 1 *\r?\n")
        up.send_signal(signal.SIGINT)
        screen.wait_for(r"stopped\r?\n$")
        assert up.wait(30) == 0
        gone(there)
    finally:
        up.kill()
        up.wait()
        os.close(ours)


class Screen:
    """What comes out of a terminal, without its control sequences."""

    def __init__(self, terminal: int):
        self._terminal, self._text = terminal, ""

    def wait_for(self, pattern: str, timeout_s: float = 60.0) -> None:
        """Until what came since the last match matches."""
        deadline = time.monotonic() + timeout_s
        while (found := re.search(pattern, self._text)) is None:
            readable, _, _ = select.select([self._terminal], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, f"no {pattern!r} in {self._text[-3000:]!r}"
            self._text += re.sub(
                r"\x1b\[[0-9;?]*[A-Za-z]", "", os.read(self._terminal, 1 << 16).decode(errors="replace")
            )
        self._text = self._text[found.end() :]


def test_an_etcd_that_is_given_is_left_alone(tmp_path):
    with (
        EtcdChild() as etcd,
        command(*UP, "steady", *FLAGS, "--etcd", etcd.url, "--instance-name", "x") as up,
    ):
        up.wait_for(r"^Ready: .* 2 instances", 60)
        assert not any(c.name() == "etcd" for c in up.children())
        os.kill(up.process.pid, signal.SIGINT)
        assert up.end(30) == 0
        assert etcd.alive and any(line.startswith("x-2") for line in up.lines)
