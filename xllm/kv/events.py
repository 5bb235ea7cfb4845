"""What changed in the prefix cache, in order, for whoever keeps a copy of its index elsewhere.

A copy that starts empty and applies every event in order holds the same names as the index at each moment. Names are
the 16 bytes of `xllm.kv.hashing`. Events are recorded where names come and go (`PrefixIndex`), and only where somebody
wants them. Not thread-safe: the log belongs to the scheduler's thread; what `drain` returned is the caller's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Words of the format routers know: the tier that the model computes from, whatever the hardware is, and host memory.
DEVICE = "GPU"
HOST = "CPU"
DISK = "DISK"


class Origin(NamedTuple):
    """Where a block's name comes from."""

    parent: bytes | None  # name of the block before it; None for the first of a sequence
    token_ids: Sequence[int]  # of this block alone
    salt: str = ""  # of the sequence, told with its first block


@dataclass(slots=True)
class Stored:
    """Blocks of one sequence, each the parent of the next, can be found from now on."""

    names: list[bytes]
    parent: bytes | None  # of the first of them
    token_ids: list[int]  # of all of them, in order
    salt: str
    medium: str


@dataclass(slots=True)
class Removed:
    """Blocks that cannot be found any more."""

    names: list[bytes]
    medium: str


@dataclass(slots=True)
class Cleared:
    """No block of any tier can be found any more."""


Event = Stored | Removed | Cleared


class EventLog:
    """Collects events until they are drained. Neighbours that say one thing become one event: a prompt's blocks are one
    `Stored`, the victims of one allocation one `Removed`."""

    __slots__ = ("_events",)

    def __init__(self) -> None:
        self._events: list[Event] = []

    def stored(self, name: bytes, origin: Origin, medium: str) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(last, Stored) and last.names[-1] == origin.parent and last.medium == medium:
            last.names.append(name)
            last.token_ids += origin.token_ids
            return
        self._events.append(Stored([name], origin.parent, list(origin.token_ids), origin.salt, medium))

    def removed(self, name: bytes, medium: str) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(last, Removed) and last.medium == medium:
            last.names.append(name)
            return
        self._events.append(Removed([name], medium))

    def cleared(self) -> None:
        self._events.append(Cleared())

    def drain(self) -> list[Event]:
        """Everything since the last time, oldest first."""
        events, self._events = self._events, []
        return events
