"""Which block lies in which slot of one tier below the device, and which of them to give up first.

Every slot is in exactly one state:

    free       the next to be handed out
    filling    bytes are on their way into it; nobody finds it before `ready`
    ready      holds the block of its name: found, and evicted least recently used first unless it is pinned
    leaving    nameless, but pinned or still being filled: free as soon as it is neither

A name is taken away at once, a slot never while somebody's bytes go through it. That is why whoever fills or reads a
slot may go on speaking of its number, and only has to look whether the name is still there. Not thread-safe: it belongs
to the scheduler's thread.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator

from xllm.core.transfer import TierStats
from xllm.kv.events import EventLog, Origin


class SlotIndex:
    """A two-way map of names and `capacity` slots. Every operation but `clear` and `audit` is O(1).

    With `events`, blocks of known origin are told there when they become ready and when their names go, as being in
    `medium`. Misuse of a slot (pinning a free one, say) is a `ValueError` with nothing done.
    """

    def __init__(self, capacity: int, medium: str, events: EventLog | None = None):
        if capacity < 1:
            raise ValueError(f"a tier needs slots, not {capacity}")
        self.capacity = capacity
        self.medium = medium
        self._events = events
        self._free = dict.fromkeys(
            range(capacity - 1, -1, -1)
        )  # a stack any entry can leave: slot 0 is on top
        self._slot_of: dict[bytes, int] = {}
        self._name_of: list[bytes | None] = [None] * capacity
        self._filling: dict[int, Origin | None] = {}  # leaving ones included
        self._pins = [0] * capacity
        self._unused: OrderedDict[int, None] = (
            OrderedDict()
        )  # ready and not pinned, least recently used first
        self._told: set[int] = set()  # slots whose name the events know
        self._distrusted: dict[int, None] = {}  # slots since the last `distrusted`

        # statistics, ever growing
        self.stored = 0
        self.evicted = 0
        self.skipped = 0  # reservations that found no slot, and blocks for which there was no time
        self.hits = 0  # counted by who loads
        self.failures = 0  # likewise

    @property
    def used(self) -> int:
        """Slots that are not free."""
        return self.capacity - len(self._free)

    @property
    def stats(self) -> TierStats:
        return TierStats(
            medium=self.medium,
            capacity=self.capacity,
            used=self.used,
            hits=self.hits,
            stored=self.stored,
            evicted=self.evicted,
            failures=self.failures,
            skipped=self.skipped,
        )

    # looking

    def find(self, name: bytes) -> int | None:
        """The slot that is ready under `name`."""
        slot = self._slot_of.get(name)
        return None if slot in self._filling else slot

    def slot_of(self, name: bytes) -> int | None:
        """The slot that has `name`, ready or being filled."""
        return self._slot_of.get(name)

    def name_of(self, slot: int) -> bytes | None:
        """None where the slot is free or leaving."""
        return self._name_of[slot]

    def told(self) -> Iterator[bytes]:
        """Names that the events have told of and that can be found. What an earlier run has left is not among them: its
        tokens are unknown, so events cannot tell."""
        return (name for slot in self._told if (name := self._name_of[slot]) is not None)

    def is_filling(self, slot: int) -> bool:
        return slot in self._filling

    # filling

    def reserve(self, name: bytes, origin: Origin | None = None) -> int | None:
        """A slot to fill with the block of `name`: a free one, or that of the least recently used block, which is
        evicted. None where all are pinned, filling or leaving. `ValueError` where a slot has the name already."""
        if name in self._slot_of:
            raise ValueError(f"slot {self._slot_of[name]} of {self.medium} has this name already")
        if self._free:
            slot, _ = self._free.popitem()
        elif self._unused:
            slot, _ = self._unused.popitem(last=False)
            self._unname(slot)
            self.evicted += 1
        else:
            self.skipped += 1
            return None
        self._slot_of[name] = slot
        self._name_of[slot] = name
        self._filling[slot] = origin
        return slot

    def ready(self, slot: int) -> bool:
        """What was to come into a filling slot is there. False where its name has been forgotten meanwhile."""
        origin = self._end_filling(slot)
        name = self._name_of[slot]
        if name is not None:
            self.stored += 1
            self._tell(slot, name, origin)
        else:
            self._distrusted[slot] = None
        self._settle(slot)
        return name is not None

    def cancel(self, slot: int) -> None:
        """What was to come into a filling slot does not."""
        self._end_filling(slot)
        self._unname(slot)
        self._distrusted[slot] = None
        self._settle(slot)

    def adopt(self, slot: int, name: bytes, origin: Origin | None = None) -> bool:
        """A free slot turns out to hold the block of `name`. False, and nothing done, where another has the name."""
        if slot not in self._free:
            raise ValueError(f"slot {slot} of {self.medium} is not free to be adopted")
        if name in self._slot_of:
            self._distrusted[slot] = None
            return False
        del self._free[slot]
        self._slot_of[name] = slot
        self._name_of[slot] = name
        self._unused[slot] = None
        self._tell(slot, name, origin)
        return True

    # using

    def touch(self, slot: int) -> None:
        """The block was asked for: of all that are ready it is to be evicted last."""
        if slot in self._unused:
            self._unused.move_to_end(slot)

    def pin(self, slot: int) -> None:
        """One more user of the slot: it is neither evicted nor handed out before `unpin`. It may still be filling."""
        if slot in self._free:
            raise ValueError(f"slot {slot} of {self.medium} is free: there is nothing in it to pin")
        self._pins[slot] += 1
        self._unused.pop(slot, None)

    def unpin(self, slot: int) -> None:
        """One user less. After the last one the block is the most recently used."""
        if self._pins[slot] == 0:
            raise ValueError(f"slot {slot} of {self.medium} is not pinned")
        self._pins[slot] -= 1
        self._settle(slot)

    # forgetting

    def forget(self, name: bytes) -> None:
        """Nobody finds `name` from now on. Nothing to do where no slot has it."""
        slot = self._slot_of.get(name)
        if slot is not None:
            self.drop(slot)

    def drop(self, slot: int) -> None:
        """Forget the name of a slot. Nothing to do where it has none."""
        if self._name_of[slot] is not None:
            self._unname(slot)
            self._settle(slot)
            self._distrusted[slot] = None

    def clear(self) -> None:
        """Forget every name."""
        for slot in list(self._slot_of.values()):
            self.drop(slot)

    def distrusted(self) -> list[int]:
        """Slots that may hold what nobody may find, though its name stands by it: forgotten, given up, or of a name
        that another slot has. Where contents outlive the process these are to be invalidated. Each is returned once,
        unless it happens again."""
        slots, self._distrusted = list(self._distrusted), {}
        return slots

    # between states

    def _end_filling(self, slot: int) -> Origin | None:
        if slot not in self._filling:
            raise ValueError(f"slot {slot} of {self.medium} is not being filled")
        return self._filling.pop(slot)

    def _tell(self, slot: int, name: bytes, origin: Origin | None) -> None:
        if self._events is not None and origin is not None:
            self._events.stored(name, origin, self.medium)
            self._told.add(slot)

    def _unname(self, slot: int) -> None:
        name = self._name_of[slot]
        if name is None:
            return
        del self._slot_of[name]
        self._name_of[slot] = None
        if self._events is not None and slot in self._told:
            self._told.remove(slot)
            self._events.removed(name, self.medium)

    def _settle(self, slot: int) -> None:
        """Put a slot that nobody uses where its name, or the lack of one, belongs."""
        if self._pins[slot] or slot in self._filling:
            return
        if self._name_of[slot] is not None:
            self._unused[slot] = None
        else:
            self._unused.pop(slot, None)
            self._free[slot] = None

    # integrity

    def audit(self, filling: Iterable[int] = (), pinned: Iterable[int] = ()) -> None:
        """Raise `AssertionError` with a sentence on any inconsistency. `filling` are the slots that somebody fills,
        `pinned` those that somebody uses, once for each user. O(capacity)."""
        if sorted(filling) != sorted(self._filling):
            raise AssertionError(f"{self.medium}: slots {sorted(self._filling)} count as being filled")
        pins = Counter(pinned)
        named = {name: slot for slot, name in enumerate(self._name_of) if name is not None}
        if named != self._slot_of or len(named) != self.capacity - self._name_of.count(None):
            raise AssertionError(f"{self.medium}: names and slots are not a two-way map")
        for slot, name in enumerate(self._name_of):
            if self._pins[slot] != pins[slot]:
                raise AssertionError(
                    f"{self.medium}: slot {slot} counts {self._pins[slot]} pins, but {pins[slot]} pin it"
                )
            used = pins[slot] > 0 or slot in self._filling
            if (slot in self._free) != (name is None and not used):
                raise AssertionError(f"{self.medium}: slot {slot} is free and in use, or neither")
            if (slot in self._unused) != (name is not None and not used):
                raise AssertionError(
                    f"{self.medium}: slot {slot} can be evicted and must not be, or the reverse"
                )
            if slot in self._told and (name is None or slot in self._filling):
                raise AssertionError(f"{self.medium}: events tell of slot {slot}, which nobody can find")
        for slots in (self._free, self._filling, self._unused, self._told):
            if any(not 0 <= slot < self.capacity for slot in slots):
                raise AssertionError(f"{self.medium}: there is no slot of such a number")
