from xllm.scheduler.admission import Demand, no_eviction, optimistic


def demand(**changes: int) -> Demand:
    return Demand(**{"now": 3, "at_worst": 8, "available": 10, "margin": 2, "promised": 2, **changes})


def test_optimistic_asks_for_the_present_and_a_margin():
    assert optimistic(demand(available=5))
    assert not optimistic(demand(available=4))
    assert optimistic(demand(available=5, promised=100))


def test_optimistic_has_no_margin_when_nobody_runs():
    assert optimistic(demand(now=10, margin=0))
    assert not optimistic(demand(now=11, margin=0))


def test_no_eviction_asks_for_everybodys_longest_end():
    assert no_eviction(demand())
    assert not no_eviction(demand(promised=3))
    assert not no_eviction(demand(at_worst=9))
