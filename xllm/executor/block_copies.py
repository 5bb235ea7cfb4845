"""Copies between the device's KV blocks and host slots, in the device's order beside its work."""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from xllm.device.table import Device, Mark
from xllm.executor.host_tier import HostTier


class BlockCopies:
    """One thread at a time for each direction. Neither memory ever goes before the engine does, so a copy never outlives what it copies."""

    def __init__(
        self, device: Device, kv_cache: torch.Tensor, host: HostTier, ready: Callable[[], None] = lambda: None
    ):
        """`kv_cache` [blocks, ...] stays the same tensor; each of its blocks is contiguous. `ready` has what is submitted
        come after whatever its memory needs before it may be filled."""
        self._device = device
        self._ready = ready
        self._host = host
        self._blocks_NB = kv_cache.view(torch.uint8).flatten(1)
        if self._blocks_NB.shape[1] != host.block_bytes:
            raise ValueError(f"blocks of {self._blocks_NB.shape[1]} bytes, host slots of {host.block_bytes}")

    @contextmanager
    def down(self, mark: Mark) -> Iterator[None]:
        """Copies down submitted inside begin after the mark. They have all ended when this has, also where one of them
        failed: what they read and write may be somebody else's then."""
        with self._lane(mark, 0):
            yield

    @contextmanager
    def up(self) -> Iterator[None]:
        """The same for copies up, which begin at once: no step in flight touches a block that is to be filled."""
        with self._lane(None, 1):
            self._ready()
            yield

    @contextmanager
    def _lane(self, mark: Mark | None, lane: int) -> Iterator[None]:
        with torch.inference_mode(), self._device.beside(mark, lane):
            try:
                yield
            finally:
                self._device.mark().wait()

    def submit(self, pairs: Sequence[tuple[int, int]], *, up: bool) -> None:
        """Blocks to slots, or slots to blocks if `up`, for pairs of (block, slot); neighbours of both go as one."""
        for block, slot, count in runs(pairs):
            device, host = self._blocks_NB[block : block + count], self._host.rows(slot, count)
            into, source = (device, host) if up else (host, device)
            if into.device == source.device:
                # PyTorch would take the threads that steps compute with, and memory once seen as an array cannot sleep
                ctypes.memmove(into.data_ptr(), source.data_ptr(), source.nbytes)
            else:
                into.copy_(source, non_blocking=True)


def runs(pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(block, slot, count) of pairs that follow each other on both sides."""
    begin = 0
    for i in range(1, len(pairs) + 1):
        if i == len(pairs) or pairs[i] != (pairs[i - 1][0] + 1, pairs[i - 1][1] + 1):
            yield *pairs[begin], i - begin
            begin = i
