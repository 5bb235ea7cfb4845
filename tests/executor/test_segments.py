"""Segments come and go as ordered, each order has its news, and no error ends the thread."""

import random
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xllm.core.segments import Grow, Grown, Shrink, Shrunk
from xllm.device.reference import ReferenceDevice
from xllm.device.table import DEVICES, open_device
from xllm.device.virtual import Pieces
from xllm.executor import order_thread
from xllm.executor.kv_memory import ElasticMemory
from xllm.executor.runner import Runner
from xllm.executor.segments import SegmentMapper, blocks_per_segment

LONG = 30.0  # seconds; only a failing test waits that long
GRANULE = 4096


class Memory:
    """A range that does as it is told."""

    granularity = GRANULE

    def __init__(self, nbytes):
        self.tensor = torch.zeros(nbytes, dtype=torch.uint8)
        self.pieces = Pieces(-(-nbytes // GRANULE) * GRANULE, GRANULE)
        self.done: list[tuple[str, int, int] | str] = []
        self.error: Exception | None = None
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()

    @property
    def committed(self):
        return self.pieces.committed

    def commit(self, offset, nbytes):
        with self.pieces.adding(offset, nbytes):
            self._do("commit", offset, nbytes)

    def join(self):
        self.done.append("join")

    def decommit(self, offset, nbytes):
        with self.pieces.removing(offset, nbytes):
            self._do("decommit", offset, nbytes)

    def close(self):
        pass

    def _do(self, what, offset, nbytes):
        self.entered.set()
        assert self.gate.wait(LONG)
        if self.error:
            raise self.error
        self.done.append((what, offset, nbytes))


def hear(mapper, count):
    news: list = []
    while len(news) < count:
        assert mapper.wait(LONG), f"{news}, and no more"
        news += mapper.news()
    assert len(news) == count
    return news


@pytest.fixture
def memory():
    return Memory(10 * 1024)


@pytest.fixture
def mapper(memory):
    """Ten blocks of a quarter granule each, in segments of four: the last is two blocks, half a granule."""
    mapper = SegmentMapper(memory, 1024, 4, 10)
    yield mapper
    memory.gate.set()
    assert mapper.close()
    assert not mapper._thread.is_alive()


def test_orders_in_turn_and_their_news(mapper, memory):
    assert mapper.num_segments == 3
    mapper.start([Grow(1), Grow(2), Shrink(1)])
    mapper.start([Grow(1), Grow(0)])
    assert hear(mapper, 5) == [Grown(1), Grown(2), Shrunk(1), Grown(1), Grown(0)]
    assert memory.done == [
        ("commit", GRANULE, GRANULE),
        ("commit", 2 * GRANULE, GRANULE),  # beyond the last block, as far as the granule goes
        ("decommit", GRANULE, GRANULE),
        ("commit", GRANULE, GRANULE),
        ("commit", 0, GRANULE),
    ]
    assert mapper.news() == []


def test_ordering_waits_for_nothing(mapper, memory):
    memory.gate.clear()
    mapper.start([Grow(0)])
    assert memory.entered.wait(LONG)
    mapper.start([Grow(1)])
    begun = time.perf_counter()
    assert not mapper.wait(0.05)
    assert time.perf_counter() - begun < LONG / 2
    assert mapper.news() == []
    memory.gate.set()
    assert hear(mapper, 2) == [Grown(0), Grown(1)]


def test_memory_that_is_not_to_be_had_is_news(mapper, memory, caplog):
    memory.error = MemoryError("64 MiB are not to be had")
    mapper.start([Grow(0)])
    assert hear(mapper, 1) == [Grown(0, ok=False, error="64 MiB are not to be had")]
    memory.error = MemoryError()
    mapper.start([Grow(0)])
    assert hear(mapper, 1) == [Grown(0, ok=False, error="MemoryError")]
    assert memory.committed == 0
    assert not caplog.records, "nothing is wrong"
    memory.error = None
    mapper.start([Grow(0)])
    assert hear(mapper, 1) == [Grown(0)]


def test_no_error_ends_the_thread(mapper, memory, caplog):
    memory.error = RuntimeError("CUDA error: cuMemMap answers CUDA_ERROR_UNKNOWN")
    mapper.start([Grow(0), Grow(1), Shrink(0), Grow(7), Shrink(-1)])
    news = hear(mapper, 5)
    assert [(one.segment, one.ok) for one in news if isinstance(one, Grown)] == [
        (0, False), (1, False), (7, False),
    ]  # fmt: skip
    assert "CUDA_ERROR_UNKNOWN" in news[0].error
    assert news[3].error == "segment 7 of 3"
    assert [one.segment for one in news if isinstance(one, Shrunk)] == [0, -1]
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 3, "one for each kind"
    memory.error = None
    mapper.start([Grow(0), Grow(0), Shrink(0)])
    assert [one.ok for one in hear(mapper, 3)[:2]] == [True, False]
    assert memory.committed == 0


def test_memory_that_does_not_go_is_not_had_twice(mapper, memory):
    mapper.start([Grow(0)])
    hear(mapper, 1)
    memory.error = RuntimeError("what")
    mapper.start([Shrink(0)])
    assert hear(mapper, 1) == [Shrunk(0)]
    memory.error = None
    mapper.start([Grow(0)])
    assert not hear(mapper, 1)[0].ok
    assert memory.committed == GRANULE


def test_the_first_ones_are_mapped_at_once(mapper, memory):
    mapper.map_now(range(2))
    assert memory.committed == 2 * GRANULE
    assert mapper.news() == []
    mapper.start([Shrink(1)])
    assert hear(mapper, 1) == [Shrunk(1)]


def test_all_of_the_first_ones_or_none(mapper, memory, monkeypatch):
    commit = memory.commit

    def limited(offset, nbytes):
        if memory.committed == 2 * GRANULE:
            raise MemoryError("no more")
        commit(offset, nbytes)

    monkeypatch.setattr(memory, "commit", limited)
    with pytest.raises(MemoryError, match="no more"):
        mapper.map_now([0, 1, 2])
    assert memory.committed == 0
    with pytest.raises(ValueError, match="segment 3 of 3"):
        mapper.map_now([0, 3])
    assert memory.committed == 0


def test_a_step_is_submitted_behind_the_zeroing_of_what_has_grown(mapper, memory, monkeypatch):
    nothing: Any = SimpleNamespace(spare_slot=8, max_model_len=64, tokens=None, logits=None)
    runner = Runner(nothing, nothing, nothing, nothing, ReferenceDevice())
    runner.memory = ElasticMemory(memory, mapper, 4)
    monkeypatch.setattr(runner, "_admit", lambda plan: memory.done.append("step"))
    monkeypatch.setattr(runner, "_replay_decode", lambda plan: lambda seconds: seconds)
    mapper.start([Grow(0)])
    hear(mapper, 1)
    plan: Any = None
    runner.launch(plan)
    runner.launch(plan)
    assert memory.done == [("commit", 0, GRANULE), "join", "step", "join", "step"]


def test_closing_leaves_the_rest_with_news(mapper, memory):
    mapper.map_now([2])
    memory.gate.clear()
    memory.entered.clear()
    mapper.start([Grow(0), Grow(1), Shrink(2)])
    assert memory.entered.wait(LONG)
    closing = threading.Thread(target=mapper.close)
    closing.start()
    left = hear(mapper, 2)
    memory.gate.set()
    closing.join()
    assert left == [Grown(1, ok=False, error="the engine is being closed"), Shrunk(2)]
    assert hear(mapper, 1) == [Grown(0)], "what was under way"
    mapper.start([Grow(1), Shrink(0)])
    assert [type(one) for one in hear(mapper, 2)] == [Grown, Shrunk]
    assert memory.committed == 2 * GRANULE, "the rest goes with the range"


def test_a_device_that_hangs_does_not_hold_up_the_end(mapper, memory, monkeypatch, caplog):
    memory.gate.clear()
    mapper.start([Grow(0)])
    assert memory.entered.wait(LONG)
    monkeypatch.setattr(order_thread, "CLOSE_S", 0.05)
    assert not mapper.close()
    assert "still being mapped" in caplog.text
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("block_bytes", "granularity", "wanted", "expected"),
    [
        (9 << 20, 2 << 20, 64 << 20, 6),  # two blocks are nine granules
        (7 << 19, 2 << 20, 64 << 20, 16),  # four blocks are seven granules
        (256, 4096, 1, 16),
        (256, 4096, 10_000, 32),
        (8192, 4096, 20_000, 2),
        (8192, 4096, 1, 1),
        (4097, 4096, 1 << 20, 4096),  # no power of two in it: large, but whole
    ],
)
def test_segments_of_whole_granules(block_bytes, granularity, wanted, expected):
    count = blocks_per_segment(block_bytes, granularity, wanted)
    assert count == expected
    assert count * block_bytes % granularity == 0


def test_blocks_that_do_not_fit_are_refused(memory):
    with pytest.raises(ValueError, match="11 blocks of 1024 bytes in 10240"):
        SegmentMapper(memory, 1024, 4, 11)
    with pytest.raises(ValueError, match="0 blocks"):
        SegmentMapper(memory, 1024, 4, 0)
    with pytest.raises(ValueError, match="segments of 3072 bytes, granules of 4096"):
        SegmentMapper(memory, 1024, 3, 10)
    one = SegmentMapper(memory, 1024, 11, 10)
    one.map_now([0])
    assert memory.done == [("commit", 0, 3 * GRANULE)]
    assert one.close()


# with memory that is really there


@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.gpu if n == "cuda" else ()) for n in DEVICES])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    device = open_device(request.param)
    device.prepare(threads=1)
    return device


@pytest.mark.parametrize("seed", range(3))
def test_blocks_hold_what_was_written_while_others_come_and_go(device, seed):
    rnd = random.Random(seed)
    granularity = device.reserve(1).granularity
    block_bytes = granularity * 3 // 4
    many = blocks_per_segment(block_bytes, granularity, 1)
    num_blocks = 6 * many - 1
    memory = device.reserve(num_blocks * block_bytes)
    blocks_NB = memory.tensor.view(num_blocks, block_bytes)
    mapper = SegmentMapper(memory, block_bytes, many, num_blocks)
    mapper.map_now([0])
    mapped, sizes = {0: 0}, {}
    for n in range(1, 60):
        segment = rnd.randrange(6)
        blocks = blocks_NB[segment * many : (segment + 1) * many]
        if segment in mapped:
            assert blocks.unique().tolist() == [mapped.pop(segment)]
            device.mark().wait()
            mapper.start([Shrink(segment)])
            assert hear(mapper, 1) == [Shrunk(segment)]
        else:
            mapper.start([Grow(segment)])
            assert hear(mapper, 1) == [Grown(segment)]
            memory.join()
            assert not blocks.any()
            blocks.fill_(n)
            mapped[segment] = n
        sizes[len(mapped)] = memory.committed
    assert sizes[max(sizes)] > sizes[min(sizes)]
    assert mapper.close()
    memory.close()


def test_a_mapper_over_a_range_made_for_inference():
    with torch.inference_mode():
        memory = ReferenceDevice().reserve(GRANULE)
        mapper = SegmentMapper(memory, GRANULE, 1, 1)
        mapper.start([Grow(0)])
        assert hear(mapper, 1) == [Grown(0)]
        assert mapper.close()
        memory.close()
