"""etcd is killed, wiped, compacted at load: nobody who asks notices, and afterwards the membership is right."""

import asyncio
import time
from collections.abc import Iterator

import pytest

from tests.faults.load import Load, modelled_questions
from tests.faults.rig import NAME, Cluster, Router, cluster, kill, until
from xllm.cluster.etcd import Etcd
from xllm.cluster.instance import Keys

pytestmark = pytest.mark.timeout(180)
SHORT, WHOLE = 4, pytest.param(60, marks=pytest.mark.slow)  # seconds without etcd


@pytest.fixture
def made() -> Iterator[Cluster]:
    with cluster() as one:
        one.modelled("a", "b", "c")
        yield one


@pytest.fixture
def router(made) -> Router:
    router = made.router()
    router.until_serving("a", "b", "c")
    return router


@pytest.mark.parametrize("away_s", [SHORT, WHOLE])
@pytest.mark.parametrize("wiped", [False, True], ids=["kept", "wiped"])
def test_etcd_is_away(made, router, away_s, wiped):
    with Load(router.url, modelled_questions()) as load:
        load.until_answered(8)
        made.etcd.kill()
        kill(made.instances["b"])
        until(lambda: "b" not in router.serving(), "its stream tells")
        back = time.monotonic() + away_s
        while time.monotonic() < back:
            load.until_answered(4, 20)
        assert router.serving() == {"a", "c"}
        if wiped:
            made.etcd.wipe()
        made.etcd.start()
        made.modelled("d")
        router.until_serving("a", "c", "d", timeout_s=10)
        # the same data: the lease of the dead one lives again for as long as it was given for
        until(lambda: router.instances().keys() == {"a", "c", "d"}, "the dead one is gone", 10)
        load.until_answered(8)
    load.check(4)


def test_a_restart_while_etcd_is_away(made, router):
    """It cannot say so in the registry before etcd is back."""
    with Load(router.url, modelled_questions()) as load:
        load.until_answered(4)
        made.etcd.kill()
        kill(made.instances["b"])
        until(lambda: "b" not in router.serving(), "its stream tells")
        made.restart("b")
        load.until_answered(4)
        made.etcd.start()
        router.until_serving("a", "b", "c", timeout_s=10)
        load.until_answered(8)
    load.check(2)


def test_etcd_is_compacted_while_it_is_watched(made, router):
    async def compact() -> None:
        etcd = Etcd(made.etcd.url)
        found = await etcd.list(Keys(NAME).root)
        await etcd.compact(found.revision)
        await etcd.aclose()

    with Load(router.url, modelled_questions()) as load:
        load.until_answered(4)
        for n in range(3):
            asyncio.run(compact())
            made.modelled(f"more{n}")
            router.until_serving("a", "b", "c", *(f"more{i}" for i in range(n + 1)), timeout_s=10)
        made.etcd.stop()
        asyncio.run(asyncio.to_thread(made.etcd.start))
        asyncio.run(compact())
        kill(made.instances["b"])
        until(lambda: "b" not in router.instances(), "it has left", 25)
        load.until_answered(8)
    load.check(4)
