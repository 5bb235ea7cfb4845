"""A cluster of real processes: etcd, instances, routers, each of which can be killed, stopped and started again."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import psutil

from tests.processes import freeze
from tests.server.command import Command, command, url_of
from xllm.cluster.etcd_child import EtcdChild

CLI = ("-m", "xllm.cli")
EAGER = ("-m", "tests.faults.eager_router")  # for KV from elsewhere
NAME = "faults"
NOTICED_S = 3.0  # that an instance does not answer
VOCABULARY = 4096  # of the demo model
REAL = (
    "--port", "0", "--dtype", "float32", "--threads", "1", "--max-num-seqs", "16", "--kv-cache-memory-bytes",
    str(48 << 20), "--log-level", "warning",
)  # fmt: skip
MODELLED = ("--model", "demo", "--vocab-size", str(VOCABULARY), "--max-model-len", "2048", "--token-us", "0")


def until(condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> float:
    """Waits until it holds; how many seconds that took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < timeout_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - begin


class Router:
    def __init__(self, running: Command):
        self.running = running
        self.url = running.wait_for(r"Ready: (http://\S+)/v1", 60)[1]  # also behind a process's name
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def told(self) -> dict[str, Any]:
        return self.http.get("/v1/instances").json()

    def instances(self) -> dict[str, dict[str, Any]]:
        """By id; of one that leaves and its successor the latter."""
        return {one["id"]: one for one in self.told()["data"]}

    def serving(self) -> set[str]:
        return {id for id, one in self.instances().items() if one["state"] == "serving"}

    def until_serving(self, *ids: str, timeout_s: float = 20.0) -> float:
        return until(lambda: self.serving() == set(ids), f"{ids} serve, and nobody else", timeout_s)

    def until_restarted(self, id: str, epoch: int, timeout_s: float = 40.0) -> None:
        """Another incarnation than that of `epoch` is there."""
        until(lambda: self.instances().get(id, {"epoch": 0})["epoch"] > epoch, f"{id} is back", timeout_s)

    def complete(self, **body: Any) -> httpx.Response:
        ask = {"model": "demo", "temperature": 0, "ignore_eos": True, "return_token_ids": True, **body}
        return self.http.post("/v1/completions", json=ask)


class Cluster:
    def __init__(self, stack: ExitStack):
        self.etcd = stack.enter_context(EtcdChild())
        self._stack = stack
        self.instances: dict[str, Command] = {}
        self._again: dict[str, Callable[[], Command]] = {}

    def modelled(self, *ids: str, base_ms: float = 5.0, flags: tuple[str, ...] = ()) -> None:
        """Instances without a model: what they answer to whatever prompt is known (`answer`)."""
        for id in ids:
            self._start(
                id, "-m", "xllm.engine.modelled", "--id", id, *MODELLED, "--base-ms", str(base_ms), *flags
            )
        for id in ids:
            self.instances[id].wait_for(r'^\{"id"')

    def real(
        self, *ids: str, flags: tuple[str, ...] = (), roles: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """Instances with the demo model; the URLs of their own HTTP servers."""
        for id in ids:
            role = (roles or {}).get(id, "both")
            self._start(id, *CLI, "serve", "demo", "--instance-id", id, "--role", role, *REAL, *flags)
        return {id: url_of(self.instances[id]) for id in ids}

    def router(self, *flags: str, cli: tuple[str, ...] = CLI) -> Router:
        running = self._command(*cli, "router", "demo", "--port", "0", "--log-level", "warning", *flags)
        router = Router(running)
        self._stack.callback(router.http.close)
        return router

    def _start(self, id: str, *arguments: str) -> None:
        self._again[id] = lambda: self._command(*arguments)
        self.instances[id] = self._again[id]()

    def _command(self, *arguments: str) -> Command:
        running = self._stack.enter_context(
            command(*arguments, "--etcd", self.etcd.url, "--cluster", NAME, env={"XLLM_CLUSTER_TOKEN": "t"})
        )
        self._stack.callback(go_on, running)  # before it is asked to end
        return running

    def restart(self, id: str) -> None:
        """It has ended; as it was started."""
        self.instances[id] = self._again[id]()


@contextmanager
def cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(stack)


def kill(running: Command) -> None:
    """-9, with all that it has started."""
    os.killpg(running.process.pid, signal.SIGKILL)
    running.process.wait()


def stop_the_world(running: Command) -> None:
    for process in [psutil.Process(running.process.pid), *running.children()]:
        freeze(process.pid)


def go_on(running: Command) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.process.pid, signal.SIGCONT)
