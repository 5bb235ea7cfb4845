"""A child process that is kept running: its lines collected, its death noticed, another one started.

One that dies is started again after a pause that grows with every death in `WINDOW_S`; too many of them are the end
(`GaveUp`), and so is one that says that what was asked for cannot be (exit code 2, `ConfigError`).
"""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from xllm.cluster.lifeline import Held
from xllm.core.errors import ConfigError, XllmError
from xllm.server.log_lines import LogLines, Splitter

MOST_DEATHS = 5
WINDOW_S = 60.0
PAUSE_S = 0.5  # after the first death; twice as long after each further one
LONGEST_PAUSE_S = 10.0
LAST_LINES = 15
CANNOT_BE = 2  # what the command line ends with where it refuses; another try would be refused too

READY = re.compile(
    r"^(?:\S+ \| )?Ready: (http://\S+)/v1"
)  # the name of one of several processes may stand before it

State = Literal["starting", "ready", "down", "stopped"]


class GaveUp(XllmError):
    """A child that does not stay alive; the message holds its last lines."""

    type = "child_error"


@dataclass(frozen=True, slots=True)
class Spec:
    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)  # beside our own
    processes: int = 1  # that say so, each for itself, when they are ready


@dataclass(frozen=True, slots=True)
class Patience:
    """How often a child may die, and how long to wait before the next."""

    restart: bool = True
    deaths: int = MOST_DEATHS
    window_s: float = WINDOW_S
    pause_s: float = PAUSE_S

    def pause(self, deaths: int) -> float:
        return float(min(self.pause_s * 2 ** (deaths - 1), LONGEST_PAUSE_S))


class Deaths:
    """Those of the last `window_s`."""

    def __init__(self, patience: Patience):
        self._patience = patience
        self._when: deque[float] = deque()

    def another(self) -> int:
        """Counts one that has just been; how many there are with it."""
        now = time.monotonic()
        self._when.append(now)
        while self._when[0] < now - self._patience.window_s:
            self._when.popleft()
        return len(self._when)


class Child:
    """`run` until `stop` or `kill`. All of it belongs to one event loop. `on_change` is called when `state` has changed."""

    def __init__(
        self,
        spec: Spec,
        lines: LogLines,
        patience: Patience | None = None,
        on_change: Callable[[], None] = lambda: None,
    ):
        self.spec = spec
        self.state: State = "starting"
        self.url: str | None = None  # once it is ready
        self.restarts = 0
        self._lines, self._patience, self._on_change = lines, patience or Patience(), on_change
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._deaths = Deaths(self._patience)
        self._readies = 0
        self._held: Held | None = None
        self._stopping = asyncio.Event()

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pid(self) -> int | None:
        return None if self._held is None else self._held.pid

    async def run(self) -> None:
        """Until it was stopped, or has died and is not to be started again. Raises GaveUp, ConfigError."""
        while not self._stopping.is_set():
            code = await self._once()
            if self._stopping.is_set():
                break
            self._become("down")
            self._say(f"ended unasked: {ending(code)}")
            if not self._patience.restart:
                return
            pause_s = self._pause(code)
            self._say(f"is started again in {pause_s:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s)
                break
            self.restarts += 1
        self._become("stopped")

    def stop(self) -> None:
        """Asks it to end in order; no other one is started."""
        self._stopping.set()
        if self._held is not None and self._held.alive:
            self._held.terminate()

    def kill(self) -> None:
        """At once, with all that it has started."""
        self._stopping.set()
        if self._held is not None:
            self._held.kill()

    async def _once(self) -> int:
        """One life; its exit code. Ends it where this is cancelled."""
        self.url, self._readies = None, 0
        self._become("starting")
        self._held = held = Held(
            self.spec.argv,
            out=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self.spec.env},
        )
        loop = asyncio.get_running_loop()
        reading = asyncio.create_task(self._read(held))
        waiter = ThreadPoolExecutor(1, thread_name_prefix=f"waits-for-{self.name}")
        try:
            code = await loop.run_in_executor(waiter, held.wait)
            await reading
            return code
        finally:
            held.kill()
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            waiter.shutdown()  # what was killed has ended
            self._held = None

    async def _read(self, held: Held) -> None:
        assert held.popen.stdout is not None
        stream = asyncio.StreamReader()
        pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), held.popen.stdout
        )
        splitter = Splitter()
        try:
            while data := await stream.read(1 << 16):
                for line in splitter.feed(data):
                    self._heard(line)
            for line in splitter.end():
                self._heard(line)
        finally:
            pipe.close()

    def _heard(self, line: str) -> None:
        self._last.append(line)
        self._lines.add(self.name, line)
        if found := READY.match(line):
            self.url = found[1]
            self._readies += 1
            if self._readies >= self.spec.processes:
                self._become("ready")

    def _pause(self, code: int) -> float:
        """Seconds until it may start again, if it may."""
        if code == CANNOT_BE:
            raise ConfigError(f"{self.name} cannot run:\n{self._quoted()}")
        deaths = self._deaths.another()
        if deaths >= self._patience.deaths:
            raise GaveUp(
                f"{self.name} has died {deaths} times within {self._patience.window_s:g} s; "
                f"its last lines:\n{self._quoted()}"
            )
        return self._patience.pause(deaths)

    def _quoted(self) -> str:
        return "\n".join(f"  {line}" for line in self._last) or "  (it said nothing)"

    def _say(self, text: str) -> None:
        self._lines.add(self.name, f"** {text}")

    def _become(self, state: State) -> None:
        if state != self.state:
            self.state = state
            self._on_change()


def ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
