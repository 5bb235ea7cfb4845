"""The network between a router and an instance is cut, or swallows what is sent: noticed, and forgotten once it is whole."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import msgspec
import pytest

from tests.cluster.real import Cable, Counter
from tests.faults.load import Load, modelled_questions
from tests.faults.rig import MODELLED, NAME, NOTICED_S, Cluster, Router, cluster, until
from tests.server.command import Command, command
from xllm.cluster.etcd import Etcd
from xllm.cluster.instance import InstanceInfo, Keys
from xllm.cluster.registration import Registration

pytestmark = pytest.mark.timeout(120)


class Swamp(Cable):
    """A cable that can also take what comes and deliver none of it, for good, though nobody hangs up."""

    def __init__(self, port: int):
        super().__init__(port)
        self.swallows = False

    async def __aenter__(self) -> "Swamp":
        await super().__aenter__()
        return self

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._whole:
            writer.transport.abort()
            return
        with contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
            self._open |= {writer, far_writer}
            await asyncio.gather(self._through(reader, far_writer), self._through(far_reader, writer))
            self._open -= {writer, far_writer}

    async def _through(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                if not self.swallows:
                    sink.write(data)
                    await sink.drain()
        sink.close()


class Parted:
    """Two instances, of which the router reaches the second by a cable only."""

    def __init__(self, made: Cluster, router: Router, cable: Swamp):
        self.made, self.router, self.cable = made, router, cable


@pytest.fixture
async def parted() -> AsyncIterator[Parted]:
    with cluster() as made, unregistered("far") as far:
        await asyncio.to_thread(made.modelled, "near")
        line = await asyncio.to_thread(far.wait_for, r'^\{"id".*')
        info = msgspec.convert(json.loads(line[0]), InstanceInfo)
        async with Swamp(int(info.address.rpartition(":")[2])) as cable:
            address = cable.url.replace("http", "tcp")
            etcd = Etcd(made.etcd.url)
            entry = Registration(etcd, Keys(NAME), msgspec.structs.replace(info, address=address), Counter())
            await entry.start()
            router = await asyncio.to_thread(made.router)
            await asyncio.to_thread(router.until_serving, "near", "far")
            yield Parted(made, router, cable)
            await entry.close()
            await etcd.aclose()


def unregistered(id: str) -> contextlib.AbstractContextManager[Command]:
    return command(
        "-m", "xllm.engine.modelled", "--id", id, *MODELLED, "--base-ms", "5", env={"XLLM_CLUSTER_TOKEN": "t"}
    )


@pytest.mark.parametrize("how", ["cut", "swallows"])
async def test_parted(parted, how):
    cable, router = parted.cable, parted.router

    def at_load() -> None:
        with Load(router.url, modelled_questions()) as load:
            load.until_answered(8)
            until(lambda: router.instances()["far"]["requests"], "some run there")
            part()
            assert until(lambda: router.serving() == {"near"}, "it is noticed") < NOTICED_S
            load.until_answered(12)
            heal()
            router.until_serving("near", "far")
            before = router.told()["counts"]["by_instance"]["far"]
            load.until_answered(8)
            until(lambda: router.told()["counts"]["by_instance"]["far"] > before, "it gets requests again")
        load.check(4)
        assert load.seen.longest_pause_s < NOTICED_S + 1

    loop = asyncio.get_running_loop()

    def part() -> None:
        if how == "cut":
            loop.call_soon_threadsafe(cable.cut)
        else:
            cable.swallows = True

    def heal() -> None:
        cable.mend()
        cable.swallows = False

    await asyncio.to_thread(at_load)


@pytest.mark.slow
async def test_swallowed_for_longer_than_a_connection_takes(parted):
    """New connections are made meanwhile, and what they begin with is lost too."""
    cable, router = parted.cable, parted.router

    def at_load() -> float:
        with Load(router.url, modelled_questions()) as load:
            load.until_answered(4)
            cable.swallows = True
            until(lambda: router.serving() == {"near"}, "it is noticed")
            load.until_answered(60)
            cable.swallows = False
            took_s = router.until_serving("near", "far", timeout_s=15)
        load.check(4)
        return took_s

    assert await asyncio.to_thread(at_load) < 10
