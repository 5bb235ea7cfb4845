"""Is it faster to load KV blocks from tiers below, or to compute them again?

All of it is measured while the engine runs: what it takes to load one block from each tier, what to ask a store, and what
to compute one token of a prompt. Of each the last dozen or so measurements count, newer ones more. While a figure is
missing, loading is tried.
"""

from collections.abc import Sequence
from typing import NamedTuple

_DECAY = 7 / 8  # what an older measurement still weighs when another one arrives
_TRIAL = 16  # of what looks too slow, every one of this number is done, or a figure could stay wrong for good


class Blocks(NamedTuple):
    """Blocks of one load, by the tier each of them comes from."""

    host: int = 0
    disk: int = 0
    store: int = 0


class _Rate:
    """Seconds per item, exponentially weighted. Large measurements weigh more than small ones: by their items."""

    __slots__ = ("_items", "_seconds")

    def __init__(self) -> None:
        self._items = 0.0
        self._seconds = 0.0

    def measure(self, items: int, seconds: float) -> None:
        self._items = self._items * _DECAY + items
        self._seconds = self._seconds * _DECAY + max(seconds, 0.0)

    @property
    def value(self) -> float | None:
        return self._seconds / self._items if self._items else None


class Cost:
    """What loading and computing cost on this machine, as measured so far."""

    def __init__(self) -> None:
        self._tiers = Blocks._fields  # nearest first
        self._load = {tier: _Rate() for tier in self._tiers}  # per block
        self._look = _Rate()  # per question
        self._compute = _Rate()  # per token
        self._declined = 0
        self._unasked = 0

    def loaded(self, blocks: Blocks, seconds: float) -> None:
        """A load took `seconds`, those behind other loads not counted.

        Blocks from host memory are taken to have cost what they usually do, the rest is the other tier's. Disk and store
        bring their blocks side by side: a load from both says nothing of either.
        """
        if blocks.disk and blocks.store:
            return
        usual = (self._load["host"].value or 0.0) * blocks.host
        if blocks.disk:
            self._load["disk"].measure(blocks.disk, seconds - usual)
        elif blocks.store:
            self._load["store"].measure(blocks.store, seconds - usual)
        elif blocks.host:
            self._load["host"].measure(blocks.host, seconds)

    def looked(self, seconds: float) -> None:
        """The store took so long to say what it has."""
        self._look.measure(1, seconds)

    def computed(self, tokens: int, seconds: float) -> None:
        """A step that computed nothing but `tokens` tokens of prompts took `seconds`."""
        if tokens:
            self._compute.measure(tokens, seconds)

    def choose(self, ways: Sequence[Blocks], block_size: int) -> int:
        """Which of these loads saves most time over computing what it leaves out; -1: none saves any. The first is the
        longest. Ask once per load: where it is declined, every sixteenth is made nevertheless, for the sake of the
        measurement."""
        best, most = -1, 0.0
        for i, way in enumerate(ways):
            saved = self._saved(way, block_size)
            if saved is None:
                return i
            if saved > most:
                best, most = i, saved
        if best == 0 or not ways:
            return best
        self._declined += 1
        return 0 if self._declined % _TRIAL == 0 else best

    def _saved(self, way: Blocks, block_size: int) -> float | None:
        """Seconds that a load wins; None where that is not known."""
        per_token = self._compute.value
        if per_token is None:
            return None
        saved = per_token * block_size * sum(way)
        for tier, count in zip(self._tiers, way, strict=True):
            if count:
                each = self._load[tier].value
                if each is None:
                    return None
                saved -= each * count
        return saved

    def worth_asking(self, blocks: int, block_size: int) -> bool:
        """Whether to ask a store for so many blocks, or whether they are computed before it answers. As with `choose`,
        one in sixteen is asked for anyhow."""
        look, per_token = self._look.value, self._compute.value
        if look is None or per_token is None or look < per_token * block_size * blocks:
            return True
        self._unasked += 1
        return self._unasked % _TRIAL == 0
