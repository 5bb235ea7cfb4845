import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scheduler.rig import request
from xllm.scheduler.waiting import WaitingQueue


def queue_of(*seconds: float) -> tuple[WaitingQueue, list]:
    queue = WaitingQueue()
    requests = []
    for number, second in enumerate(seconds):
        one = request(f"{number}", [1])
        one.rank = (second, number)
        requests.append(one)
        queue.push(one)
    return queue, requests


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, 1.0])))
def test_pops_by_rank_and_ties_by_arrival(seconds):
    queue, requests = queue_of(*seconds)
    popped = [queue.pop() for _ in range(len(queue))]
    assert popped == sorted(requests, key=lambda one: one.rank)


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1), st.data())
def test_removes_anyone(seconds, data):
    queue, requests = queue_of(*seconds)
    gone = data.draw(st.sampled_from(requests))
    queue.remove(gone)
    requests.remove(gone)
    assert len(queue) == len(requests)
    assert [queue.pop() for _ in requests] == sorted(requests, key=lambda one: one.rank)


def test_the_head_is_whom_pop_takes():
    queue, requests = queue_of(3.0, 1.0, 2.0)
    assert queue.head is requests[1]
    assert queue.pop() is requests[1]
    queue.push(requests[1])
    assert queue.head is requests[1]


def test_an_empty_queue_has_no_head():
    assert WaitingQueue().head is None


def test_who_does_not_wait_cannot_leave():
    queue, requests = queue_of(1.0, 2.0)
    queue.pop()
    with pytest.raises(ValueError, match="request 0 does not wait"):
        queue.remove(requests[0])
