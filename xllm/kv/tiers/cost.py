"""Is it faster to load KV blocks from a tier below, or to compute them again?

Both are measured while the engine runs: what it takes to load one block, from host memory and from disk, queues
included, and what it takes to compute one token of a prompt. Of each the last dozen or so measurements count, newer ones
more. While a figure is missing, loading is tried.
"""

_DECAY = 7 / 8  # what an older measurement still weighs when another one arrives
_TRIAL = (
    16  # of loads that look too slow, every one of this number is made, or a figure could stay wrong for good
)


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
        self._host = _Rate()  # per block
        self._disk = _Rate()  # per block
        self._compute = _Rate()  # per token
        self._declined = 0

    def loaded(self, host_blocks: int, disk_blocks: int, seconds: float) -> None:
        """A load of so many blocks from host memory and from disk took `seconds`, from its order to its end.

        Blocks from host memory are taken to have cost what they usually do, the rest is the disk's.
        """
        if disk_blocks:
            usual = self._host.value or 0.0
            self._disk.measure(disk_blocks, seconds - usual * host_blocks)
        elif host_blocks:
            self._host.measure(host_blocks, seconds)

    def computed(self, tokens: int, seconds: float) -> None:
        """A step that computed nothing but `tokens` tokens of prompts took `seconds`."""
        if tokens:
            self._compute.measure(tokens, seconds)

    def worthwhile(self, host_blocks: int, disk_blocks: int, block_size: int) -> bool:
        """Whether to load so many blocks rather than to compute their tokens. Ask once per load: every sixteenth that
        is not worth it is made nevertheless, for the sake of the measurement."""
        blocks = host_blocks + disk_blocks
        if blocks == 0:
            return False
        per_token = self._compute.value
        host = self._host.value if host_blocks else 0.0
        disk = self._disk.value if disk_blocks else 0.0
        if per_token is None or host is None or disk is None:
            return True
        if host * host_blocks + disk * disk_blocks < per_token * block_size * blocks:
            return True
        self._declined += 1
        return self._declined % _TRIAL == 0
