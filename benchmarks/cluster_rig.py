"""A cluster of real processes on this machine, for measurements: etcd, instances, a router, pinned to cores where asked.

Everything ends with the `with` block, and with the process that owns it.
"""

import json
import os
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from xllm.cluster.etcd_child import EtcdChild
from xllm.cluster.lifeline import Held

READY_S = 120.0
LOOK_S = 0.05
XLLM = [sys.executable, "-m", "xllm.cli"]
MODELLED = [sys.executable, "-m", "xllm.engine.modelled"]
QUIET = ["--disable-log-requests", "--disable-log-stats"]


class Rig:
    """`SystemExit` with a process's last words where it does not come up."""

    def __enter__(self) -> Self:
        self._scratch = tempfile.TemporaryDirectory(prefix="xllm-rig-")
        self.directory = Path(self._scratch.name)
        self._held: dict[str, Held] = {}
        self.etcd = EtcdChild()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._held):
            self.end(name)
        self.etcd.close()
        self._scratch.cleanup()

    def start(self, name: str, argv: list[str], cores: Collection[int] | None = None) -> psutil.Process:
        with (self.directory / f"{name}.log").open("wb") as out:
            held = self._held[name] = Held(argv, out=out)
        if cores is not None:  # threads begin where the one that starts them is
            os.sched_setaffinity(held.pid, cores)
        return psutil.Process(held.pid)

    def end(self, name: str) -> None:
        held = self._held.pop(name)
        held.terminate()
        with suppress(Exception):
            held.wait(15)
        held.kill()

    def instance(
        self,
        name: str,
        model: str,
        *flags: str,
        cluster: str = "default",
        cores: Collection[int] | None = None,
    ) -> tuple[str, psutil.Process]:
        """`xllm serve` -> its own URL."""
        port = free_port()
        argv = [*XLLM, "serve", model, "--port", str(port), "--etcd", self.etcd.url, "--cluster", cluster,
                "--instance-id", name, *QUIET, *flags]  # fmt: skip
        return f"http://127.0.0.1:{port}", self.start(name, argv, cores)

    def modelled(
        self,
        name: str,
        instances: int,
        *flags: str,
        cluster: str = "default",
        cores: Collection[int] | None = None,
    ) -> psutil.Process:
        argv = [*MODELLED, "--etcd", self.etcd.url, "--cluster", cluster, "--id", name,
                "--instances", str(instances), "--shutdown-timeout", "1", *flags]  # fmt: skip
        return self.start(name, argv, cores)

    def router(
        self,
        name: str,
        model: str,
        *flags: str,
        cluster: str = "default",
        cores: Collection[int] | None = None,
    ) -> tuple[str, psutil.Process]:
        port = free_port()
        argv = [*XLLM, "router", model, "--port", str(port), "--etcd", self.etcd.url, "--cluster", cluster,
                "--shutdown-timeout", "1", *QUIET, *flags]  # fmt: skip
        return f"http://127.0.0.1:{port}", self.start(name, argv, cores)

    def until(self, what: Callable[[], bool], name: str) -> None:
        """Waits for `what`, as long as the process lives."""
        end = time.monotonic() + READY_S
        while not what():
            if not self._held[name].alive or time.monotonic() > end:
                raise SystemExit(f"{name} did not come up:\n{self.words(name)}")
            time.sleep(LOOK_S)

    def words(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text(errors="replace")[-3000:]


def healthy(url: str) -> bool:
    with suppress(OSError):
        return bool(urllib.request.urlopen(f"{url}/ready", timeout=5).status == 200)
    return False


def serving(url: str, number: int) -> bool:
    """Whether the router there has so many instances that serve."""
    with suppress(OSError):
        return sum(one["state"] == "serving" for one in ask(url, "/v1/instances")["data"]) == number
    return False


def ask(url: str, path: str) -> Any:
    return json.loads(urllib.request.urlopen(f"{url}{path}", timeout=10).read())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def tree() -> list[psutil.Process]:
    """This process and all that it has started."""
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def cpu_s(processes: list[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        with suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


class Foreign:
    """`share`: processor seconds per second that others than this process and its children used."""

    def __enter__(self) -> Self:
        self._begin, self._busy, self._own = time.perf_counter(), _busy(), cpu_s(tree())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._begin
        self.share = max(0.0, _busy() - self._busy - (cpu_s(tree()) - self._own)) / self.seconds


def _busy() -> float:
    everyone = psutil.cpu_times()
    return float(everyone.user + everyone.nice + everyone.system + getattr(everyone, "steal", 0.0))
