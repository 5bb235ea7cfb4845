"""Memory that comes and goes under a KV pool: orders one way, news the other.

A *segment* is a run of whole blocks of the one virtual range that the pool lies in: segment `i` begins with block
`i * blocks_per_segment`, the last may be shorter. The scheduler's side decides which segments there are
(`xllm.kv.elastic`), the executor maps and unmaps them in the order of the orders. Blocks of a segment that is not
mapped do not exist for the pool.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Grow:
    """Map the segment. Brings exactly one `Grown`."""

    segment: int


@dataclass(frozen=True, slots=True)
class Shrink:
    """Unmap the segment: nobody owns a block of it and no step in flight touches one. Brings exactly one `Shrunk`."""

    segment: int


SegmentOrder = Grow | Shrink


@dataclass(frozen=True, slots=True)
class Grown:
    """The segment is mapped and its memory zero (behind the next `VirtualRange.join`), or, where not `ok`, there is no memory to be had for it (another
    process has it) and nothing is mapped. `error` is a sentence, empty where `ok`."""

    segment: int
    ok: bool = True
    error: str = ""


@dataclass(frozen=True, slots=True)
class Shrunk:
    """The segment's memory is given back."""

    segment: int


SegmentNews = Grown | Shrunk


@dataclass(frozen=True, slots=True)
class SegmentStats:
    """The segments of one pool as they stand. `grown`, `shrunk` and `refused` are counters that only grow."""

    capacity: int  # segments there could be
    mapped: int  # segments that have memory, those that are about to give it back included
    most: int  # of them, ever
    grown: int
    shrunk: int
    refused: int  # orders to grow for which there was no memory
