"""Pages of a KV pool that are mapped where requests want them: orders one way, news the other.

The pool's memory is *pages*, each of which holds one KV block. The addresses that kernels see are *places*, each as large
as a page; a request's places are neighbours, and a page may lie in many places at once. The scheduler's side decides
what lies where, the executor maps it. Orders take effect in the order they were given in and are never refused, whatever
fails is news.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """Map the page at the place, taking away what lies there: no step in flight touches the place. The page has memory,
    and keeps it until it is mapped nowhere. Brings exactly one `Placed`."""

    place: int
    page: int


@dataclass(frozen=True, slots=True)
class Clear:
    """Leave the place bare, as it may be already: no step in flight touches it. Brings exactly one `Cleared`."""

    place: int


PlaceOrder = Place | Clear


@dataclass(frozen=True, slots=True)
class Placed:
    """The page lies at the place. Where not `ok` it does not: the place is bare, or what lay there could not be taken
    away. `error` is a sentence, empty where `ok`."""

    place: int
    ok: bool = True
    error: str = ""


@dataclass(frozen=True, slots=True)
class Cleared:
    """Nothing lies at the place any more. Where the device could not take it away it still does, and its page cannot be
    given back; the next `Place` tries again."""

    place: int


PlaceNews = Placed | Cleared


@dataclass(frozen=True, slots=True)
class PlaceStats:
    """The places of one pool as they stand. All but `places` are counters that only grow."""

    places: int  # where a page lies that a request sees or saw there
    mapped: int
    cleared: int
    refused: int  # orders to map that could not be carried out
    waited: int  # steps that stood still until a page was mapped
    waited_decoding: int  # of these, the ones that brought nobody new
    waited_s: float
    seconds: float  # spent mapping and unmapping, beside the steps
