import pytest

from tests.scheduler.rig import request
from xllm.core.request import Phase, Request
from xllm.scheduler.running import RunningSet


def seated(running: RunningSet, number: int, *, decoding: bool = True) -> Request:
    one = request(str(number), [1])
    one.rank = (float(number), number)
    running.seat(one)
    if decoding:
        running.decoding.append(one)
    else:
        running.begin(one)
    return one


def test_slots_are_each_somebodys_or_free():
    running = RunningSet(2)
    one, other = seated(running, 1), seated(running, 2)
    assert {one.slot, other.slot} == {0, 1}
    assert one.phase is Phase.RUNNING
    assert not running.has_slot
    running.audit(2)
    running.remove(one)
    running.unseat(one)
    assert one.slot == -1
    assert running.has_slot
    running.audit(2)


def test_prompts_in_work_are_sorted_by_rank():
    running = RunningSet(3)
    ids = [seated(running, number, decoding=False).id for number in (2, 3, 1)]
    assert ids == ["2", "3", "1"]
    assert [one.id for one in running.prefilling] == ["1", "2", "3"]


def test_the_last_in_rank_is_found_on_either_list():
    running = RunningSet(3)
    seated(running, 2)
    last = seated(running, 3, decoding=False)
    seated(running, 1)
    assert running.last() is last
    running.remove(last)
    assert running.last().id == "2"


def test_turns_rotate():
    running = RunningSet(3)
    for number in (1, 2, 3):
        seated(running, number)
    running.pass_turns(2)
    assert [one.id for one in running.decoding] == ["3", "1", "2"]


def test_the_finished_leave_together():
    running = RunningSet(4)
    staying = [seated(running, 1), seated(running, 2, decoding=False)]
    for gone in (seated(running, 3), seated(running, 4, decoding=False)):
        gone.phase = Phase.FINISHED
    running.drop_finished()
    assert sorted(one.id for one in running) == [one.id for one in staying]
    running.clear()
    assert not list(running)


def test_audit_finds_a_slot_taken_twice():
    running = RunningSet(2)
    one, other = seated(running, 1), seated(running, 2)
    other.slot = one.slot
    with pytest.raises(AssertionError, match="of 2 slots"):
        running.audit(2)
