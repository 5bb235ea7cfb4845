from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.cluster import policies
from xllm.cluster.fleet import Fleet
from xllm.cluster.kv_index import KvIndex
from xllm.cluster.view import Ask, Capacity, Choice, Load
from xllm.core.errors import ConfigError
from xllm.kv.events import DEVICE, DISK, HOST

CAPACITY = Capacity(max_num_seqs=8, num_blocks=1000, block_size=16, max_model_len=16_000)
PROMPT = tuple(range(100, 150))  # 50 blocks
ASK = Ask("r", 16 * len(PROMPT) + 1, PROMPT, expected_output=64)


def clock() -> float:
    return 0.0


def fleet_of(*ids: str, capacity: Capacity = CAPACITY) -> Fleet:
    fleet = Fleet()
    for id in ids:
        fleet.joined(id, 1, capacity)
    return fleet


def index_of(**held: dict[str, tuple[int, ...]]) -> KvIndex:
    index = KvIndex()
    for id, blocks in held.items():
        index.reset(id, 1, 0, blocks)
    return index


def choose(name: str, fleet: Fleet, index: KvIndex | None = None, ask: Ask = ASK) -> Choice:
    choice = policies.load(name)(ask, fleet, index or KvIndex(), clock)
    assert choice is not None
    return choice


def spread(
    name: str, fleet: Fleet, count: int, index: KvIndex | None = None, ask: Ask = ASK
) -> dict[str, int]:
    """Where `count` requests go that arrive at once."""
    went = dict.fromkeys(fleet.views, 0)
    for n in range(count):
        choice = choose(name, fleet, index, replace(ask, request_id=str(n)))
        fleet.sent(choice, replace(ask, request_id=str(n)), 0.0)
        went[choice.instance] += 1
    return went


@pytest.mark.parametrize("name", policies.ROUTING)
def test_every_line_of_the_table_leads_to_a_function_of_that_name(name):
    policy = policies.load(name)
    assert getattr(policy, "__name__", None) == name
    assert policy.__module__ == f"xllm.cluster.policies.{name}"
    assert policy.__doc__


def test_an_unknown_name_is_an_error_that_lists_the_known():
    with pytest.raises(ConfigError, match="unknown routing policy 'random'; known: round_robin, ") as caught:
        policies.load("random")
    assert caught.value.param == "routing_policy"


@pytest.mark.parametrize("name", policies.ROUTING)
def test_a_choice_tells_the_numbers_of_every_candidate_best_first(name):
    fleet = fleet_of("a", "b", "c")
    fleet.serves("b", False)
    choice = choose(name, fleet, index_of(a={DEVICE: PROMPT[:10]}, c={DEVICE: PROMPT[:10]}))
    assert choice.policy == name
    assert set(choice.reasons) == {"a", "c"} and next(iter(choice.reasons)) == choice.instance
    assert all(isinstance(number, float) for of in choice.reasons.values() for number in of.values())
    assert choice.cached_tokens == 160


@pytest.mark.parametrize("name", policies.ROUTING)
def test_nobody_can_take_it(name):
    fleet = fleet_of("a", "b")
    policy = policies.load(name)
    assert policy(ASK, Fleet(), KvIndex(), clock) is None
    assert policy(replace(ASK, avoid=frozenset("ab")), fleet, KvIndex(), clock) is None
    assert policy(Ask("r", 16_001), fleet, KvIndex(), clock) is None
    fleet.serves("a", False)
    fleet.serves("b", False)
    assert policy(ASK, fleet, KvIndex(), clock) is None


@pytest.mark.parametrize("name", policies.ROUTING)
def test_a_burst_on_equal_instances_spreads_evenly(name):
    assert set(spread(name, fleet_of("a", "b", "c", "d"), 40).values()) == {10}


@pytest.mark.parametrize("name", policies.ROUTING)
def test_policies_do_not_write(name):
    fleet, index = fleet_of("a", "b"), index_of(a={DEVICE: PROMPT[:9]})
    assert choose(name, fleet, index) == choose(name, fleet, index)


def test_a_newcomer_gets_its_turn_and_no_more():
    fleet = fleet_of("a", "b")
    spread("round_robin", fleet, 7)
    fleet.joined("c", 1, CAPACITY)
    assert spread("round_robin", fleet, 6) == {"a": 2, "b": 2, "c": 2}


def test_least_loaded_goes_by_the_share_of_its_places():
    fleet = fleet_of("small")
    fleet.joined("large", 1, replace(CAPACITY, max_num_seqs=80))
    fleet.told("small", Load(running=2), 0.0)
    fleet.told("large", Load(running=10), 0.0)
    assert choose("least_loaded", fleet).instance == "large"


def test_a_prefix_draws_until_the_queue_is_longer_than_what_it_saves():
    fleet, index = fleet_of("a", "b"), index_of(b={DEVICE: PROMPT[:40]})
    choice = choose("prefix_aware", fleet, index)
    assert (choice.instance, choice.cached_tokens) == ("b", 640)
    assert choice.reasons["a"]["cost"] - choice.reasons["b"]["cost"] == 640
    other = Ask("other", 700)
    fleet.sent(Choice("b", "test", {}), other, 0.0)
    assert choose("prefix_aware", fleet, index).instance == "a"
    fleet.first_token("b", "other", 0.1)
    assert choose("prefix_aware", fleet, index).instance == "b"


def test_slower_tiers_are_worth_less():
    index = index_of(a={DISK: PROMPT}, b={HOST: PROMPT}, c={DEVICE: PROMPT}, d={DEVICE: PROMPT[:5]})
    assert list(choose("prefix_aware", fleet_of(*"abcd"), index).reasons) == ["c", "b", "a", "d"]


def test_kv_aware_looks_at_memory_and_not_at_the_queue():
    fleet = fleet_of("a", "b")
    fleet.told("a", Load(running=1, kv_usage=0.9), 0.0)
    fleet.told("b", Load(running=8, kv_usage=0.3), 0.0)
    choice = choose("kv_aware", fleet)
    assert choice.instance == "b"
    assert choice.reasons["a"]["headroom"] == pytest.approx((100 - 55) / 1000)
    held = choose("kv_aware", fleet, index_of(a={DEVICE: PROMPT})).reasons["a"]
    assert held["needed_blocks"] == 5


def slow_and_fast() -> Fleet:
    fleet = fleet_of("slow", "fast")
    for tokens in (10, 1000):
        fleet.told("slow", Load(step_tokens=tokens, step_s=0.02 + 1e-3 * tokens), 0.0)
        fleet.told("fast", Load(step_tokens=tokens, step_s=0.01 + 1e-4 * tokens), 0.0)
    return fleet


def test_slo_aware_takes_the_cheapest_that_meets_the_targets():
    fleet, index = slow_and_fast(), index_of(slow={DEVICE: PROMPT[:20]})
    assert choose("slo_aware", fleet, index).instance == "slow"  # no targets: what is cached decides
    assert choose("slo_aware", fleet, index, replace(ASK, ttft_s=1.0, tpot_s=0.1)).instance == "slow"
    tight = choose("slo_aware", fleet, index, replace(ASK, ttft_s=0.2))
    assert tight.instance == "fast"
    assert tight.reasons["fast"]["violation"] == 0 < tight.reasons["slow"]["violation"]
    assert tight.reasons["fast"]["ttft_s"] == pytest.approx(0.01 + 0.0801)
    assert choose("slo_aware", fleet, index, replace(ASK, tpot_s=0.015)).instance == "fast"


def test_slo_aware_misses_by_the_least_where_it_has_to_and_believes_what_it_saw():
    fleet = slow_and_fast()
    impossible = replace(ASK, ttft_s=0.01)
    assert choose("slo_aware", fleet, ask=impossible).instance == "fast"
    fleet.views["fast"].ttft.factor = 10.0  # all it promised took ten times as long
    fleet.views["slow"].ttft.factor = 0.1
    assert choose("slo_aware", fleet, ask=impossible).instance == "slow"


# ---- whatever the state


@st.composite
def states(draw: st.DrawFn) -> tuple[Fleet, KvIndex, Ask]:
    """Instances with any load and step times, some with a part of the prompt, some not serving."""
    fleet, index = Fleet(), KvIndex()
    for n in range(draw(st.integers(1, 6))):
        id = f"i{n}"
        queue = draw(st.sampled_from([None, 0, 8]))
        fleet.joined(
            id, 1, replace(CAPACITY, max_num_queued=queue), draw(st.sampled_from(["both", "prefill"]))
        )
        tokens = draw(st.floats(0, 2000))
        load = Load(
            draw(st.integers(0, 8)),
            draw(st.integers(0, 12)),
            draw(st.floats(0, 1)),
            tokens,
            draw(st.floats(0, 1)),
        )
        fleet.told(id, load, 0.0)
        fleet.serves(id, draw(st.booleans()))
        cut = draw(st.integers(0, 50))
        index.reset(id, 1, 0, {draw(st.sampled_from([DEVICE, HOST, DISK])): PROMPT[:cut]})
    target = st.none() | st.floats(1e-3, 10)
    avoid = draw(st.frozensets(st.sampled_from(["i0", "i1"])))
    return fleet, index, replace(ASK, ttft_s=draw(target), tpot_s=draw(target), avoid=avoid)


@settings(max_examples=200, deadline=None)
@given(state=states(), name=st.sampled_from(list(policies.ROUTING)))
def test_every_choice_is_a_live_candidate_and_there_is_one_if_anybody_is(state, name):
    fleet, index, ask = state
    able = {view.id for view in fleet if view.takes(ask)}
    choice = policies.load(name)(ask, fleet, index, clock)
    if choice is None:
        assert not able
    else:
        assert choice.instance in able == set(choice.reasons)
        assert choice.cached_tokens < ask.prompt_tokens


@settings(max_examples=200, deadline=None)
@given(
    state=states(),
    name=st.sampled_from(["least_loaded", "prefix_aware", "kv_aware", "slo_aware"]),
    more=st.tuples(st.integers(0, 8), st.integers(0, 8), st.floats(0, 1)),
    data=st.data(),
)
def test_more_load_never_attracts(state, name, more, data):
    """An instance that lost still loses when it has more to do; nothing else changed."""
    fleet, index, ask = state
    policy = policies.load(name)
    before = policy(ask, fleet, index, clock)
    losers = [] if before is None else [id for id in before.reasons if id != before.instance]
    if before is None or not losers:
        return
    view = fleet.views[data.draw(st.sampled_from(losers))]
    load = view.load
    view.load = replace(
        load,
        running=load.running + more[0],
        waiting=load.waiting + more[1],
        kv_usage=min(1.0, load.kv_usage + more[2]),
    )
    after = policy(ask, fleet, index, clock)
    assert after is not None and after.instance == before.instance


@settings(max_examples=50, deadline=None)
@given(instances=st.integers(1, 7), count=st.integers(0, 60), ended=st.sets(st.integers(0, 59)))
def test_round_robin_is_fair_whatever_ends_when(instances, count, ended):
    fleet = fleet_of(*(f"i{n}" for n in range(instances)))
    went = dict.fromkeys(fleet.views, 0)
    for n in range(count):
        ask = replace(ASK, request_id=str(n))
        choice = choose("round_robin", fleet, ask=ask)
        fleet.sent(choice, ask, 0.0)
        went[choice.instance] += 1
        if n in ended:
            fleet.ended(choice.instance, ask.request_id, 0.0)
    assert max(went.values()) - min(went.values()) <= 1


@settings(max_examples=50, deadline=None)
@given(
    instances=st.integers(2, 6),
    blocks=st.integers(1, 50),
    medium=st.sampled_from([DEVICE, HOST, DISK]),
    name=st.sampled_from(["prefix_aware", "slo_aware"]),
)
def test_nobody_starves_beside_a_hot_prefix(instances, blocks, medium, name):
    """All ask for one prefix that one instance has: it gets the most, and everybody gets some."""
    fleet = fleet_of(*(f"i{n}" for n in range(instances)))
    index = index_of(i0={medium: PROMPT[:blocks]})
    went = spread(name, fleet, 200, index)
    assert min(went.values()) >= 1
    assert went["i0"] == max(went.values())
