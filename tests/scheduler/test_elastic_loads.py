"""Scheduling over a pool whose memory comes and goes: the loads of `test_random_loads`, with memory that comes late, is
refused, and is taken away."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from tests.scheduler.rig import Rig, request
from tests.scheduler.test_random_loads import Load, bursts, limits, names
from tests.state_machines import explore


def rig(**changes):
    return Rig(num_blocks=60, blocks_per_segment=4, max_num_batched_tokens=64, **changes)


def test_memory_comes_with_the_load_and_goes_when_nobody_needs_it():
    r = rig()
    assert r.pool.num_mapped == 4
    r.run(*(request(f"r{i}", [i + 1] * 20, 8) for i in range(4)))
    r.check_outputs()
    grown = r.pool.num_mapped
    assert grown >= 24
    for _ in range(100):
        r.now += 1.0
        r.resize()
    assert r.pool.num_mapped < grown
    assert r.elastic.stats.shrunk > 0
    r.run(request("later", [1] * 20, 8))
    r.check_outputs()


def test_a_request_waits_for_memory_that_is_refused_at_first():
    r = rig()
    answers = iter([True, True, True])
    r.refused = lambda: next(answers, False)
    r.add(request("long", [3] * 40, 4))
    for _ in range(2000):
        r.turn()
        if not r.scheduler.has_work:
            break
    r.check_outputs()
    assert r.elastic.stats.refused == 3


def test_a_limit_set_at_run_time_is_kept_once_blocks_are_free():
    r = rig()
    for i in range(4):
        r.add(request(f"r{i}", [i + 1] * 20, 8))
    while r.pool.num_mapped < 24:
        r.turn()
    r.elastic.set_limit(12)
    r.drain().check_outputs()
    for _ in range(20):
        r.now += 0.2
        r.resize()
    assert r.pool.num_mapped <= 12


class ElasticLoad(Load):
    """The same over an elastic pool."""

    @initialize(
        limits=limits, names=names, burst=bursts, scarce=st.booleans(), each=st.sampled_from([1, 3, 5]),
        trouble=st.sampled_from([0, 0, 2, 3]), recorded=st.booleans(),
    )  # fmt: skip
    def start(self, limits, names, burst, scarce, each, trouble, recorded):
        self.recorded = recorded
        names = {**names, "admission": "optimistic"}  # the other is refused with such a pool
        super().start({**limits, "blocks_per_segment": each}, names, burst, scarce)
        asked = iter(range(1, 10**9))
        self.rig.refused = lambda: bool(trouble) and next(asked) % trouble == 0

    @rule()
    def resize(self):
        self.rig.resize()

    @rule(seconds=st.sampled_from([0.05, 1.0, 30.0]))
    def nothing_happens(self, seconds):
        self.rig.now += seconds

    @rule(blocks=st.one_of(st.none(), st.integers(0, 30)))
    def limit(self, blocks: int | None) -> None:
        assert self.rig.elastic is not None
        self.rig.elastic.set_limit(blocks)

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            assert self.rig.elastic is not None
            self.rig.elastic.set_limit(None)
        super().teardown()


def test_random_loads():
    explore(ElasticLoad, examples=100, moves=40)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_random_loads_in_depth():
    explore(ElasticLoad, examples=600, moves=80)
