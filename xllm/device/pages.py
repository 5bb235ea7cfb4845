"""Pages that can lie in several places: one reserved range of addresses, and pieces of memory that are mapped into it.

The range is an array of *places* of `page_bytes` each. *Pages* are pieces of memory of that size, numbered from 0; a page
is mapped at no place, at one or at many. What is written through one place is read through every other of the same page.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch


class PageSpace(Protocol):
    """All calls may come from any thread; those that change something wait for each other. Each either does all it was
    asked for or, where it raises, nothing, but for what is said of `replace` and `bare_ok`.

    Who uses the range keeps its work away from bare places: to touch one ends the process on a CPU and loses a GPU.
    On a device where work runs in an order of its own, what one piece of work (a kernel, a copy) writes through one place
    is read through another by work that begins after it has ended. Within one piece of work, and by a kernel that was
    already launched when the writing one ended, it may be read old or new.
    """

    tensor: torch.Tensor  # uint8 [places * page_bytes]: all addresses, the same ones for good
    granularity: int  # bytes; `page_bytes` is a multiple of it
    # that the system keeps, where it has a limit: one each for pages whose neighbours are others
    most_mappings: int | None

    @property
    def created(self) -> int:
        """Bytes of memory that pages hold, mapped or not."""
        ...

    @property
    def mappings(self) -> int:
        """Places that are not bare."""
        ...

    def page_at(self, place: int) -> int | None:
        """None where the place is bare."""
        ...

    def create(self, first: int, count: int) -> None:
        """Memory for the pages `first` to `first + count - 1`. They are all zeros, at the latest when their first
        mapping returns. MemoryError, with a sentence for the user, where it is not to be had. ValueError where there is
        one already."""
        ...

    def destroy(self, first: int, count: int) -> None:
        """Give the memory of these pages back to the system. ValueError where one is mapped or does not exist."""
        ...

    def map(self, place: int, pages: Sequence[int], *, replace: bool = False) -> None:
        """The first of `pages` at `place`, the second at the next place, and so on: ready for any work that is submitted
        after. MemoryError where the system keeps no more mappings. ValueError where a place is not bare or a page does
        not exist.

        With `replace` places need not be bare: what lies there is unmapped before, under the condition of `unmap`, and
        stays unmapped where this raises."""
        ...

    def unmap(self, place: int, count: int = 1, *, bare_ok: bool = False) -> None:
        """`count` places are bare from now on, whatever was mapped there, and their pages keep what they hold. Nothing
        that was submitted may still touch the places: this does not wait. ValueError where one is bare already.
        MemoryError where the system cannot split what it has mapped as one.

        With `bare_ok` some may be bare. Where this raises then, some of the others may be too."""
        ...

    def clear(self) -> None:
        """Unmap everything, under the same condition."""
        ...

    def close(self) -> None:
        """Unmap everything and give all memory back, under the same condition. The addresses go with the last tensor over
        them. A second time does nothing; `create` and `map` are a ValueError from then on."""
        ...


class PageBooks:
    """The books of a space: which pages there are and where they lie. One change at a time.

    The contexts check, run their body, and write down what it has done once it has ended without an error. They are short:
    pages are mapped by a thread beside that of the steps, which can do nothing while Python runs here.
    """

    def __init__(self, page_bytes: int, pages: int, places: int, granularity: int):
        if page_bytes <= 0 or page_bytes % granularity:
            raise ValueError(f"pages of {page_bytes} bytes are not whole granules of {granularity}")
        if pages <= 0 or places <= 0:
            raise ValueError(f"{pages} pages in {places} places")
        self._page_bytes = page_bytes
        self._pages = pages
        self._places = places
        self.lock = threading.RLock()  # for changes that are one together
        self._page_at: dict[int, int] = {}  # by place
        self._mapped: dict[int, int] = {}  # by page that exists: places it is mapped at
        self._fresh: set[int] = set()  # pages never mapped since they were created
        self._closed = False

    @property
    def created(self) -> int:
        return len(self._mapped) * self._page_bytes

    @property
    def mappings(self) -> int:
        return len(self._page_at)

    def page_at(self, place: int) -> int | None:
        self._within(place, 1, self._places, "places")
        return self._page_at.get(place)

    def pages_at(self, places: Iterable[int]) -> list[int | None]:
        """None for those that are bare, or do not exist."""
        return list(map(self._page_at.get, places))

    def not_bare(self, place: int, count: int) -> list[tuple[int, int]]:
        """Of these places, as runs (first, count)."""
        places = self._within(place, count, self._places, "places")
        return list(runs(filter(self._page_at.__contains__, places)))

    @contextmanager
    def creating(self, first: int, count: int) -> Iterator[None]:
        with self.lock:
            self._open()
            pages = self._within(first, count, self._pages, "pages")
            if any(page in self._mapped for page in pages):
                raise ValueError(f"some of {count} pages from {first} on have memory already")
            yield
            self._mapped.update(dict.fromkeys(pages, 0))
            self._fresh.update(pages)

    @contextmanager
    def destroying(self, first: int, count: int) -> Iterator[None]:
        with self.lock:
            pages = self._existing(first, count)
            if any(self._mapped[page] for page in pages):
                raise ValueError(f"some of {count} pages from {first} on are mapped")
            yield
            for page in pages:
                del self._mapped[page]
            self._fresh.difference_update(pages)

    @contextmanager
    def mapping(self, place: int, pages: Sequence[int]) -> Iterator[set[int]]:
        """The body gets those of the pages that have never been mapped."""
        with self.lock:
            self._open()
            places = self._within(place, len(pages), self._places, "places")
            if not self._page_at.keys().isdisjoint(places):
                raise ValueError(f"some of {len(pages)} places from {place} on are not bare")
            if not all(map(self._mapped.__contains__, pages)):
                raise ValueError(f"some of {len(pages)} pages for place {place} on have no memory")
            yield self._fresh.intersection(pages)
            self._page_at.update(zip(places, pages, strict=True))
            for page in pages:
                self._mapped[page] += 1
            self._fresh.difference_update(pages)

    @contextmanager
    def unmapping(self, place: int, count: int) -> Iterator[None]:
        with self.lock:
            places = self._within(place, count, self._places, "places")
            if not all(map(self._page_at.__contains__, places)):
                raise ValueError(f"some of {count} places from {place} on are bare")
            yield
            for one in places:
                self._mapped[self._page_at.pop(one)] -= 1

    def mapped(self) -> list[tuple[int, int]]:
        """Places that are not bare, as runs (first, count)."""
        with self.lock:
            return list(runs(sorted(self._page_at)))

    def close(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Nothing more is created or mapped. -> places to unmap and then pages to destroy, as runs (first, count)."""
        with self.lock:
            self._closed = True
            return list(runs(sorted(self._page_at))), list(runs(sorted(self._mapped)))

    def _open(self) -> None:
        if self._closed:
            raise ValueError("the space is closed")

    def _existing(self, first: int, count: int) -> range:
        pages = self._within(first, count, self._pages, "pages")
        if any(page not in self._mapped for page in pages):
            raise ValueError(f"some of {count} pages from {first} on have no memory")
        return pages

    def _within(self, first: int, count: int, limit: int, what: str) -> range:
        if first < 0 or count <= 0 or first + count > limit:
            raise ValueError(f"{count} {what} from {first} on are not among {limit}")
        return range(first, first + count)


class BookedSpace(ABC):
    """What every space does alike, by its books."""

    _books: PageBooks

    @property
    def created(self) -> int:
        return self._books.created

    @property
    def mappings(self) -> int:
        return self._books.mappings

    def page_at(self, place: int) -> int | None:
        return self._books.page_at(place)

    @abstractmethod
    def unmap(self, place: int, count: int = 1, *, bare_ok: bool = False) -> None: ...

    @abstractmethod
    def destroy(self, first: int, count: int) -> None: ...

    def clear(self) -> None:
        for place, count in self._books.mapped():
            self.unmap(place, count)

    def close(self) -> None:
        places, pages = self._books.close()
        for place, count in places:
            self.unmap(place, count)
        for first, count in pages:
            self.destroy(first, count)


def runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of those that follow each other, one by one upwards."""
    first = end = -1
    for number in numbers:
        if number != end:
            if end > first:
                yield first, end - first
            first = number
        end = number + 1
    if end > first:
        yield first, end - first
