"""What all transports of KV blocks between engines have in common: who promises what, and the memory they copy to and from.

The reader pulls: an engine tells another where its blocks lie (`descriptor`), and the other copies from there into
blocks of its own. Nobody ever writes into another's memory, so what comes late cannot land in a block that has been
given to somebody else. A transport moves bytes and knows nothing of what they mean; whether they are what was offered
is for `xllm.executor.block_sums` to say.
"""

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import torch

VERSION = 1
STALL_S = 3.0  # a peer of which nothing has come for so long, though something is owed, is given up
EPOCH_BYTES = 16


class TransportError(Exception):
    """A peer cannot be reached, has gone, does not answer, or refuses. What was to be read counts as not read."""


class Reading(Protocol):
    """Blocks on their way. Belongs to the thread that uses its peer."""

    def wait(self, timeout_s: float) -> bool:
        """True: all of it is there, for all work submitted to the device from here on. False: not yet. It may be that nothing
        moves unless somebody waits.

        TransportError: it failed, and its peer is of no use any more. Once this has returned True or raised,
        nothing is written into our blocks.
        """
        ...


class Peer(Protocol):
    """Another engine's blocks. Belongs to one thread."""

    def read(self, theirs: Sequence[int], ours: Sequence[int]) -> Reading:
        """Begins to copy blocks `theirs` into blocks `ours`. ValueError for numbers that do not fit or, of ours, come
        twice; TransportError where the peer has gone."""
        ...

    def close(self) -> None:
        """Ends all readings: those that had not arrived raise, and nothing is written into our blocks any more."""
        ...


class Transport(Protocol):
    """One for each engine. `connect` may be called from several threads.

    It holds on to the KV cache's memory: before that is given back (sleep) the transport is closed, and opened again
    after.
    """

    def descriptor(self) -> bytes:
        """What a peer needs to reach our blocks, unlike that of every other process and of every other transport."""
        ...

    def connect(self, descriptor: bytes) -> Peer:
        """TransportError with a sentence where the peer cannot be reached, refuses, or its blocks are not like ours."""
        ...

    def close(self) -> None:
        """Ends all peers that were connected from here, and gives out nothing more. Where others read by themselves they may
        go on until they hear of it; what they get then is an error, or has another checksum."""
        ...


@dataclass(frozen=True)
class Settings:
    """What an engine gives every transport: see `open_transport`."""

    detail: str = ""  # what came behind the name
    token: str | None = field(default=None, repr=False)
    listen: str = "127.0.0.1"
    advertise: str | None = None
    mapped: bool = False


class Description(msgspec.Struct, frozen=True, array_like=True):
    """What is in a descriptor."""

    version: int
    kind: str  # the transport's name
    epoch: bytes
    num_blocks: int
    block_bytes: int
    device: str  # "cpu" or "cuda"
    place: bytes  # whatever this kind needs


class Blocks:
    """The KV cache's memory as rows of bytes."""

    def __init__(self, memory: torch.Tensor):
        """`memory` [blocks, ...] stays the same tensor; each of its blocks is contiguous."""
        self.memory_NB = memory.view(torch.uint8).flatten(1)
        self.num_blocks, self.block_bytes = self.memory_NB.shape
        if not self.num_blocks or not self.block_bytes:
            raise ValueError("a KV cache without blocks")
        if self.memory_NB.stride() != (self.block_bytes, 1):
            raise ValueError("blocks of a KV cache lie one behind the other")
        self.on_card = self.memory_NB.is_cuda
        self.address = self.memory_NB.data_ptr()

    def bytes_of(self, first: int, count: int = 1) -> memoryview:
        """Neighbouring blocks in host memory, without a copy. Good as long as the memory is.

        Not by way of NumPy: memory once seen as an array cannot be given back when the engine sleeps.
        """
        place = self.address + first * self.block_bytes
        return memoryview((ctypes.c_ubyte * (count * self.block_bytes)).from_address(place)).cast("B")

    def describe(self, kind: str, place: bytes) -> Description:
        device = self.memory_NB.device.type
        epoch = os.urandom(EPOCH_BYTES)
        return Description(VERSION, kind, epoch, self.num_blocks, self.block_bytes, device, place)

    def check_read(self, theirs: Sequence[int], ours: Sequence[int], peer: Description) -> None:
        if len(theirs) != len(ours):
            raise ValueError(f"{len(theirs)} blocks cannot be read into {len(ours)}")
        if len(set(ours)) != len(ours):
            raise ValueError("a block cannot be read into twice")
        for numbers, limit, whose in (
            (theirs, peer.num_blocks, "the peer"),
            (ours, self.num_blocks, "this engine"),
        ):
            if numbers and not 0 <= min(numbers) <= max(numbers) < limit:
                raise ValueError(f"{whose} has {limit} blocks; asked for {min(numbers)} to {max(numbers)}")


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Description)


def pack(description: Description) -> bytes:
    return _encoder.encode(description)


def unpack(descriptor: bytes, kind: str, blocks: Blocks) -> Description:
    """TransportError for whatever is not a descriptor of this kind, of blocks like ours."""
    try:
        found = _decoder.decode(descriptor)
    except msgspec.MsgspecError as e:
        raise TransportError(f"a peer's descriptor cannot be read: {e}") from e
    if found.version != VERSION or found.kind != kind:
        raise TransportError(
            f"the peer moves KV by {found.kind!r}, version {found.version}; this engine by {kind!r}, version {VERSION}"
        )
    if found.block_bytes != blocks.block_bytes:
        raise TransportError(
            f"the peer's KV blocks have {found.block_bytes} bytes, this engine's {blocks.block_bytes}"
        )
    if found.num_blocks < 1 or len(found.epoch) != EPOCH_BYTES:
        raise TransportError("a peer's descriptor makes no sense")
    return found
