"""Which graph a decode step takes, and what it is given; the device is the reference one, which replays for real."""

import logging

import pytest
import torch

from xllm.device.reference import ReferenceDevice
from xllm.device.table import open_device
from xllm.executor.decode_graphs import DecodeGraphs, longest_first
from xllm.executor.graphs import GraphTable

SPARE = 99


class Steps:
    """A decode step that returns what it was given, and counts how often it ran; one that samples counts positions up."""

    def __init__(self, fails=()):
        self.seen: list[tuple[int, bool]] = []
        self.fails = set(fails)

    def __call__(self, slots_B, positions_B, sample):
        size = len(slots_B)
        if size in self.fails:
            raise RuntimeError("out of registers")
        self.seen.append((size, sample))
        codes = slots_B * 1000 + positions_B
        if sample:
            positions_B += 1
        return codes, torch.full((size,), sample)


def make(sizes=(1, 2, 4, 8), device=None, **steps):
    step = Steps(**steps)
    table = GraphTable(device or open_device("reference"))
    return DecodeGraphs(table, step, sizes=sizes, spare_slot=SPARE), step, table


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_a_step_takes_the_next_larger_graph_and_fills_it_with_the_spare_slot(count):
    graphs, step, table = make()
    size = next(s for s in (1, 2, 4, 8) if s >= count)
    for start in (10, 20):
        codes, _ = graphs.run(range(count), range(start, start + count), sample=True)
        assert codes.tolist() == [
            *(slot * 1000 + start + slot for slot in range(count)),
            *[SPARE * 1000] * (size - count),
        ]
    assert {s for s, _ in step.seen} == {size}
    assert table.replays == 2


class CountingDevice(ReferenceDevice):
    def __init__(self):
        super().__init__()
        self.uploads = 0

    def upload_into(self, target, array):
        self.uploads += 1
        super().upload_into(target, array)


def test_nothing_is_brought_to_the_device_while_the_same_sequences_go_on():
    device = CountingDevice()
    graphs, _, _ = make(device=device)

    def run(slots, positions, sample=True):
        before = device.uploads
        codes, _ = graphs.run(slots, positions, sample)
        expected = [slot * 1000 + position for slot, position in zip(slots, positions, strict=True)]
        assert codes[: len(slots)].tolist() == expected
        assert codes[len(slots) :].tolist() == [SPARE * 1000] * (len(codes) - len(slots))
        return device.uploads - before

    assert run([3, 5], [10, 20]) == 1
    assert [run([3, 5], [10 + i, 20 + i]) for i in range(1, 4)] == [0, 0, 0]
    assert run([3, 5], [14, 25]) == 1  # one of them elsewhere
    assert run([3, 6], [15, 26]) == 1  # another sequence
    assert run([3, 6, 7], [16, 27, 5]) == 1  # a row of the spare slot, which always stays at position 0
    assert run([3, 6, 7], [17, 28, 6]) == 1
    assert run([3, 6], [18, 29]) == 1
    assert run([3, 6], [19, 30], sample=False) == 1  # another graph, which counts nothing
    assert run([3, 6], [19, 30], sample=False) == 0
    assert run([3, 6], [20, 31], sample=False) == 1


def test_a_larger_graph_that_is_there_serves_before_one_is_captured_in_front_of_everybody(monkeypatch):
    monkeypatch.setattr("xllm.executor.decode_graphs.PATIENCE", 5)
    graphs, _, table = make(sizes=(1, 2, 3, 4, 6, 8))
    graphs.capture_largest()

    def size_of(count):
        return len(graphs.run(range(count), range(count), sample=True)[0])

    assert [size_of(5) for _ in range(5)] == [8] * 5
    assert size_of(5) == 6  # by now it is worth it
    assert size_of(7) == 8
    assert size_of(2) == 2  # 8 would be more than twice as many
    assert size_of(1) == 2
    assert size_of(3) == 6
    assert table.failures == 0


def test_with_and_without_sampling_are_two_graphs():
    graphs, step, _table = make()
    assert graphs.run([0], [1], sample=True)[1].item() is True
    assert graphs.run([0], [1], sample=False)[1].item() is False
    assert set(step.seen) == {(1, True), (1, False)}


def test_a_step_beyond_the_largest_graph_has_none():
    graphs, _, _table = make()
    assert graphs.run(range(9), range(9), sample=True) is None
    assert make(sizes=())[0].run([0], [1], sample=True) is None


def test_a_failed_capture_is_told_once_and_those_steps_run_eagerly(caplog):
    graphs, _, table = make(fails=[4])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert graphs.run(range(3), range(3), sample=True) is None
    assert table.failures == 1
    assert len(caplog.records) == 1
    assert "out of registers" in caplog.text
    assert graphs.run(range(2), range(2), sample=True) is not None


def test_what_is_missing_is_captured_the_likeliest_first():
    graphs, step, table = make(sizes=(1, 2, 3, 4, 6, 8), fails=[2])
    assert sum(iter(graphs.capture_one, False)) == 6
    assert [size for size, _ in step.seen] == [1, 4, 8, 6, 3]
    assert table.failures == 1


def test_the_largest_graph_alone():
    graphs, step, _table = make()
    graphs.capture_largest()
    assert step.seen == [(8, True)]
    make(sizes=())[0].capture_largest()


def test_forgotten_graphs_are_captured_again():
    graphs, step, table = make()
    graphs.run([0], [1], sample=True)
    table.forget()
    before = len(step.seen)
    graphs.run([0], [1], sample=True)
    assert len(step.seen) > before


def test_the_longest_contexts_come_first_and_equals_keep_their_order():
    assert longest_first([5, 9, 5, 70, 1]).tolist() == [3, 1, 0, 2, 4]
