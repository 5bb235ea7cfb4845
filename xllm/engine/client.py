"""Two ways to an engine core behind one face: in the caller's own process, or in a process of its own."""

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, cast

import msgspec
import zmq

from xllm.config.decided import EngineConfig
from xllm.core.errors import EngineFault, Unavailable
from xllm.engine.build import build_core
from xllm.engine.process import Launch
from xllm.wire.channel import MemoryChannel, ZmqChannel
from xllm.wire.dial import Dial, State
from xllm.wire.doors import Listening
from xllm.wire.messages import (
    Fault,
    Heartbeat,
    Loading,
    Message,
    Ready,
    Shutdown,
    ToEngine,
    WireError,
)

OnLoading = Callable[[Loading], None]
SHUTDOWN_WAIT_S = 5.0
CONNECT_WAIT_S = 5.0
LOST_WAIT_S = 2.0  # from the end of the connection to that of the process


class EngineClient(Protocol):
    """`send` belongs to one thread, `receive` to one thread."""

    startup_s: dict[str, float]  # start-up time of the engine by part

    @property
    def config(self) -> EngineConfig:
        """As the engine completed it."""
        ...

    def send(self, message: Message) -> None: ...

    def receive(self, timeout_s: float) -> Message | None: ...

    def pulse(self) -> tuple[Heartbeat, float]:
        """The last sign of life and the seconds since then. Any thread may ask."""
        ...

    def dead(self) -> str | None:
        """Why the engine is gone, or None while it is there. Any thread may ask."""
        ...

    def missing(self) -> str | None:
        """Why no request can be taken at present though nothing is wrong here. Any thread may ask."""
        ...

    def dump_stacks(self) -> None:
        """Ask a hanging engine to write the stacks of its threads to stderr."""
        ...

    def close(self) -> None: ...


class InlineClient:
    """The core runs inside `receive`, in the caller's thread: nothing is copied and nothing is awaited."""

    def __init__(self, config: EngineConfig, on_loading: OnLoading | None = None):
        self._channel, inbox = MemoryChannel.pair()
        self.startup_s: dict[str, float] = {}
        report = on_loading or (lambda _: None)
        self._core, self.config = build_core(config, inbox, report, self.startup_s)

    def send(self, message: Message) -> None:
        self._channel.send(message)

    def receive(self, timeout_s: float) -> Message | None:
        message = self._channel.receive(0.0)
        if message is None:
            self._core.turn(wait_s=timeout_s)
            message = self._channel.receive(0.0)
        return message

    def pulse(self) -> tuple[Heartbeat, float]:
        core = self._core
        return Heartbeat(progress=core.progress, busy=core.busy, stats=core.last_stats), 0.0

    def dead(self) -> str | None:
        return None

    def missing(self) -> str | None:
        return None

    def dump_stacks(self) -> None:
        import faulthandler

        faulthandler.dump_traceback()

    def close(self) -> None:
        self._core.close()


class ProcessClient:
    """The core runs in a child process. The child ends when this process does, however that happens.

    With `listening` others may use the engine as well, at `addresses`.
    """

    def __init__(
        self, config: EngineConfig, on_loading: OnLoading | None = None, *, listening: Listening | None = None
    ):
        self._directory = tempfile.mkdtemp(prefix="xllm-")  # mode 0700: only this user can connect
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        names = ("to", "from") if listening is None else ("hub", "hub")
        to_engine, from_engine = (f"ipc://{Path(self._directory) / name}" for name in names)
        self._channel: ZmqChannel | Dial
        if listening is None:
            self._channel = ZmqChannel(self._context, send_to=to_engine, receive_from=from_engine, bind=True)
        else:  # the pipe and the process tell when it ends: silence alone never does
            self._channel = Dial(to_engine, name="owner", silence_s=math.inf, context=self._context)
        self._last = Heartbeat(progress=0, busy=False)
        self._last_at = time.monotonic()
        self._fault: str | None = None
        self._closed = False
        self.config = config
        self.startup_s: dict[str, float] = {}
        self.addresses: Sequence[str] = ()
        self.kv_transport: str | None = None
        self._process = subprocess.Popen([sys.executable, "-m", "xllm.engine.process"], stdin=subprocess.PIPE)
        try:
            assert self._process.stdin is not None
            launch = Launch(config, receive_from=to_engine, send_to=from_engine, listening=listening)
            self._process.stdin.write(msgspec.json.encode(launch) + b"\n")
            self._process.stdin.flush()  # and kept open: its end is how the child learns that we are gone
            self._await_ready(on_loading or (lambda _: None))
        except BaseException:
            self.close()
            raise

    def _await_ready(self, on_loading: OnLoading) -> None:
        while True:
            message = self.receive(0.1)
            if isinstance(message, Loading):
                on_loading(message)
            elif isinstance(message, Ready):
                self.startup_s = dict(message.seconds)
                self.config = message.config
                self.addresses = message.addresses
                self.kv_transport = message.kv_transport
                channel = self._channel
                if isinstance(channel, ZmqChannel) and not channel.wait_connected(CONNECT_WAIT_S):
                    raise EngineFault("the engine process does not listen to us")
                return
            elif message is None and (reason := self.dead()):
                raise EngineFault(reason)

    def send(self, message: Message) -> None:
        """Raises Unavailable when the engine process is gone."""
        try:
            self._channel.send(cast(ToEngine, message))
        except WireError as e:
            raise Unavailable(f"the engine is gone: {e.message}") from e

    def receive(self, timeout_s: float) -> Message | None:
        message = self._channel.receive(timeout_s)
        if isinstance(message, Heartbeat):
            self._last = message
        elif isinstance(message, Fault):
            self._fault = message.reason
        if message is not None:
            self._last_at = time.monotonic()
        elif isinstance(self._channel, Dial) and self._channel.state is State.LOST:
            self._end(self._channel.reason)
        return message

    def _end(self, reason: str | None) -> None:
        """Nothing comes from the process any more. It is about to end, or it is of no use to anybody."""
        try:
            self._process.wait(LOST_WAIT_S)
        except subprocess.TimeoutExpired:
            self._fault = self._fault or f"the engine process does not speak with us any more: {reason}"
            self._process.kill()
            self._process.wait()

    def pulse(self) -> tuple[Heartbeat, float]:
        return self._last, time.monotonic() - self._last_at

    def dead(self) -> str | None:
        if self._process.poll() is None:
            return None
        return self._fault or f"the engine process ended unexpectedly ({_exit(self._process.returncode)})"

    def missing(self) -> str | None:
        return None

    @property
    def pid(self) -> int:
        return self._process.pid

    def dump_stacks(self) -> None:
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGUSR1)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(Unavailable):
            self.send(Shutdown())
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(SHUTDOWN_WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._channel.close()
        self._context.term()
        shutil.rmtree(self._directory, ignore_errors=True)


def _exit(returncode: int) -> str:
    return f"signal {signal.Signals(-returncode).name}" if returncode < 0 else f"exit code {returncode}"
