"""Instances, waiting on conditions, and a cable that can be cut, for tests with a real etcd."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

from xllm.cluster.instance import InstanceInfo, KvFacts, LoadSummary

TTL_S = 2  # seconds; short, and enough for a busy machine


async def until(condition: Callable[[], object], what: str = "", timeout_s: float = 15.0) -> float:
    """Waits until it holds and returns how long that took; AssertionError after `timeout_s`."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < timeout_s, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.02)
    return time.monotonic() - begin


def instance(id: str = "a", epoch: int = 1, **changes: Any) -> InstanceInfo:
    facts: dict[str, Any] = {
        "address": "tcp://127.0.0.1:1", "model": "demo", "kv": KvFacts(16, "float32", 100, "ab" * 16),
        "max_num_seqs": 8, "max_model_len": 512,
    }  # fmt: skip
    return InstanceInfo(id=id, epoch=epoch, **(facts | changes))


class Counter:
    """A load that differs every time it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> LoadSummary:
        self.asked += 1
        return LoadSummary(sequence=self.asked, running=1, kv_usage=0.5, cached_blocks={"GPU": 3})


class Cable:
    """TCP from a free port to `port`. `cut` breaks what is open and refuses what comes, until `mend`."""

    def __init__(self, port: int):
        self.target = port
        self._open: set[asyncio.StreamWriter] = set()
        self._whole = True

    async def __aenter__(self) -> "Cable":
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        await asyncio.sleep(0)

    def cut(self) -> None:
        self._whole = False
        for writer in list(self._open):
            writer.transport.abort()

    def mend(self) -> None:
        self._whole = True

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._whole:
            writer.transport.abort()
            return
        with contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
            self._open |= {writer, far_writer}
            await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
            self._open -= {writer, far_writer}


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()
    sink.close()
