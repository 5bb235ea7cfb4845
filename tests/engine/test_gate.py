import pytest

from xllm.core.errors import Overloaded, Unavailable
from xllm.engine.gate import LONGEST_RETRY_S, Gate


class Hand:
    """A clock moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_no_more_than_the_limit_get_in():
    gate = Gate(3)
    gate.enter(2)
    with pytest.raises(Overloaded) as refused:
        gate.enter(2)
    assert refused.value.status == 429
    assert gate.in_flight == 2
    gate.enter(1)
    gate.leave(2)
    gate.enter(2)


def test_a_closed_gate_says_why():
    gate = Gate(3)
    gate.closed_because = "the server is shutting down"
    with pytest.raises(Unavailable, match="shutting down") as refused:
        gate.enter(1)
    assert refused.value.status == 503


def test_retry_after_follows_the_measured_pace():
    clock = Hand()
    gate = Gate(10, clock)
    gate.enter(10)
    assert gate.retry_after_s(1) == 1  # nothing ended yet
    for _ in range(5):
        clock.now += 4.0
        gate.leave(1)
        gate.enter(1)
    assert gate.retry_after_s(3) == 12
    assert gate.retry_after_s(100) == LONGEST_RETRY_S
