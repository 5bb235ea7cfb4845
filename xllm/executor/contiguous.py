"""The memory of a contiguous KV pool: pages at home, and again where requests see them.

Page `i` holds block `i` of the pool and lies at place `i` for good: that is where tiers copy it from and to. Behind the
homes lie the ranges, each of which shows one request's blocks as neighbours (`xllm.kv.ranges` decides which). One array
over all places is the KV cache that kernels get; most of it is addresses without memory.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from xllm.config.decided import EngineConfig
from xllm.config.memory import blocks_of, gib
from xllm.core.errors import ConfigError
from xllm.core.places import Placed, PlaceOrder, PlaceStats
from xllm.device.pages import PageSpace
from xllm.device.table import Device
from xllm.executor.places import PageMapper

MOST_ROWS = 2**31 - 1  # tokens of all layers, keys and values: the copy engine of a card counts in 32 bits
MOST_BYTES = 1 << 45  # of addresses; a process has four times as many
SPARE_RANGES = 1024  # beside those that can run, for what stays mapped behind a request
LONGEST_WAIT_S = 60.0  # for a page to be mapped; a device that needs longer hangs


class ContiguousMemory:
    """`num_ranges` ranges of `per_range` places from `first_place` on. `start` may be called from any thread, the rest
    belongs to the executor's."""

    def __init__(
        self, space: PageSpace, first_place: int, num_ranges: int, per_range: int, most_mapped: int | None
    ):
        self.first_place = first_place
        self.num_ranges = num_ranges
        self.per_range = per_range
        self.most_mapped = most_mapped
        self._space = space
        self._restore()
        self._mapper = PageMapper(space)
        self._done = self._cleared = self._refused = 0  # orders
        self._waited = self._waited_decoding = 0  # steps
        self._waited_s = 0.0
        self._failed: dict[int, str] = {}  # by place that should show a page and does not: why

    def start(self, orders: Sequence[PlaceOrder]) -> None:
        """Returns at once."""
        self._mapper.start(orders)

    def wait_until(self, done: int, *, decoding: bool) -> None:
        """Until so many orders have been carried out in all. RuntimeError where one could not be, and from then on until its
        place is cleared. `decoding`: the step that waits only decodes."""
        self._take()
        if self._done < done:
            self._wait_until(done, decoding)
        if self._failed:  # whoever hears of it has all places cleared; until then no step may run
            raise RuntimeError(next(iter(self._failed.values())))

    def _wait_until(self, done: int, decoding: bool) -> None:
        begin = time.monotonic()
        while self._done < done:
            if not self._mapper.wait(LONGEST_WAIT_S):
                raise RuntimeError(f"no page of the KV pool was mapped within {LONGEST_WAIT_S:.0f} s")
            self._take()
        self._waited += 1
        self._waited_decoding += decoding
        self._waited_s += time.monotonic() - begin

    def vacate(self) -> int:
        """Nothing runs: all memory goes. -> bytes."""
        while self._mapper.busy:
            self._mapper.wait(LONGEST_WAIT_S)
            self._take()
        self._take()
        self._failed.clear()
        self._space.clear()
        given = self._space.created
        self._space.destroy(0, self.first_place)
        return given

    def restore(self) -> None:
        """Pages again, of zeros, at home. MemoryError where it is not to be had; then nothing is taken."""
        self._restore()

    def close(self) -> None:
        if self._mapper.close():
            self._space.close()

    @property
    def stats(self) -> PlaceStats:
        return PlaceStats(
            places=self._space.mappings - self.first_place, mapped=self._done - self._cleared - self._refused,
            cleared=self._cleared, refused=self._refused, waited=self._waited, waited_decoding=self._waited_decoding,
            waited_s=self._waited_s, seconds=self._mapper.seconds,
        )  # fmt: skip

    def _take(self) -> None:
        for news in self._mapper.news():
            self._done += 1
            self._failed.pop(news.place, None)
            if not isinstance(news, Placed):
                self._cleared += 1
            elif not news.ok:
                self._refused += 1
                self._failed[news.place] = news.error

    def _restore(self) -> None:
        self._space.create(0, self.first_place)
        try:
            self._space.map(0, range(self.first_place))
        except BaseException:
            self._space.destroy(0, self.first_place)
            raise


def contiguous_cache(
    config: EngineConfig, device: Device, spare: int
) -> tuple[torch.Tensor, ContiguousMemory]:
    """A KV cache over all places, and `spare` blocks more at home. ConfigError where the memory or the addresses cannot be
    had."""
    m, cache = config.model, config.cache
    pages = cache.num_blocks + spare
    num_ranges, per_range = _ranges(config, pages)
    places = pages + num_ranges * per_range
    try:
        space = device.reserve_pages(cache.page_bytes, pages, places)
        limit = space.most_mappings
        most_mapped = None if limit is None else max(0, limit - pages) // 2
        memory = ContiguousMemory(space, pages, num_ranges, per_range, most_mapped)
    except (MemoryError, RuntimeError, OSError) as e:
        raise ConfigError(f"--kv-pool contiguous: {e}") from e
    dtype: torch.dtype = getattr(torch, cache.kv_dtype)
    block = torch.empty(
        (m.num_layers, 2, cache.block_size, m.num_kv_heads, m.head_dim), dtype=dtype, device="meta"
    )
    strides = (
        cache.page_bytes // block.itemsize,
        *block.stride(),
    )  # more than a block where it is no whole pages
    return space.tensor.view(dtype).as_strided((places, *block.shape), strides), memory


def with_ranges_told(config: EngineConfig) -> EngineConfig:
    """The configuration with what follows for requests from the addresses there are."""
    num_ranges, per_range = _ranges(config, config.cache.num_blocks + 1)
    running = config.scheduler.max_num_seqs
    each = gib(per_range * config.cache.page_bytes)
    told = f"each sequence sees its KV at addresses of its own, {each} of them; {num_ranges} such ranges: as asked"
    if num_ranges < running:
        told += f"; {num_ranges} sequences at once instead of {running}, for that is how many tokens of addresses kernels can count"
    return replace(config, reasons=(*config.reasons, told))


def _ranges(config: EngineConfig, pages: int) -> tuple[int, int]:
    """(ranges, places of each)."""
    m, cache, scheduler = config.model, config.cache, config.scheduler
    each = blocks_of(scheduler.max_model_len, cache.block_size)
    rows = m.num_layers * 2 * cache.block_size
    fitting = min(MOST_ROWS // rows, MOST_BYTES // cache.page_bytes) - pages
    num_ranges = min(scheduler.max_num_seqs + SPARE_RANGES, fitting // each)
    if num_ranges < 2:
        raise ConfigError(
            f"--kv-pool contiguous: addresses for sequences of {scheduler.max_model_len} tokens are more than kernels can count; "
            "lower --max-model-len"
        )
    return num_ranges, each
