"""Which block of this instance's device memory holds the KV called by a hash, and which of those to give up first.

Knows names and ages, not reference counts: those are the pool's, which alone calls this. Further tiers (host memory,
disk, remote) are further indexes asked after this one, keyed by the same names.
"""

from collections import OrderedDict
from collections.abc import Collection, Sequence

from xllm.kv.events import DEVICE, EventLog, Origin


class PrefixIndex:
    """A two-way map of names and blocks, and the *shelf*: named blocks in nobody's use, least recently used first.

    Every operation is O(1) per block; the shelf is one ordered dict, so that taking any block off it is too. Names
    come and go in `add`, `remove` and `clear` alone, which is where `events` (if there is a log) hears of them.
    """

    __slots__ = ("_block_of", "_events", "_name_of", "_shelf")

    def __init__(self, num_blocks: int, events: EventLog | None = None):
        self._events = events
        self._block_of: dict[bytes, int] = {}
        self._name_of: list[bytes | None] = [None] * num_blocks
        self._shelf: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        """Blocks that have a name."""
        return len(self._block_of)

    @property
    def num_shelved(self) -> int:
        return len(self._shelf)

    def find(self, names: Sequence[bytes], limit: int | None = None) -> list[int]:
        """Blocks of the longest known prefix of `names`, of which the first `limit` count."""
        found: list[int] = []
        block_of = self._block_of
        for i in range(len(names) if limit is None else min(limit, len(names))):
            block = block_of.get(names[i])
            if block is None:
                break
            found.append(block)
        return found

    def name_of(self, block: int) -> bytes | None:
        return self._name_of[block]

    def names(self) -> Collection[bytes]:
        """All that are known, a view."""
        return self._block_of.keys()

    def add(self, block: int, name: bytes, origin: Origin | None = None) -> bool:
        """Give `block` its name. False, and nothing done, where another block has it or this one has another.

        Where events are recorded `origin` says what the name stands for; `ValueError` without it.
        """
        if name in self._block_of or self._name_of[block] is not None:
            return False
        if self._events is not None:
            if origin is None:
                raise ValueError(f"block {block} gets a name of unknown origin, but its event must tell it")
            self._events.stored(name, origin, DEVICE)
        self._block_of[name] = block
        self._name_of[block] = name
        return True

    def remove(self, block: int) -> bool:
        """Forget the block's name; it must not be on the shelf. False where it had none."""
        name = self._name_of[block]
        if name is None:
            return False
        del self._block_of[name]
        self._name_of[block] = None
        if self._events is not None:
            self._events.removed(name, DEVICE)
        return True

    def shelve(self, block: int) -> None:
        """The last user of a named block left: it becomes the youngest on the shelf."""
        self._shelf[block] = None

    def unshelve(self, block: int) -> None:
        """A block on the shelf is used again."""
        del self._shelf[block]

    def is_shelved(self, block: int) -> bool:
        return block in self._shelf

    @property
    def oldest(self) -> int | None:
        """The least recently used block on the shelf; it stays there."""
        return next(iter(self._shelf), None)

    def evict(self) -> int:
        """Take the least recently used block off the shelf and forget its name. `KeyError` where it is empty."""
        block, _ = self._shelf.popitem(last=False)
        self.remove(block)
        return block

    def discard(self, block: int) -> None:
        """Take a certain block off the shelf and forget its name. `KeyError` where it is not there."""
        del self._shelf[block]
        self.remove(block)

    def clear(self, *, everywhere: bool = True) -> list[int]:
        """Forget every name. Returns the blocks that were on the shelf, oldest first. `everywhere`: listeners are told that
        lower tiers have nothing either."""
        shelved, names = list(self._shelf), list(self._block_of)
        self._shelf.clear()
        self._block_of.clear()
        self._name_of = [None] * len(self._name_of)
        if self._events is not None:
            if everywhere:
                self._events.cleared()
            for name in () if everywhere else names:
                self._events.removed(name, DEVICE)
        return shelved

    def audit(self) -> None:
        """Raise `AssertionError` with a sentence where the two directions or the shelf disagree."""
        named = {block: name for block, name in enumerate(self._name_of) if name is not None}
        if {name: block for block, name in named.items()} != self._block_of or len(named) != len(
            self._block_of
        ):
            raise AssertionError("prefix index: names and blocks are not a two-way map")
        for block in self._shelf:
            if block not in named:
                raise AssertionError(f"prefix index: block {block} is on the shelf without a name")
