"""Scheduling with tiers below the device: first by hand, then whatever hypothesis thinks of, with damage below."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from tests.scheduler.rig import Rig, request
from tests.scheduler.test_random_loads import Load, arrivals, bursts, limits, names
from tests.state_machines import explore
from xllm.core.output import Finish
from xllm.core.transfer import Look
from xllm.kv.events import DEVICE, HOST
from xllm.kv.tiers.cost import Blocks
from xllm.kv.tiers.store import HELD_S

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


def test_who_follows_knows_what_lower_tiers_keep_while_the_device_sleeps():
    """Followers were told that everything had gone."""
    r = rig(recorded=True)
    r.run(request("first", LONG, 2))
    r.scheduler.forget_device()
    r.check()
    assert r.mirror.names[DEVICE] == set()
    assert len(r.mirror.names[HOST]) >= 6


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
    r.offload.cost.loaded(Blocks(10), 100.0)
    r.offload.cost.computed(1000, 0.001)
    loaded = r.offload.stats[0].hits
    r.run(request("second", [*LONG, 5], 2))
    assert r.offload.stats[0].hits == loaded
    r.check_outputs()


# a store that others use as well


def two(**changes):
    """Two engines of one store."""
    one, other = (rig(stored=True, **changes) for _ in range(2))
    other.mover.store = one.mover.store
    return one, other


def test_what_another_engine_computed_is_found():
    one, other = two()
    one.run(request("first", LONG, 2))
    other.run(request("second", [*LONG, 5], 2))
    assert other.added["second"].num_cached_tokens == 24
    host, store = other.offload.stats
    assert (host.hits, store.hits, store.failures) == (0, 6, 0)
    crowd_out(other)
    other.run(request("third", [*LONG, 6], 2))
    assert other.added["third"].num_cached_tokens == 24
    assert other.offload.stats[0].hits >= 6, "it stays in host memory"
    assert other.offload.stats[1].hits == 6
    other.check_outputs()


def test_others_run_while_the_store_is_asked():
    one, other = two()
    one.run(request("first", LONG, 2))
    other.add(request("waits", [*LONG, 5], 2))
    assert other.plan() is None
    assert (other.scheduler.num_running, other.scheduler.num_waiting) == (0, 1)
    assert other.pool.usage == 0, "a question takes no memory"
    other.add(request("runs", [9] * 3, 2))
    assert [new.request_id for new in other.plan().new] == ["runs"]
    other.apply()
    other.drain().check_outputs()


def test_a_burst_of_one_prompt_asks_once():
    one, other = two()
    one.run(request("first", LONG, 2))
    for i in range(3):
        other.add(request(f"same {i}", LONG, 2))
    other.add(request("longer", [*LONG, 1, 2, 3, 4, 5], 2))
    assert other.plan() is None
    assert [type(order) for _, order in other.mover.asides] == [Look]
    other.drain().check_outputs()
    assert other.offload.stats[1].failures == 0
    for id in ("same 0", "same 2", "longer"):
        assert other.added[id].num_cached_tokens >= 20


def test_whoever_waited_for_another_s_answer_asks_for_the_rest_of_its_own():
    one, other = two()
    one.run(request("first", [*LONG, 9, 9, 9, 9, 9], 2))
    other.add(request("shorter", LONG, 2))
    other.add(request("longer", [*LONG, 9, 9, 9, 9, 9, 9], 2))
    other.drain().check_outputs()
    assert other.added["longer"].num_cached_tokens == 28


def test_a_no_is_remembered_for_a_while():
    r = rig(stored=True)
    looks: list[Look] = []
    aside = r.mover._aside

    def watched(realm, order):
        looks.extend([order] if isinstance(order, Look) else [])
        aside(realm, order)

    r.mover._aside = watched
    r.run(request("first", [7] * 9, 2))
    r.scheduler.pool.reset_cache()
    r.offload.host.clear()
    r.offload.store.clear()
    r.mover.store.clear()
    r.run(request("second", [7] * 9, 2), request("third", [7] * 9, 2))
    assert len(looks) == 2
    r.offload.host.clear()
    r.scheduler.pool.reset_cache()
    r.now += HELD_S + 1
    r.run(request("fourth", [7] * 9, 2))
    assert len(looks) == 3
    assert r.added["fourth"].num_cached_tokens == 8, "by then somebody had computed it"
    r.check_outputs()


def test_a_silent_store_is_left_alone_and_asked_again():
    one, other = two()
    one.run(request("first", LONG, 2))
    other.mover.fails = lambda: True
    other.run(request("second", [*LONG, 5], 2))
    assert other.added["second"].num_cached_tokens == 0
    assert other.offload.stats[1].failures >= 1
    other.scheduler.pool.reset_cache()
    other.offload.host.clear()
    other.mover.fails = lambda: False
    assert other.offload.store.silent
    other.now += 1.0
    other.run(request("third", [*LONG, 6], 2))
    assert other.added["third"].num_cached_tokens == 24
    other.check_outputs()


def test_what_the_store_gave_up_meanwhile_is_computed():
    one, other = two()
    one.run(request("first", LONG, 2))
    names = one.added["first"].block_hashes
    other.add(request("second", [*LONG, 5], 2))
    other.plan()
    other.move(1)
    other.plan()  # the load is ordered
    del one.mover.store[0, names[2]]
    other.drain().check_outputs()
    assert other.added["second"].num_cached_tokens == 8
    assert other.offload.stats[1].failures == 1


def test_who_is_aborted_while_the_store_is_asked_leaves_nothing():
    one, other = two()
    one.run(request("first", LONG, 2))
    other.add(request("leaves", LONG, 2))
    assert other.plan() is None
    assert other.abort("leaves").finish is Finish.ABORT
    assert not other.scheduler.has_work
    other.drain().check_outputs()


def test_a_request_that_failed_leaves_nothing_in_the_store():
    one, other = two()
    one.add(request("poisoned", LONG, 2))
    one.executor.failing["poisoned"] = "its sampler raised"
    one.drain()
    assert not {(0, name) for name in one.added["poisoned"].block_hashes} & set(one.mover.store)
    other.run(request("second", [*LONG, 5], 2))
    assert other.added["second"].num_cached_tokens == 0


def test_nothing_goes_there_before_its_steps_have_ended_well():
    """The copy of a step that failed is sealed like any other, and others would believe it."""
    one, other = two()
    one.add(request("first", LONG, 2))
    assert one.plan() is None  # the store is asked
    one.move(100)
    one.plan()
    one.executor.steps_run += 1  # far enough for the copies, while nobody knows how it ended
    one.move(100)
    one.plan()
    one.move(100)
    assert one.offload.host.stored == 6
    assert one.mover.store == {}
    one.executor.steps_run -= 1
    one.fail_all()
    one.drain()
    assert one.mover.store == {}
    one.run(request("again", LONG, 2))
    assert len(one.mover.store) == 6
    other.run(request("second", [*LONG, 5], 2))
    assert other.added["second"].num_cached_tokens == 24
    other.check_outputs()


def test_after_a_failed_step_what_others_put_there_is_still_used():
    one, other = two()
    one.run(request("first", LONG, 2))
    other.add(request("fails", [5] * 9, 2))
    other.plan()
    other.move(100)
    other.plan()
    other.fail_all()
    other.run(request("second", [*LONG, 5], 2))
    assert other.added["second"].num_cached_tokens == 24


def test_an_engine_that_forgot_its_cache_is_on_its_own_in_the_store():
    one, other = two()
    one.run(request("first", LONG, 2))
    other.scheduler.reset_prefix_cache()
    other.run(request("second", [*LONG, 5], 2))
    assert other.added["second"].num_cached_tokens == 0
    crowd_out(other)
    other.offload.host.clear()
    other.run(request("third", [*LONG, 6], 2))
    assert other.added["third"].num_cached_tokens == 24, "what it has put there since is its own"
    other.check_outputs()


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
        stored=st.booleans(),
    )  # fmt: skip
    def start(self, limits, names, burst, scarce, host, disk, recorded, trouble, stored):
        tiers = {"host_slots": host, "disk_slots": disk, "stored": stored} if limits["prefix_caching"] else {}
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

    @precondition(lambda self: self.rig.mover.store)
    @rule(which=st.integers(0, 30))
    def lose(self, which):
        """Others let go of what lies in the store."""
        store = self.rig.mover.store
        del store[list(store)[which % len(store)]]

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
