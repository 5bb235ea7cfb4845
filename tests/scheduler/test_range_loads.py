"""Scheduling over a contiguous pool: the loads of `test_random_loads`, with every block seen where its request has it.

The fake executor maps pages as late as a plan allows, and whoever orders may not rely on that: an order for a place that
a step in flight touches is an error.
"""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize

from tests.scheduler.rig import Rig, request
from tests.scheduler.test_random_loads import Load, bursts, limits, names
from tests.state_machines import explore
from xllm.kv.ranges import READY


def rig(**changes):
    return Rig(spare_ranges=8, max_num_batched_tokens=64, **changes)


def orders(r):
    return r.ranges.ordered


def test_a_request_sees_neighbouring_places():
    r = rig()
    r.run(request("a", [1] * 20, 8), request("b", [2] * 20, 8))
    r.check_outputs()
    for plan in r.plans:
        for new in plan.new:
            first = new.blocks[0]
            assert list(new.blocks) == list(range(first, first + len(new.blocks)))


def test_the_next_request_of_that_size_needs_no_mapping():
    r = rig(prefix_caching=False)
    r.run(request("a", [1] * 20, 8))
    before = orders(r)
    for i in range(5):
        r.run(request(f"r{i}", [i + 2] * 20, 8))
    assert orders(r) - before <= 7, "but for what is prepared once"
    r.check_outputs()


def test_what_is_cached_and_given_up_is_used_where_it_lies():
    r = rig(num_blocks=24)
    for i in range(3):
        r.run(request(f"first{i}", [i + 1] * 20, 9))
    before = orders(r)
    for i in range(6):
        r.run(request(f"then{i}", [i + 10] * 20, 9))
    assert r.pool.evictions > 20
    assert orders(r) - before < 20, "the range of what is given up, as it is"
    r.check_outputs()


def test_a_conversation_goes_on_in_its_range():
    r = rig()
    first = r.add(request("turn 1", [1] * 22, 6))
    r.drain()
    where = r.plans[0].new[0].blocks[0]
    history = first.prompt_token_ids + r.tokens("turn 1")
    r.run(request("turn 2", [*history, 5, 5, 5], 6))
    assert r.plans[-1].step > 1
    turn2 = next(new for plan in r.plans for new in plan.new if new.request_id == "turn 2")
    assert turn2.blocks[0] == where
    r.check_outputs()


def test_a_prefix_is_shared_by_requests_that_run_at_once():
    r = rig()
    r.run(request("first", [1] * 16, 2))
    r.run(*(request(f"r{i}", [1] * 16 + [i], 12) for i in range(4)))
    assert r.pool.hit_tokens >= 4 * 12
    r.check_outputs()


def test_who_shares_a_prefix_takes_a_range_that_shows_it():
    r = rig(max_num_seqs=4)
    r.run(request("first", [1] * 16, 2))
    crowd = [request(f"a{i}", [1] * 16 + [i], 12) for i in range(4)]
    r.run(*crowd)
    before = orders(r)
    for name in "bc":
        r.run(*(request(f"{name}{i}", [1] * 16 + [20 + i], 12) for i in range(4)))
    assert orders(r) - before < 2 * 4 * 7, "the prefix of 4 blocks is where it was"
    r.check_outputs()


def test_where_many_come_at_once_a_prefix_is_seen_at_home():
    r = rig(hits_a_step=5)
    r.run(request("first", [1] * 16, 2))
    before = orders(r)
    r.run(*(request(f"r{i}", [1] * 16 + [i], 12) for i in range(4)))
    assert r.pool.hit_tokens >= 4 * 16 - 4
    assert orders(r) - before <= 5 + 4 * 4 + READY * 4, "not 4 of the prefix for each"
    at_home = [new for plan in r.plans for new in plan.new if new.blocks[0] < r.pool.num_blocks]
    assert len(at_home) >= 2
    for new in at_home:
        own = [place for place in new.blocks if place > r.pool.num_blocks]
        assert own == list(range(own[0], own[0] + len(own)))
    r.check_outputs()


def test_who_shares_a_prefix_at_home_finds_pages_for_the_rest():
    def crowd(r):
        have = len(r.added)
        return [request(f"r{i}", [1] * 16 + [i % 50] * 4, 8) for i in range(have, have + 4)]

    r = rig(hits_a_step=0, max_num_seqs=4)
    r.run(request("first", [1] * 16, 2))
    for _ in range(2):
        r.run(*crowd(r))
        r.scheduler.reset_prefix_cache()
        r.run(request(f"r{len(r.added)}", [1] * 16, 2))
    before = orders(r)
    r.run(*crowd(r))
    assert orders(r) - before <= 4
    r.check_outputs()


def test_who_comes_with_the_first_of_a_prefix_waits_for_it():
    """What a kernel writes through one place another need not see through a second one until the step is over."""
    r = rig()
    r.run(*(request(f"r{i}", [1] * 16 + [i], 4) for i in range(4)))
    first = r.plans[0]
    assert len(first.new) == 1
    assert r.pool.hit_tokens == 3 * 16
    r.check_outputs()


def test_nobody_waits_twice_for_a_prefix():
    r = rig(long_prefill_token_threshold=8)
    r.add(request("long", [1] * 40, 4))
    r.add(request("sharing", [1] * 40 + [2], 4))
    r.plan()
    assert [new.request_id for new in r.plans[0].new] == ["long"]
    r.plan()
    assert [new.request_id for new in r.plans[1].new] == ["sharing"]
    r.drain().check_outputs()


def test_what_a_forgotten_cache_leaves_is_ready():
    def four():
        have = len(r.added)
        return [request(f"r{i}", [i] * 20, 8) for i in range(have, have + 4)]

    r = rig(max_num_seqs=4)
    for _ in range(2):
        r.run(*four())
        r.scheduler.reset_prefix_cache()
    before = orders(r)
    r.run(*four())
    assert orders(r) - before <= 8
    r.check_outputs()


def test_what_decoding_needs_is_ordered_before():
    r = rig(block_size=8)
    r.add(request("long", [3] * 10, 40))
    waits = []
    while r.scheduler.has_work:
        r.turn()
        assert r.executor.places is not None
        waits += [max(0, plan.mapped - r.executor.places.done) for plan in r.plans[-1:]]
        r.executor.places.carry_out(
            r.ranges.ordered - len(r.ranges._orders)
        )  # as a thread would in the time of a step
    assert sum(waits[3:]) == 0
    r.check_outputs()


def test_not_more_is_mapped_than_the_system_allows():
    r = rig(most_mapped=12)
    for i in range(8):
        r.run(request(f"r{i}", [i + 1] * 20, 8))
        assert r.ranges.num_mapped <= 20
    r.plan()
    assert r.ranges.num_mapped <= 12
    r.check_outputs()


def test_all_is_mapped_anew_after_a_failure():
    r = rig()
    r.add(request("lost", [1] * 20, 8))
    r.plan()
    r.fail_all()
    r.run(request("next", [1] * 20, 8))
    assert r.tokens("next")


class RangeLoad(Load):
    @initialize(
        limits=limits, names=names, burst=bursts, scarce=st.booleans(), spare=st.sampled_from([1, 4, 30]),
        most_mapped=st.sampled_from([None, None, 8, 30]), hits_a_step=st.sampled_from([0, 1, 3, 32]), recorded=st.booleans(),
    )  # fmt: skip
    def start(self, limits, names, burst, scarce, spare, most_mapped, hits_a_step, recorded):
        self.recorded = recorded
        limits |= {"spare_ranges": spare, "most_mapped": most_mapped, "hits_a_step": hits_a_step}
        super().start(limits, names, burst, scarce)


def test_any_load():
    explore(RangeLoad, examples=60, moves=50)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_any_load_in_depth():
    explore(RangeLoad, examples=600, moves=80)
