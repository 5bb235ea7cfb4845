import math

import pytest

from tests.scheduler.rig import request
from xllm.core.errors import InvalidRequest
from xllm.scheduler import order


def sorted_by(policy, *requests):
    return [one.id for one in sorted(requests, key=policy)]


def test_fcfs_goes_by_arrival():
    assert sorted_by(order.fcfs, request("late", [1], arrival=2.0), request("early", [1], arrival=1.0)) == [
        "early",
        "late",
    ]


def test_priority_lower_runs_first():
    ids = sorted_by(
        order.priority,
        request("normal", [1], arrival=0.0),
        request("background", [1], arrival=0.0, priority=1),
        request("urgent", [1], arrival=5.0, priority=-1),
    )
    assert ids == ["urgent", "normal", "background"]


def test_priority_ages():
    """Who is one level better overtakes those who came up to a minute before it, and nobody who waited longer."""
    waited = request("waited", [1], arrival=0.0, priority=1)
    for arrival, first in ((order.PRIORITY_STEP_S - 1, "better"), (order.PRIORITY_STEP_S + 1, "waited")):
        better = request("better", [1], arrival=arrival, priority=0)
        assert sorted_by(order.priority, waited, better)[0] == first


@pytest.mark.parametrize("value", [2**31, -(2**31), 10**400])
def test_priority_is_bounded(value):
    with pytest.raises(InvalidRequest, match="priority must lie between") as caught:
        order.priority(request("x", [1], priority=value))
    assert caught.value.param == "priority"


def test_deadline_goes_by_deadline():
    ids = sorted_by(
        order.deadline,
        request("none", [1], arrival=0.0),
        request("soon", [1], arrival=9.0, deadline=10.0),
        request("later", [1], arrival=0.0, deadline=order.DEFAULT_DEADLINE_S + 1),
    )
    assert ids == ["soon", "none", "later"]


def test_a_deadline_long_past_jumps_no_queue():
    assert order.deadline(request("x", [1], arrival=50.0, deadline=-1e9)) == 50.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_deadline_is_a_time(value):
    with pytest.raises(InvalidRequest, match="finite"):
        order.deadline(request("x", [1], deadline=value))


def test_shortest_goes_by_prompt_and_ages():
    long = request("long", [1] * 1001, arrival=0.0)
    early, late = (
        request("short", [1], arrival=1000 * order.SECONDS_PER_TOKEN + margin) for margin in (-1.0, 1.0)
    )
    assert sorted_by(order.shortest, long, early) == ["short", "long"]
    assert sorted_by(order.shortest, long, late) == ["long", "short"]
