"""A real etcd for the tests of this room, and what they wait with."""

import uuid

import pytest

from xllm.cluster.etcd import Etcd
from xllm.cluster.etcd_child import EtcdChild
from xllm.cluster.instance import Keys


@pytest.fixture(scope="session")
def shared_child():
    """For tests that do nothing to etcd itself; each has a cluster name of its own."""
    with EtcdChild() as child:
        yield child


@pytest.fixture
def child():
    """For tests that kill, stop, wipe or compact it."""
    with EtcdChild() as child:
        yield child


@pytest.fixture
async def shared(shared_child):
    etcd = Etcd(shared_child.url)
    yield etcd
    await etcd.aclose()


@pytest.fixture
async def etcd(child):
    etcd = Etcd(child.url, timeout_s=1.0)
    yield etcd
    await etcd.aclose()


@pytest.fixture
def keys():
    return Keys(f"test-{uuid.uuid4().hex[:8]}")
