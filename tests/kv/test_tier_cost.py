import pytest

from xllm.kv.tiers.cost import Cost

BLOCK = 16


@pytest.fixture
def cost() -> Cost:
    """Computing a block takes 16 ms."""
    cost = Cost()
    cost.computed(1000, 1.0)
    return cost


def test_the_unknown_is_tried():
    cost = Cost()
    assert cost.worthwhile(1, 0, BLOCK)
    cost.loaded(1, 0, 1000.0)
    assert cost.worthwhile(1, 0, BLOCK)  # computing might be slower still
    cost.computed(1000, 1.0)
    assert not cost.worthwhile(1, 0, BLOCK)
    assert cost.worthwhile(0, 1, BLOCK)  # nothing is known of the disk
    assert cost.worthwhile(1, 1, BLOCK)


def test_nothing_is_not_worth_a_load(cost):
    assert not cost.worthwhile(0, 0, BLOCK)


@pytest.mark.parametrize(("seconds", "expected"), [(0.15, True), (0.17, False)])
def test_the_faster_way_is_taken(cost, seconds, expected):
    cost.loaded(10, 0, seconds)
    assert cost.worthwhile(3, 0, BLOCK) is expected
    assert cost.worthwhile(300, 0, BLOCK) is expected


def test_tiers_are_told_apart(cost):
    cost.loaded(10, 0, 0.01)
    cost.loaded(0, 10, 1.0)
    assert cost.worthwhile(10, 0, BLOCK)
    assert not cost.worthwhile(0, 10, BLOCK)
    assert cost.worthwhile(100, 1, BLOCK)  # 0.1 s + 0.1 s against 1.6 s
    assert not cost.worthwhile(1, 100, BLOCK)


def test_a_mixed_load_is_the_disk_s_beyond_what_host_blocks_usually_take(cost):
    cost.loaded(10, 0, 0.1)
    cost.loaded(10, 10, 0.2)  # 10 ms for each of either kind
    assert cost.worthwhile(0, 10, BLOCK)
    cost.loaded(10, 10, 0.05)  # faster than usual: the disk took no time, not less
    assert cost.worthwhile(0, 10, BLOCK)


def test_newer_measurements_count_more(cost):
    for _ in range(20):
        cost.loaded(1, 0, 1.0)
    assert not cost.worthwhile(1, 0, BLOCK)
    for _ in range(50):
        cost.loaded(1, 0, 0.001)
    assert cost.worthwhile(1, 0, BLOCK)
    for _ in range(50):
        cost.computed(1000, 0.01)
    assert not cost.worthwhile(1, 0, BLOCK)


def test_large_measurements_count_more(cost):
    cost.loaded(1000, 0, 1.0)
    cost.loaded(1, 0, 1.0)  # a single block's latency
    assert cost.worthwhile(100, 0, BLOCK)


def test_one_in_sixteen_is_loaded_anyhow(cost):
    cost.loaded(1, 0, 1.0)
    answers = [cost.worthwhile(1, 0, BLOCK) for _ in range(48)]
    assert answers == ([False] * 15 + [True]) * 3


def test_measurements_of_nothing_say_nothing():
    cost = Cost()
    cost.computed(0, 1.0)
    cost.loaded(0, 0, 1.0)
    cost.computed(1000, 0.0)
    cost.loaded(1, 0, 1.0)
    assert not cost.worthwhile(1, 0, BLOCK)
