import pytest

from xllm.kv.tiers.cost import Blocks, Cost

BLOCK = 16
TIERS = Blocks._fields


@pytest.fixture
def cost() -> Cost:
    """Computing a block takes 16 ms."""
    cost = Cost()
    cost.computed(1000, 1.0)
    return cost


def worthwhile(cost: Cost, host: int = 0, disk: int = 0, store: int = 0) -> bool:
    return cost.choose([Blocks(host, disk, store)], BLOCK) == 0


def of(tier: str, count: int) -> Blocks:
    return Blocks(**{tier: count})


def test_the_unknown_is_tried():
    cost = Cost()
    assert worthwhile(cost, 1)
    cost.loaded(Blocks(1), 1000.0)
    assert worthwhile(cost, 1)  # computing might be slower still
    cost.computed(1000, 1.0)
    assert not worthwhile(cost, 1)
    assert worthwhile(cost, disk=1)  # nothing is known of the disk
    assert worthwhile(cost, 1, 1)
    cost.loaded(Blocks(disk=1), 1000.0)
    assert not worthwhile(cost, 1, 1)
    assert worthwhile(cost, 1, 1, 1)


def test_nothing_is_not_worth_a_load(cost):
    assert cost.choose([], BLOCK) == -1


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(("seconds", "expected"), [(0.15, True), (0.17, False)])
def test_the_faster_way_is_taken(cost, tier, seconds, expected):
    cost.loaded(of(tier, 10), seconds)
    assert (cost.choose([of(tier, 3)], BLOCK) == 0) is expected
    assert (cost.choose([of(tier, 300)], BLOCK) == 0) is expected


@pytest.mark.parametrize("slow", ["disk", "store"])
def test_tiers_are_told_apart(cost, slow):
    cost.loaded(Blocks(10), 0.01)
    cost.loaded(of(slow, 10), 1.0)
    assert worthwhile(cost, 10)
    assert not worthwhile(cost, **{slow: 10})
    assert worthwhile(cost, 100, **{slow: 1})  # 0.1 s + 0.1 s against 1.6 s
    assert not worthwhile(cost, 1, **{slow: 100})


def test_what_is_near_is_loaded_without_what_is_too_far(cost):
    cost.loaded(Blocks(10), 0.01)
    cost.loaded(Blocks(disk=10), 0.05)
    cost.loaded(Blocks(store=10), 1.0)
    ways = [Blocks(5, 5, 5), Blocks(5, 5), Blocks(5)]
    assert cost.choose(ways, BLOCK) == 1
    cost.loaded(Blocks(disk=1000), 100.0)
    assert cost.choose(ways, BLOCK) == 2
    cost.loaded(Blocks(1000), 100.0)
    assert cost.choose(ways, BLOCK) == -1
    answers = [cost.choose(ways, BLOCK) for _ in range(16)]
    assert sorted(answers) == [-1] * 15 + [0], "what was declined is tried as a whole"


@pytest.mark.parametrize("far", ["disk", "store"])
def test_a_mixed_load_is_the_far_tier_s_beyond_what_host_blocks_usually_take(cost, far):
    cost.loaded(Blocks(10), 0.1)
    cost.loaded(Blocks(10)._replace(**{far: 10}), 0.2)  # 10 ms for each of either kind
    assert worthwhile(cost, **{far: 10})
    cost.loaded(Blocks(10)._replace(**{far: 10}), 0.05)  # faster than usual: it took no time, not less
    assert worthwhile(cost, **{far: 10})


def test_a_load_from_disk_and_store_says_nothing_of_either(cost):
    cost.loaded(Blocks(0, 10, 10), 1000.0)
    assert worthwhile(cost, disk=1)
    assert worthwhile(cost, store=1)


def test_newer_measurements_count_more(cost):
    for _ in range(20):
        cost.loaded(Blocks(1), 1.0)
    assert not worthwhile(cost, 1)
    for _ in range(50):
        cost.loaded(Blocks(1), 0.001)
    assert worthwhile(cost, 1)
    for _ in range(50):
        cost.computed(1000, 0.01)
    assert not worthwhile(cost, 1)


def test_large_measurements_count_more(cost):
    cost.loaded(Blocks(1000), 1.0)
    cost.loaded(Blocks(1), 1.0)  # a single block's latency
    assert worthwhile(cost, 100)


def test_one_in_sixteen_is_loaded_anyhow(cost):
    cost.loaded(Blocks(1), 1.0)
    answers = [worthwhile(cost, 1) for _ in range(48)]
    assert answers == ([False] * 15 + [True]) * 3


def test_measurements_of_nothing_say_nothing():
    cost = Cost()
    cost.computed(0, 1.0)
    cost.loaded(Blocks(), 1.0)
    cost.computed(1000, 0.0)
    cost.loaded(Blocks(1), 1.0)
    assert not worthwhile(cost, 1)


def test_a_question_is_asked_unless_its_answer_comes_later_than_the_blocks(cost):
    assert cost.worth_asking(1, BLOCK), "nobody knows how long it takes"
    cost.looked(0.1)
    assert cost.worth_asking(7, BLOCK)
    answers = [cost.worth_asking(6, BLOCK) for _ in range(32)]
    assert answers == ([False] * 15 + [True]) * 2
    assert Cost().worth_asking(1, BLOCK)
