"""A real `mooncake_master` on this machine, where the package is installed; else tests that want one are skipped."""

import importlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

LONG = 30.0


def needed() -> Path:
    """Where the master's program is."""
    package = pytest.importorskip("mooncake", reason="mooncake-transfer-engine is not installed")
    try:
        importlib.import_module("mooncake.store")
    except ImportError as e:
        pytest.skip(f"mooncake-transfer-engine does not load: {e}")
    return Path(package.__file__).parent / "mooncake_master"


class Master:
    def __init__(self, log: Path):
        self._program = needed()
        self._log = log
        self.port, self._metrics = _free_port(), _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def url(self, **settings: str) -> str:
        query = "&".join(f"{name}={value}" for name, value in settings.items())
        return f"mooncake://127.0.0.1:{self.port}" + (f"?{query}" if query else "")

    def start(self) -> None:
        self._program.chmod(0o755)
        command = [self._program, f"--rpc_port={self.port}", f"--metrics_port={self._metrics}"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*map(str, command), "--metrics_host=127.0.0.1"], stdout=log, stderr=log, env={**os.environ}
            )
        deadline = time.monotonic() + LONG
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1.0).close()
                return
            except OSError:
                assert self._process.poll() is None, self._log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
