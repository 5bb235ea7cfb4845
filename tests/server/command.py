"""A command of ours in a process of its own, read line by line."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


class Command:
    def __init__(self, *arguments: str, env: dict[str, str] | None = None):
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            start_new_session=True,  # a group of its own, which a Ctrl-C can be sent to
        )
        self.lines: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def wait_for(self, pattern: str, timeout_s: float = 30.0) -> re.Match[str]:
        """The first line from here on that matches."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self._queue.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no line {pattern!r} within {timeout_s} s; got {self.text}") from None
            assert line is not None, f"the command ended without a line {pattern!r}; got {self.text}"
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found

    def end(self, timeout_s: float = 20.0) -> int:
        """Its exit code, once it has ended."""
        code = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        while (line := self._queue.get(timeout=timeout_s)) is not None:
            self.lines.append(line)
        return code

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def ctrl_c(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)  # as a terminal does it: to every process of the group

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@contextmanager
def command(*arguments: str, env: dict[str, str] | None = None) -> Iterator[Command]:
    running = Command(*arguments, env=env)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.terminate()
            try:
                running.process.wait(15)
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
        running._reader.join(10)
        assert running.process.stdout is not None
        running.process.stdout.close()


def url_of(running: Command, timeout_s: float = 60.0) -> str:
    """Waits until `xllm serve` says that it is ready."""
    return running.wait_for(r"^Ready: (http://\S+)/v1", timeout_s)[1]
