"""Pages lie where they were ordered to, each order has its news, and no error ends the thread."""

import threading

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.state_machines import explore
from xllm.core.places import Clear, Cleared, Place, Placed
from xllm.device.pages import PageBooks
from xllm.device.table import DEVICES, open_device
from xllm.executor import order_thread
from xllm.executor import places as places_module
from xllm.executor.places import PageMapper

LONG = 30.0  # seconds; only a failing test waits that long
PAGES, PLACES = 4, 12


class Space:
    """Pages without memory that do as they are told."""

    granularity = 1

    def __init__(self):
        self.tensor = torch.zeros(PLACES, dtype=torch.uint8)
        self.books = PageBooks(1, PAGES, PLACES, 1)
        self.done: list[tuple] = []
        self.errors: dict[str, Exception] = {}
        self.most = PLACES  # mappings
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()

    created = property(lambda self: self.books.created)
    mappings = property(lambda self: self.books.mappings)

    def page_at(self, place):
        return self.books.page_at(place)

    def create(self, first, count):
        with self.books.creating(first, count):
            pass

    def destroy(self, first, count):
        with self.books.destroying(first, count):
            pass

    def map(self, place, pages, *, replace=False):
        if replace:
            self.unmap(place, len(pages), bare_ok=True)
        with self.books.mapping(place, pages):
            if self.mappings + len(pages) > self.most:
                raise MemoryError("no more mappings")
            self._do("map", place, *pages)

    def unmap(self, place, count=1, *, bare_ok=False):
        for first, many in self.books.not_bare(place, count) if bare_ok else [(place, count)]:
            with self.books.unmapping(first, many):
                self._do("unmap", first, many)

    def close(self):
        pass

    def _do(self, what, *numbers):
        self.entered.set()
        assert self.gate.wait(LONG)
        if what in self.errors:
            raise self.errors[what]
        self.done.append((what, *numbers))


def hear(mapper, count):
    news: list = []
    while len(news) < count:
        assert mapper.wait(LONG), f"{news}, and no more"
        news += mapper.news()
    assert len(news) == count
    return news


@pytest.fixture
def space():
    space = Space()
    space.create(0, PAGES)
    return space


@pytest.fixture
def mapper(space):
    mapper = PageMapper(space)
    yield mapper
    space.gate.set()
    assert mapper.close()
    assert not mapper._thread.is_alive()


def warnings(caplog):
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


def test_orders_in_turn_and_their_news(mapper, space):
    mapper.start([Place(5, 1), Place(9, 1), Clear(5)])
    mapper.start([Place(5, 3)])
    assert hear(mapper, 4) == [Placed(5), Placed(9), Cleared(5), Placed(5)]
    assert space.done == [("map", 5, 1), ("map", 9, 1), ("unmap", 5, 1), ("map", 5, 3)]
    assert mapper.news() == []
    assert mapper.calls == 4
    assert 0 < mapper.seconds < LONG


def test_neighbours_in_one_call(mapper, space):
    mapper.start([Place(4, 3), Place(5, 1), Place(6, 2), Place(7, 2), Place(8, 0), Place(10, 1), Place(3, 0)])
    assert hear(mapper, 7) == [Placed(n) for n in (4, 5, 6, 7, 8, 10, 3)]
    assert space.done == [("map", 4, 3, 1, 2, 2, 0), ("map", 10, 1), ("map", 3, 0)], "whatever their pages"
    assert mapper.calls == 3
    space.done.clear()
    mapper.start([*map(Clear, range(3, 9)), Clear(10), Place(11, 1)])
    assert hear(mapper, 8) == [*(Cleared(n) for n in (3, 4, 5, 6, 7, 8, 10)), Placed(11)]
    assert space.done == [("unmap", 3, 6), ("unmap", 10, 1), ("map", 11, 1)]


def test_not_too_many_in_one_call(mapper, space, monkeypatch):
    monkeypatch.setattr(places_module, "MOST_AT_ONCE", 2)
    mapper.start([Place(4, 0), Place(5, 1), Place(6, 2)])
    hear(mapper, 3)
    assert space.done == [("map", 4, 0, 1), ("map", 6, 2)]


def test_what_lay_there_is_taken_away(mapper, space):
    space.map(5, [3])
    space.map(6, [0])
    space.map(8, [1])
    space.done.clear()
    mapper.start([Place(n, 8 - n) for n in range(5, 9)])
    assert hear(mapper, 4) == [Placed(n) for n in range(5, 9)]
    assert space.done == [("unmap", 5, 2), ("unmap", 8, 1), ("map", 5, 3, 2, 1, 0)]
    assert [space.page_at(n) for n in range(4, 10)] == [None, 3, 2, 1, 0, None]


def test_what_is_bare_stays_so(mapper, space):
    mapper.start([Clear(1), Clear(2)])
    assert hear(mapper, 2) == [Cleared(1), Cleared(2)]
    assert space.done == []
    space.map(1, [1])
    mapper.start([Clear(0), Clear(1), Clear(2)])
    assert hear(mapper, 3) == [Cleared(n) for n in range(3)]
    assert space.mappings == 0


def test_ordering_waits_for_nothing(mapper, space):
    space.gate.clear()
    mapper.start([Place(0, 0)])
    assert space.entered.wait(LONG)
    mapper.start([Place(1, 0)])
    assert not mapper.wait(0.05)
    assert mapper.news() == []
    space.gate.set()
    assert hear(mapper, 2) == [Placed(0), Placed(1)]


def test_no_more_mappings_is_news(mapper, space, caplog):
    space.most = 2
    mapper.start([Place(n, n - 4) for n in range(4, 8)])
    refused = [Placed(n, ok=False, error="no more mappings") for n in (6, 7)]
    assert hear(mapper, 4) == [Placed(4), Placed(5), *refused]
    assert space.mappings == 2, "as many as can be"
    mapper.start([Place(5, 3), Clear(4), Place(9, 0)])
    assert hear(mapper, 3) == [Placed(5), Cleared(4), Placed(9)]
    assert not warnings(caplog), "nothing is wrong"


def test_no_error_ends_the_thread(mapper, space, caplog):
    space.destroy(3, 1)
    space.errors["map"] = RuntimeError("CUDA error: cuMemMap answers CUDA_ERROR_UNKNOWN")
    mapper.start([Place(4, 0), Place(5, 1), Clear(4)])
    news = hear(mapper, 3)
    assert [one.ok for one in news[:2]] == [False, False]
    assert "CUDA_ERROR_UNKNOWN" in news[0].error
    assert len(warnings(caplog)) == 1
    space.errors["map"] = RuntimeError()
    mapper.start([Place(4, 0)])
    assert hear(mapper, 1) == [Placed(4, ok=False, error="RuntimeError")]
    space.errors.clear()
    mapper.start([Place(4, 3), Place(PLACES, 0), Place(-1, 0), Place(6, PAGES), Clear(PLACES), Place(4, 2)])
    news = hear(mapper, 6)
    assert [isinstance(one, Cleared) or one.ok for one in news] == [False, False, False, False, True, True]
    assert "have no memory" in news[0].error and "not among 12" in news[1].error
    assert [space.page_at(n) for n in range(PLACES)] == [2 if n == 4 else None for n in range(PLACES)]


def test_what_is_not_taken_away(mapper, space, caplog):
    space.map(4, [0])
    space.errors["unmap"] = MemoryError("cannot split")
    mapper.start([Clear(4), Place(4, 1), Place(5, 1)])
    assert hear(mapper, 3) == [Cleared(4), Placed(4, ok=False, error="cannot split"), Placed(5)]
    assert space.page_at(4) == 0
    assert warnings(caplog) == ["a page of the KV pool could not be unmapped: cannot split"]
    space.errors.clear()
    mapper.start([Place(4, 1)])
    assert hear(mapper, 1) == [Placed(4)]
    assert space.page_at(4) == 1


def test_closing_leaves_the_rest_with_news(mapper, space):
    space.gate.clear()
    mapper.start([Place(0, 0), Place(1, 1), Place(4, 0), Clear(0)])
    assert space.entered.wait(LONG)
    closing = threading.Thread(target=mapper.close)
    closing.start()
    left = hear(mapper, 2)
    space.gate.set()
    closing.join()
    assert left == [Placed(4, ok=False, error="the engine is being closed"), Cleared(0)]
    assert hear(mapper, 2) == [Placed(0), Placed(1)], "what was under way"
    mapper.start([Place(7, 0), Clear(1)])
    assert [type(one) for one in hear(mapper, 2)] == [Placed, Cleared]
    assert space.mappings == 2, "the rest goes with the space"


def test_a_device_that_hangs_does_not_hold_up_the_end(mapper, space, monkeypatch, caplog):
    space.gate.clear()
    mapper.start([Place(0, 0)])
    assert space.entered.wait(LONG)
    monkeypatch.setattr(order_thread, "CLOSE_S", 0.05)
    assert not mapper.close()
    assert "still being mapped" in caplog.text
    monkeypatch.undo()


# with memory that is really there


@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.gpu if n == "cuda" else ()) for n in DEVICES])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    device = open_device(request.param)
    device.prepare(threads=1)
    return device


order = st.one_of(
    st.builds(Place, st.integers(PAGES, PLACES), st.integers(0, PAGES)),
    st.builds(Clear, st.integers(PAGES, PLACES - 1)),
)
run = st.builds(
    lambda place, page, count: [Place(place + n, page + n) for n in range(count)],
    st.integers(PAGES, PLACES - 3), st.integers(0, PAGES - 1), st.integers(1, 3),
)  # fmt: skip


def orders_on(device):
    """Orders of requests beside their meaning. Page `i` lies at place `i` for good, the places behind are to be had."""
    page_bytes = device.reserve(1).granularity

    class Model(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.space = device.reserve_pages(page_bytes, PAGES, PLACES)
            self.space.create(0, PAGES)
            self.space.map(0, range(PAGES))
            self.rows_NE = self.space.tensor.view(PLACES, page_bytes)
            self.mapper = PageMapper(self.space)
            self.numbers = [0] * PAGES  # what each page is full of
            self.at: dict[int, int] = {n: n for n in range(PAGES)}
            self.writes = 0

        def teardown(self):
            assert self.mapper.close()
            device.mark().wait()
            self.space.close()

        @rule(orders=st.one_of(st.lists(order, max_size=6), run))
        def carry_out(self, orders):
            device.mark().wait()
            self.mapper.start(orders)
            for one, news in zip(orders, hear(self.mapper, len(orders)), strict=True):
                assert one.place == news.place
                if isinstance(one, Place) and one.place < PLACES and one.page < PAGES:
                    assert news == Placed(one.place)
                    self.at[one.place] = one.page
                else:
                    assert news == Cleared(one.place) or not news.ok
                    self.at.pop(one.place, None)

        @rule(data=st.data())
        def write(self, data):
            self.writes += 1  # fewer than a byte holds
            place = data.draw(st.sampled_from(sorted(self.at)))
            self.rows_NE[place].fill_(self.writes)
            self.numbers[self.at[place]] = self.writes

        @invariant()
        def all_is_as_it_should_be(self):
            assert self.space.mappings == len(self.at)
            for place in range(PLACES):
                assert self.space.page_at(place) == self.at.get(place)
                if place in self.at:
                    low, high = self.rows_NE[place].aminmax()
                    assert low == high == self.numbers[self.at[place]]

    return Model


def test_requests_read_what_was_written_through_any_place(device):
    explore(orders_on(device), 30)


@pytest.mark.gpu
def test_a_page_is_placed_in_order_of_the_work(device):
    """A step writes at one place; news of another place of the page comes; the next step reads there."""
    if device.torch_device.type != "cuda":
        pytest.skip("needs an NVIDIA GPU")
    page_bytes = device.reserve(1).granularity
    space = device.reserve_pages(page_bytes, 2, 64)
    space.create(0, 2)
    space.map(0, range(2))
    mapper = PageMapper(space)
    rows_NE = space.tensor.view(torch.float32).view(64, -1)
    seen = torch.zeros(60, 2, device=device.torch_device)
    for n in range(60):
        rows_NE[n % 2] = n
        mapper.start([Place(2 + n, n % 2)])
        assert hear(mapper, 1) == [Placed(2 + n)]
        seen[n] = torch.stack(rows_NE[2 + n].aminmax())
    assert seen.tolist() == [[n, n] for n in range(60)]
    torch.cuda.synchronize()
    assert mapper.close()
    space.close()
