"""Whatever may run at once, the outcome is that of one task after the other."""

from hypothesis import given
from hypothesis import strategies as st

from xllm.core.transfer import Load, Save, Source
from xllm.executor.turns import CopyDown, LoadUp, Task, Turns, Write

PLACES = st.lists(st.sampled_from([("host", 0), ("host", 1), ("disk", 0), ("device", 0)]), max_size=3)


@given(st.lists(st.tuples(PLACES, PLACES), max_size=20), st.randoms(use_true_random=False))
def test_tasks_take_effect_in_the_order_they_came(uses, random):
    turns = Turns()
    coming = [Task(reads, writes) for reads, writes in uses]
    number = {task: i for i, task in enumerate(coming)}
    running: list[Task] = []
    ended: set[Task] = set()

    def begin(task):
        for other in coming[: number[task]]:
            clash = set(task.writes) & {*other.reads, *other.writes} or set(task.reads) & set(other.writes)
            assert other in ended or not clash
        for other in running:
            assert not set(task.writes) & {*other.reads, *other.writes}
            assert not set(task.reads) & set(other.writes)
        running.append(task)

    waiting = list(coming)
    while waiting or running:
        if waiting and (not running or random.random() < 0.5):
            task = waiting.pop(0)
            if turns.enter(task):
                begin(task)
        else:
            task = running.pop(random.randrange(len(running)))
            ended.add(task)
            for other in turns.leave(task):
                begin(other)
    assert len(ended) == len(coming), "nobody waits for ever"
    assert not turns._readers
    assert not turns._writer


def test_what_has_nothing_in_common_does_not_wait():
    turns = Turns()
    assert turns.enter(Task([("host", 0)], [("disk", 0)]))
    assert turns.enter(Task([("host", 0)], [("disk", 1)])), "both read"
    assert turns.enter(Task([("host", 1)], [("disk", 2)]))
    assert not turns.enter(Task([], [("host", 0)]))
    assert not turns.enter(Task([("host", 0)], [])), "behind who overwrites it"


def test_a_load_waits_for_the_save_of_what_it_loads():
    class NoMark:
        def wait(self): ...

        def since(self, earlier):
            return 0.0

    turns = Turns()
    save = Save(1, bytes(16), block=5, host_slot=3, disk_slot=8)
    copy, write = CopyDown(save, NoMark()), Write(save, 8)
    load = LoadUp(Load(2, [Source(bytes(16), 3, None), Source(bytes(16), 4, 9)], [6, 7]), 0.0)
    assert load.unread == 1
    assert [turns.enter(task) for task in (copy, write, load)] == [True, False, False]
    assert turns.leave(copy) == [write, load], "both may read what was saved"
