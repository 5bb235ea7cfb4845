"""What passes between whoever decides which KV blocks lie in which tier and whoever moves their bytes: orders out, news
back.

Below the device's blocks lie the *host tier* and, optionally, the *disk tier*: arrays of equal *slots*, each of which
takes one block (all layers, keys and values). The scheduler's side alone decides which slot holds which name
(`xllm.kv.tiers`); the executor's side alone moves bytes and knows whether they are sound. Beside the disk there may be a
*store* that other engines use as well. It has no slots and is spoken to in names alone; what it holds has to be asked.

Orders are never refused, whatever fails is news. Every `Save` brings exactly one `Saved` and, where `disk_slot` is
given, exactly one `Written` after it. Every `Load` brings exactly one `Loaded`, every `Send` one `Sent`, every `Look` one
`Seen`, a `Disown` nothing. Orders that name the same slot of a tier
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
class Send:
    """Send a host slot to the store, unless it is damaged. Others will believe what is there: of a block that steps have
    filled this is ordered once they are known to have ended well."""

    ticket: int
    name: bytes
    host_slot: int


@dataclass(frozen=True, slots=True)
class Source:
    """Where one block to load lies: in the host slot or, where `disk_slot` is given, there, or in the store if `stored`:
    to be brought into the host slot first."""

    name: bytes
    host_slot: int
    disk_slot: int | None
    stored: bool = False

    @property
    def fills_host(self) -> bool:
        return self.stored or self.disk_slot is not None


@dataclass(frozen=True, slots=True)
class Load:
    """Blocks of one request, in the order of its tokens: source i goes into the device block blocks[i]."""

    ticket: int
    sources: Sequence[Source]
    blocks: Sequence[int]


@dataclass(frozen=True, slots=True)
class Look:
    """Ask the store how many of `names` it has, counted from the front."""

    ticket: int
    names: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Disown:
    """What lies in the store under `names`, or under any name where that is None, is not to be trusted. Of some names it is
    taken out there, if that can be done. Of all: from here on this engine neither finds anything that was there, nor
    does anybody else find what it puts there."""

    names: Sequence[bytes] | None


@dataclass(frozen=True, slots=True)
class Saved:
    """The device block may be reused. `host`: the host slot holds it, though nobody has read it back."""

    ticket: int
    host: bool


@dataclass(frozen=True, slots=True)
class Written:
    """The half of a `Save` from host to disk has ended. `disk`: the disk slot holds the block; `behind`: it does not, because
    too many others were to be written."""

    ticket: int
    disk: bool
    behind: bool = False


@dataclass(frozen=True, slots=True)
class Sent:
    """`stored`: the store has the block."""

    ticket: int
    stored: bool


@dataclass(frozen=True, slots=True)
class Seen:
    """What the store answered. `pause` is 0, or the seconds in which it is not to be asked, since it did not answer."""

    ticket: int
    count: int
    seconds: float  # from the order to the answer
    pause: float = 0.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """Nothing of the load is under way any more. A source that is neither counted nor bad is one of which nothing is
    known: left out after a bad one before it, say, or not copied because the device failed."""

    ticket: int
    count: int  # so many from the front are in their device blocks, and in their host slots, and correct
    bad: Sequence[int]  # indices of sources found missing or damaged: another checksum or name, a read error
    seconds: float  # from the order, or from the end of the load from the same tiers before it, to its end


Order = Save | Load | Send | Look | Disown
News = Saved | Written | Sent | Loaded | Seen


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier as it stands. All but `capacity` and `used` are counters of blocks that only grow."""

    medium: str  # the tier's name, as in KV events
    capacity: int  # slots; 0 for a store, which does not say
    used: int  # slots that are not free, those being filled included; 0 for a store
    hits: int  # loaded from this tier to the device
    stored: int  # became findable here
    evicted: int  # given up for others
    failures: int  # on their way here and lost, or found missing or damaged when they were read
    skipped: int  # not stored because no slot could be had, or too many others were on their way
