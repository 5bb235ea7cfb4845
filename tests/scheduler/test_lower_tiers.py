"""Scheduling with tiers below the device: first by hand, then whatever hypothesis thinks of, with damage below."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from tests.scheduler.rig import Rig, request
from tests.scheduler.test_random_loads import Load, arrivals, bursts, limits, names
from tests.state_machines import explore
from xllm.core.output import Finish

LONG = [1, 2, 3, 4] * 6  # 6 blocks


def rig(**changes):
    return Rig(num_blocks=16, host_slots=64, max_num_batched_tokens=64, **changes)


def crowd_out(rig):
    """Requests that need all of the device's blocks, so that nothing else stays there."""
    for i in range(3):
        rig.run(request(f"crowd {len(rig.added)}", [7, 8 + i] * 22, 2))


def test_a_prefix_that_the_device_forgot_comes_back():
    r = rig()
    r.run(request("first", LONG, 2))
    crowd_out(r)
    assert r.pool.match(r.added["first"].block_hashes) == []
    loaded = r.offload.stats[0].hits
    r.run(request("second", [*LONG, 5], 2))
    assert r.offload.stats[0].hits - loaded == 6
    assert r.added["second"].num_cached_tokens == 24
    r.check_outputs()


def test_others_run_while_one_waits_for_its_prefix():
    r = rig()
    r.run(request("first", LONG, 2))
    crowd_out(r)
    r.add(request("waits", [*LONG, 5], 2))
    r.add(request("runs", [9] * 5, 2))
    plan = r.plan()
    assert [new.request_id for new in plan.new] == ["runs"]
    assert (r.scheduler.num_running, r.scheduler.num_waiting) == (1, 1)
    r.apply()
    r.move(100)
    plan = r.plan()
    assert [new.request_id for new in plan.new] == ["waits"]
    assert plan.starts[plan.slots.index(plan.new[0].slot)] == 24
    r.drain().check_outputs()


def test_who_is_aborted_while_its_prefix_comes_gives_everything_back():
    r = rig()
    r.run(request("first", LONG, 2))
    crowd_out(r)
    r.add(request("leaves", [*LONG, 5], 2))
    assert r.plan() is None
    assert r.pool.usage > 0
    assert r.abort("leaves").finish is Finish.ABORT
    assert not r.scheduler.has_work
    r.move(100)
    r.plan()
    assert r.pool.usage == 0
    r.check_outputs()


@pytest.mark.parametrize("bad", [0, 3])
def test_what_is_damaged_is_computed(bad):
    r = rig()
    r.run(request("first", LONG, 2))
    crowd_out(r)
    name = r.added["first"].block_hashes[bad]
    slot = r.offload.host.find(name)
    r.mover.host[slot] = (name[::-1], r.mover.host[slot][1])
    r.run(request("second", [*LONG, 5], 2))
    assert r.added["second"].num_cached_tokens == 4 * bad
    assert r.offload.stats[0].failures == 1
    r.check_outputs()


def test_a_request_that_failed_leaves_nothing_below():
    r = rig()
    r.add(request("poisoned", LONG, 2))
    r.executor.failing["poisoned"] = "its sampler raised"
    r.drain()
    crowd_out(r)
    assert r.offload.find(r.added["poisoned"].block_hashes) == 0
    r.run(request("second", [*LONG, 5], 2))
    assert r.added["second"].num_cached_tokens == 0


def test_forgetting_the_cache_forgets_what_is_on_its_way():
    r = rig()
    r.run(request("first", LONG, 2))
    crowd_out(r)
    r.add(request("second", [*LONG, 5], 2))
    assert r.plan() is None
    r.scheduler.reset_prefix_cache()
    r.drain()
    assert r.added["second"].num_cached_tokens == 0
    r.check_outputs()


def test_what_would_be_slower_to_fetch_is_computed():
    r = rig()
    r.run(request("first", LONG, 2))
    crowd_out(r)
    r.offload.cost.loaded(10, 0, 100.0)
    r.offload.cost.computed(1000, 0.001)
    loaded = r.offload.stats[0].hits
    r.run(request("second", [*LONG, 5], 2))
    assert r.offload.stats[0].hits == loaded
    r.check_outputs()


# more prefixes than the device has room for
FAR = tuple([first, *range(10, 10 + length)] for first in range(6) for length in (15, 23, 30))
returning = st.fixed_dictionaries(
    {"prefix": st.sampled_from(FAR), "suffix": st.lists(st.integers(0, 2), max_size=4)}
)


class TieredLoad(Load):
    """The same with tiers below, whose transfers take their time and fail."""

    @initialize(
        limits=limits, names=names, burst=bursts, scarce=st.booleans(), host=st.sampled_from([1, 5, 40]),
        disk=st.sampled_from([0, 0, 3, 50]), recorded=st.booleans(), trouble=st.sampled_from([0, 0, 3, 7]),
    )  # fmt: skip
    def start(self, limits, names, burst, scarce, host, disk, recorded, trouble):
        tiers = {"host_slots": host, "disk_slots": disk} if limits["prefix_caching"] else {}
        limits["num_blocks"] = 12 + limits["num_blocks"] % 5
        self.recorded = recorded
        super().start({**limits, **tiers}, names, burst, scarce)
        asked = iter(range(1, 10**9))
        self.rig.mover.fails = lambda: bool(trouble) and next(asked) % trouble == 0

    @rule(crowd=st.lists(returning, min_size=1, max_size=4), turns=st.integers(0, 20), like=arrivals)
    def come_back(self, crowd, turns, like):
        for one in crowd:
            self.arrive({**like, **one, "max_tokens": 2, "salt": "", "stop_ids": frozenset()})
        self.run(turns)

    @rule(count=st.integers(1, 9))
    def move(self, count):
        self.rig.move(count)

    @precondition(lambda self: self.rig.mover.told)
    @rule()
    def hear(self):
        self.rig.scheduler.take(self.rig.mover.news())
        self.rig.check()


def test_random_loads():
    explore(TieredLoad, examples=100, moves=40)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_random_loads_in_depth():
    explore(TieredLoad, examples=600, moves=80)
