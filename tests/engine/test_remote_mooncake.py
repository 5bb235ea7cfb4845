"""Engines that share a real Mooncake store, whose master is killed under load."""

import threading

import pytest

from tests.engine import test_remote
from tests.engine.test_equality import BLOCK
from tests.engine.test_remote import model, reply, talks, truth
from tests.engine.test_tiers import converse, engine, tiers
from tests.executor.stores.mooncake_master import Master

__all__ = ["model", "talks", "truth"]  # fixtures
nothing_is_too_slow = test_remote.nothing_is_too_slow


@pytest.fixture
def master(tmp_path):
    master = Master(tmp_path / "master.log")
    yield master
    master.kill()


def test_the_first_prompt_of_another_engine_hits(model, talks, truth, master):
    with engine(model, kv_remote=master.url(segment="64MiB")) as first:
        assert converse(first, talks) == truth
        assert tiers(first)[-1].stored > 20
        with engine(model, kv_remote=master.url(segment="0")) as second:
            assert reply(second, talks[0][0]) == truth[0][0]
            assert tiers(second)[-1].hits == len(talks[0][0]) // BLOCK
            assert converse(second, talks) == truth


def test_the_master_is_killed_in_the_middle_and_comes_back(model, talks, truth, master):
    with engine(model, host=16, kv_remote=master.url(segment="64MiB")) as llm:
        assert converse(llm, talks) == truth
        before = tiers(llm)[-1]
        assert before.hits > 0
        killing = threading.Timer(0.1, master.kill)
        killing.start()
        for _ in range(3):
            assert converse(llm, talks) == truth
        killing.join()
        assert converse(llm, talks) == truth
        assert tiers(llm)[-1].failures > before.failures
        master.start()
        for _ in range(200):
            assert converse(llm, talks) == truth
            if tiers(llm)[-1].hits > before.hits + 50:
                return
        pytest.fail("the store was not used again")
