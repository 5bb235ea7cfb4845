"""KV blocks in the host's memory: equal slots in one piece of it, each under a seal that tells whether its bytes are
still what was put there.

A seal is the block's name and a checksum of the two together, so that bytes which belong under another name are no more
believed than damaged ones. It is broken before a slot is filled and made when its bytes have arrived.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import xxhash

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
AT_ONCE = (
    4  # slots that a hasher is given at a time: to hand work over takes time from the thread that plans steps
)


def checksum(name: bytes, data: np.ndarray) -> int:
    """64 bits of a block's bytes under its name; the same in memory and on disk. Lets other threads run meanwhile.

    xxh3 sees what breaks by itself: flipped bits, parts of another block. It is no defence against forgery.
    """
    of_data: bytes = xxhash.xxh3_64_digest(data.data)
    number: int = xxhash.xxh3_64_intdigest(name + of_data)
    return number


class HostTier:
    """Slots 0 to `slots` - 1 of `block_bytes` each. Threads may use different slots at once."""

    def __init__(self, memory: "torch.Tensor", slots: int, block_bytes: int):
        """`memory` is uint8 on the host, `slots * block_bytes` long, and keeps its place as long as this object."""
        if memory.numel() != slots * block_bytes:
            raise ValueError(f"{slots} slots of {block_bytes} bytes do not fit {memory.numel()} bytes")
        self.slots = slots
        self.block_bytes = block_bytes
        self._memory_SB = memory.view(slots, block_bytes)
        self._array_SB: np.ndarray = self._memory_SB.numpy()
        self._seals: list[tuple[bytes, int] | None] = [None] * slots

    def rows(self, first: int, count: int = 1) -> "torch.Tensor":
        """The bytes of neighbouring slots, uint8 [count, block_bytes]."""
        return self._memory_SB[first : first + count]

    def array(self, slot: int) -> np.ndarray:
        """The bytes of a slot, uint8 [block_bytes]."""
        row: np.ndarray = self._array_SB[slot]
        return row

    def unseal(self, slot: int) -> None:
        """Before the slot is filled: until it is sealed again it holds nothing."""
        self._seals[slot] = None

    def seal(self, slot: int, name: bytes, known: int | None = None) -> None:
        """What lies in the slot is the block called `name`. `known` is its checksum where somebody has it."""
        self._seals[slot] = name, checksum(name, self.array(slot)) if known is None else known

    def sealed(self, slot: int, name: bytes) -> int | None:
        """The checksum made when the slot was sealed, without a look at its bytes; None under another name."""
        seal = self._seals[slot]
        return seal[1] if seal is not None and seal[0] == name else None

    def check(self, slot: int, name: bytes) -> bool:
        """Whether the slot holds the block called `name`, every byte of it read."""
        known = self.sealed(slot, name)
        return known is not None and known == checksum(name, self.array(slot))


class Hashers:
    """Threads that read host slots for their seals. Belongs to one thread."""

    def __init__(self, host: HostTier, workers: int):
        self._host = host
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="xllm-kv-hash")

    def seal(self, slots: Sequence[tuple[int, bytes]]) -> None:
        """`HostTier.seal` each (slot, name)."""
        for _ in self._each(self._host.seal, slots):
            pass

    def check(self, slots: Sequence[tuple[int, bytes]]) -> Iterator[bool]:
        """`HostTier.check` of each (slot, name) in order, while those behind it are being checked."""
        return self._each(self._host.check, slots)

    def _each(self, work: Callable[[int, bytes], T], slots: Sequence[tuple[int, bytes]]) -> Iterator[T]:
        parts = [slots[i : i + AT_ONCE] for i in range(0, len(slots), AT_ONCE)]
        for results in self._pool.map(lambda part: [work(slot, name) for slot, name in part], parts):
            yield from results

    def close(self) -> None:
        self._pool.shutdown()
