"""Pages lie in several places at once: the promises of a page space on every device, and of CUDA's over a stand-in for the
driver."""

import random
import threading
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.device.cuda_stand_in import GRANULE, stand_in
from tests.state_machines import explore
from xllm.device.pages import runs
from xllm.device.pages_cuda import CudaPages
from xllm.device.table import DEVICES, open_device

MIB = 1 << 20
ON_ALL = [pytest.param(n, marks=pytest.mark.gpu if n == "cuda" else ()) for n in DEVICES]


class Reserving:
    """Spaces on one device, each page two granules."""

    def __init__(self, reserve, granularity):
        self._reserve = reserve
        self.granularity = granularity
        self.page_bytes = 2 * granularity

    def __call__(self, pages, places):
        space = self._reserve(self.page_bytes, pages, places)
        assert space.granularity == self.granularity
        return space

    def at(self, space, place, count=1):
        return space.tensor[place * self.page_bytes : (place + count) * self.page_bytes]


def open_or_skip(name):
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    device = open_device(name)
    device.prepare(threads=1)
    return device


@pytest.fixture
def driver(monkeypatch):
    yield from stand_in(monkeypatch)


@pytest.fixture(params=[*ON_ALL, "stand-in"])
def spaces(request):
    if request.param == "stand-in":
        request.getfixturevalue("driver")
        device = torch.device("cuda", 0)
        return Reserving(lambda size, pages, places: CudaPages(size, pages, places, device), GRANULE)
    device = open_or_skip(request.param)
    return Reserving(device.reserve_pages, device.reserve(1).granularity)


def settle():
    """Nothing that was submitted touches anything any more."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# what every space promises


def test_what_is_written_through_one_place_is_read_through_every_other(spaces):
    space = spaces(3, 8)
    assert space.tensor.shape == (8 * spaces.page_bytes,)
    assert space.tensor.dtype == torch.uint8
    assert (space.created, space.mappings) == (0, 0)
    space.create(0, 3)
    assert space.created == 3 * spaces.page_bytes
    space.map(0, range(3))
    assert not spaces.at(space, 0, 3).any()
    for n in range(3):
        spaces.at(space, n).fill_(n + 1)
    for place, page in ((4, 2), (5, 0), (7, 0)):
        space.map(place, [page])
        assert space.page_at(place) == page
        assert spaces.at(space, place).unique().tolist() == [page + 1]
    assert space.mappings == 6
    spaces.at(space, 7)[5] = 99
    for place in (0, 5, 7):
        assert spaces.at(space, place).sum() == spaces.page_bytes + 98
    assert spaces.at(space, 4).unique().tolist() == [3]
    settle()
    space.close()


def test_contents_outlive_their_places(spaces):
    space = spaces(2, 4)
    address = space.tensor.data_ptr()
    space.create(0, 2)
    space.map(1, [1])
    spaces.at(space, 1).fill_(7)
    settle()
    space.unmap(1)
    assert (space.mappings, space.page_at(1)) == (0, None)
    assert space.created == 2 * spaces.page_bytes
    space.map(1, [0])
    assert not spaces.at(space, 1).any(), "another page, never mapped"
    spaces.at(space, 1).fill_(3)
    space.map(3, [1])
    assert spaces.at(space, 3).unique().tolist() == [7]
    assert spaces.at(space, 1).unique().tolist() == [3]
    assert space.tensor.data_ptr() == address
    settle()
    space.close()


def test_memory_that_comes_again_is_zero(spaces):
    space = spaces(4, 4)
    space.create(0, 4)
    space.map(0, range(4))
    spaces.at(space, 0, 4).fill_(9)
    settle()
    space.unmap(0, 4)
    space.destroy(1, 2)
    assert space.created == 2 * spaces.page_bytes
    space.create(1, 2)
    space.map(0, range(4))
    firsts = spaces.at(space, 0, 4).view(4, -1)[:, ::1000]
    assert [row.unique().tolist() for row in firsts] == [[9], [0], [0], [9]]
    settle()
    space.close()


def test_a_run_of_places_that_were_mapped_apart_is_unmapped_at_once(spaces):
    space = spaces(4, 6)
    space.create(0, 4)
    space.map(1, [3])
    space.map(2, range(2))
    space.map(4, [3])
    space.unmap(2, 2)
    assert [space.page_at(n) for n in range(6)] == [None, 3, None, None, 3, None]
    space.map(2, range(1, 3))
    space.unmap(1, 4)
    assert space.mappings == 0
    space.close()


def test_any_pages_side_by_side(spaces):
    space = spaces(4, 8)
    space.create(0, 4)
    space.map(1, [3, 0, 0, 2])
    assert [space.page_at(n) for n in range(6)] == [None, 3, 0, 0, 2, None]
    assert not spaces.at(space, 1, 4).any(), "never mapped before"
    for place, number in ((1, 5), (3, 6), (4, 7)):
        spaces.at(space, place).fill_(number)
    space.map(5, (2, 1, 3))
    firsts = spaces.at(space, 1, 7).view(7, -1)[:, ::1000]
    assert [row.unique().tolist() for row in firsts] == [[5], [6], [6], [7], [7], [0], [5]]
    settle()
    space.unmap(1, 7)
    assert space.mappings == 0
    space.close()


def test_pages_in_place_of_others(spaces):
    space = spaces(4, 8)
    space.create(0, 4)
    space.map(0, range(4))
    for n in range(4):
        spaces.at(space, n).fill_(n + 1)
    settle()
    space.unmap(0, 4)
    space.map(2, [0, 1])
    space.map(5, [3])
    settle()
    space.map(1, [3, 2, 2, 1, 0, 3], replace=True)
    assert [space.page_at(n) for n in range(8)] == [None, 3, 2, 2, 1, 0, 3, None]
    firsts = spaces.at(space, 1, 6).view(6, -1)[:, ::1000]
    assert [row.unique().tolist() for row in firsts] == [[4], [3], [3], [2], [1], [4]]
    settle()
    space.unmap(0, 3, bare_ok=True)
    space.unmap(0, 2, bare_ok=True)
    assert [space.page_at(n) for n in range(8)] == [None, None, None, 2, 1, 0, 3, None]
    space.unmap(3, 4)
    space.destroy(0, 4)
    space.close()
    with pytest.raises(ValueError, match="closed"):
        space.map(0, [0], replace=True)


def test_what_was_to_be_replaced_is_gone_where_nothing_can_come(spaces):
    space = spaces(3, 4)
    space.create(0, 2)
    space.map(1, [1, 0])
    with pytest.raises(ValueError, match="have no memory"):
        space.map(0, [0, 2], replace=True)
    assert [space.page_at(n) for n in range(4)] == [None, None, 0, None]
    for first, pages in ((-1, [0]), (3, [0, 1]), (1, [])):
        with pytest.raises(ValueError, match="not among 4"):
            space.map(first, pages, replace=True)
    for first, count in ((-1, 1), (3, 2), (0, 0)):
        with pytest.raises(ValueError, match="not among 4"):
            space.unmap(first, count, bare_ok=True)
    assert space.mappings == 1
    space.close()


def test_misuse_is_refused_and_changes_nothing(spaces):
    space = spaces(4, 8)
    space.create(1, 2)
    space.map(2, range(1, 3))
    for first, count in ((1, 1), (0, 2), (2, 2)):
        with pytest.raises(ValueError, match="have memory already"):
            space.create(first, count)
    for first, count in ((1, 1), (1, 2)):
        with pytest.raises(ValueError, match="are mapped"):
            space.destroy(first, count)
    for first, count in ((0, 1), (2, 2)):
        with pytest.raises(ValueError, match="have no memory"):
            space.destroy(first, count)
    for place, page, count in ((2, 1, 1), (1, 1, 2), (3, 2, 1)):
        with pytest.raises(ValueError, match="not bare"):
            space.map(place, range(page, page + count))
    for place, page, count in ((5, 0, 2), (5, 2, 2), (0, 3, 1)):
        with pytest.raises(ValueError, match="have no memory"):
            space.map(place, range(page, page + count))
    for place, count in ((1, 2), (3, 2), (7, 1)):
        with pytest.raises(ValueError, match="are bare"):
            space.unmap(place, count)
    for first, count in ((-1, 1), (0, 0), (0, -1), (4, 1), (3, 2)):
        with pytest.raises(ValueError, match=r"pages from .* are not among 4"):
            space.create(first, count)
        with pytest.raises(ValueError, match=r"pages from .* are not among 4"):
            space.destroy(first, count)
    for first, count in ((-1, 1), (0, 0), (8, 1), (7, 2)):
        with pytest.raises(ValueError, match=r"places from .* are not among 8"):
            space.map(first, range(1, 1 + count))
        with pytest.raises(ValueError, match=r"places from .* are not among 8"):
            space.unmap(first, count)
    with pytest.raises(ValueError, match="not among 8"):
        space.page_at(8)
    assert (space.created, space.mappings) == (2 * spaces.page_bytes, 2)
    space.close()


def test_closing(spaces):
    space = spaces(4, 8)
    space.create(0, 1)
    space.create(2, 2)
    space.map(0, range(2, 4))
    space.map(7, [0])
    space.close()
    space.close()
    assert (space.created, space.mappings) == (0, 0)
    with pytest.raises(ValueError, match="closed"):
        space.create(0, 1)
    with pytest.raises(ValueError, match="closed"):
        space.map(0, [0])


def test_sizes_that_cannot_be(spaces):
    for page_bytes in (0, -spaces.granularity, spaces.granularity // 2, spaces.granularity + 512):
        with pytest.raises(ValueError, match="not whole granules"):
            spaces._reserve(page_bytes, 1, 1)
    for pages, places in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match=f"{pages} pages in {places} places"):
            spaces(pages, places)


def test_a_space_made_in_inference_mode_is_used_outside_of_it(spaces):
    with torch.inference_mode():
        space = spaces(1, 2)
    space.create(0, 1)
    space.map(1, [0])
    assert not spaces.at(space, 1).any()
    settle()
    space.close()


def test_many_threads_at_once(spaces):
    space = spaces(8, 32)
    space.create(0, 8)
    space.map(0, range(8))
    errors: list[BaseException] = []

    @torch.inference_mode()
    def use(thread):
        rnd = random.Random(thread)
        mine = (2 * thread, 2 * thread + 1)
        try:
            for n in range(30):
                page, place = rnd.choice(mine), 8 + 6 * thread + rnd.randrange(6)
                spaces.at(space, page).fill_(n)
                space.map(place, [page])
                assert spaces.at(space, place).unique().tolist() == [n]
                settle()
                space.unmap(place)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=use, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert space.mappings == 8
    space.close()


PAGES, PLACES = 5, 9
some_pages = st.one_of(
    st.lists(st.integers(0, PAGES - 1), max_size=5),
    st.builds(lambda first, count: range(first, first + count), st.integers(-1, PAGES), st.integers(0, 4)),
)


def model_of(spaces):
    """Every call of a space beside its meaning: one array of bytes for each page, one number for each place."""

    class Model(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.space = spaces(PAGES, PLACES)
            self.bytes: dict[int, torch.Tensor] = {}
            self.at: dict[int, int] = {}

        def teardown(self):
            settle()
            self.space.close()

        def either(self, good, call, *arguments, **more):
            if good:
                call(*arguments, **more)
            else:
                with pytest.raises(ValueError):
                    call(*arguments, **more)
            return good

        @rule(first=st.integers(-1, PAGES), count=st.integers(0, PAGES))
        def create(self, first, count):
            pages = range(first, first + count)
            good = count > 0 and all(0 <= p < PAGES and p not in self.bytes for p in pages)
            if self.either(good, self.space.create, first, count):
                self.bytes.update((p, torch.zeros_like(spaces.at(self.space, 0))) for p in pages)

        @rule(first=st.integers(-1, PAGES), count=st.integers(0, 2))
        def destroy(self, first, count):
            pages = range(first, first + count)
            good = count > 0 and all(p in self.bytes and p not in self.at.values() for p in pages)
            if self.either(good, self.space.destroy, first, count):
                for page in pages:
                    del self.bytes[page]

        @rule(place=st.integers(-1, PLACES), pages=some_pages, replace=st.booleans())
        def map(self, place, pages, replace):
            places = range(place, place + len(pages))
            there = bool(pages) and all(0 <= p < PLACES for p in places)
            good = there and (replace or not any(p in self.at for p in places))
            good = good and all(p in self.bytes for p in pages)
            settle()
            if replace and there:
                for one in places:
                    self.at.pop(one, None)
            if self.either(good, self.space.map, place, pages, replace=replace):
                self.at.update(zip(places, pages, strict=True))

        @precondition(lambda self: self.bytes and len(self.at) < PLACES)
        @rule(data=st.data())
        def map_one(self, data):
            place = data.draw(st.sampled_from([n for n in range(PLACES) if n not in self.at]))
            self.map(place, [data.draw(st.sampled_from(sorted(self.bytes)))], False)

        @rule(place=st.integers(-1, PLACES), count=st.integers(0, 3), bare_ok=st.booleans())
        def unmap(self, place, count, bare_ok):
            places = range(place, place + count)
            good = count > 0 and all(0 <= p < PLACES and (bare_ok or p in self.at) for p in places)
            settle()
            if self.either(good, self.space.unmap, place, count, bare_ok=bare_ok):
                for one in places:
                    self.at.pop(one, None)

        @precondition(lambda self: self.at)
        @rule(data=st.data(), value=st.integers(0, 255), offset=st.floats(0, 1), size=st.floats(0, 1))
        def write(self, data, value, offset, size):
            place = data.draw(st.sampled_from(sorted(self.at)))
            first = int(offset * spaces.page_bytes)
            part = slice(first, first + int(size * spaces.page_bytes))
            spaces.at(self.space, place)[part] = value
            self.bytes[self.at[place]][part] = value

        @invariant()
        def all_is_as_it_should_be(self):
            assert self.space.created == len(self.bytes) * spaces.page_bytes
            assert self.space.mappings == len(self.at)
            for place in range(PLACES):
                assert self.space.page_at(place) == self.at.get(place)
                if place in self.at:
                    assert torch.equal(spaces.at(self.space, place), self.bytes[self.at[place]])

    return Model


def test_any_calls_in_any_order(spaces):
    explore(model_of(spaces), 10 if spaces.granularity > MIB else 60)


@given(st.lists(st.integers(0, 9)))
def test_neighbours(numbers):
    found = list(runs(numbers))
    assert [n for first, count in found for n in range(first, first + count)] == numbers
    assert all(count > 0 for _, count in found)
    assert all(a + count != b for (a, count), (b, _) in pairwise(found))
