"""What passes between whoever decides which KV blocks lie in which tier and whoever moves their bytes: orders out, news
back.

Below the device's blocks lie the *host tier* and, optionally, the *disk tier*: arrays of equal *slots*, each of which
takes one block (all layers, keys and values). The scheduler's side alone decides which slot holds which name
(`xllm.kv.tiers`); the executor's side alone moves bytes and knows whether they are sound.

Orders are never refused, whatever fails is news. Every `Save` brings exactly one `Saved` and, where `disk_slot` is
given, exactly one `Written` after it. Every `Load` brings exactly one `Loaded`. Orders that name the same slot of a tier
take effect in the order they were given in, so that a `Load` may name a host slot that an order before it still fills;
if that order fails, the slot does not hold the name and the load says `bad`.

Until its `Saved` a device block keeps its content, until the last news of an order its slots are nobody else's.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Save:
    """Copy a device block into a host slot once every step submitted before this order has run; then, if `disk_slot` is
    given, write the host slot there. What is written to disk is checked first: damage in host memory must not become a
    sound record."""

    ticket: int
    name: bytes
    block: int
    host_slot: int
    disk_slot: int | None


@dataclass(frozen=True, slots=True)
class Source:
    """Where one block to load lies: in the host slot or, where `disk_slot` is given, there, to be read into the host
    slot first."""

    name: bytes
    host_slot: int
    disk_slot: int | None


@dataclass(frozen=True, slots=True)
class Load:
    """Blocks of one request, in the order of its tokens: source i goes into the device block blocks[i]."""

    ticket: int
    sources: Sequence[Source]
    blocks: Sequence[int]


@dataclass(frozen=True, slots=True)
class Saved:
    """The device block may be reused. `host`: the host slot holds it, though nobody has read it back."""

    ticket: int
    host: bool


@dataclass(frozen=True, slots=True)
class Written:
    """The half of a `Save` from host to disk has ended. `disk`: the disk slot holds the block."""

    ticket: int
    disk: bool


@dataclass(frozen=True, slots=True)
class Loaded:
    """Nothing of the load is under way any more. A source that is neither counted nor bad is one of which nothing is
    known: left out after a bad one before it, say, or not copied because the device failed."""

    ticket: int
    count: int  # so many from the front are in their device blocks, and in their host slots, and correct
    bad: Sequence[int]  # indices of sources found missing or damaged: another checksum or name, a read error
    seconds: float  # from the order to its end


Order = Save | Load
News = Saved | Written | Loaded


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier as it stands. All but `capacity` and `used` are counters of blocks that only grow."""

    medium: str  # the tier's name in KV events
    capacity: int  # slots
    used: int  # slots that are not free, those being filled included
    hits: int  # loaded from this tier to the device
    stored: int  # became findable here
    evicted: int  # given up for others
    failures: int  # on their way here and lost, or found missing or damaged when they were read
    skipped: int  # not stored because no slot could be had
