"""The memory that a KV cache lies in: all of it at once, or a range of addresses whose memory comes and goes."""

from dataclasses import dataclass, replace

import torch

from xllm.config.decided import EngineConfig
from xllm.config.memory import gib
from xllm.core.errors import ConfigError
from xllm.device.table import Device
from xllm.device.virtual import VirtualRange, whole_granules
from xllm.executor.segments import SegmentMapper, blocks_per_segment

SEGMENT_BYTES = 64 << 20  # mapping costs a card about as much for 64 MiB as for 2
SMALLEST_SHARE = 16  # of a small cache: it shall come in so many segments at least


@dataclass(slots=True)
class ElasticMemory:
    """Segments under the KV cache. Belongs to the executor's thread, but for the mapper."""

    range: VirtualRange
    mapper: SegmentMapper
    blocks_per_segment: int

    def close(self) -> None:
        if self.mapper.close():
            self.range.close()


def whole_segments(config: EngineConfig, device: Device) -> tuple[EngineConfig, int]:
    """The configuration with its cache cut to whole segments, so that what lies behind it is in none; and their
    blocks. ConfigError where not one segment fits."""
    cache = config.cache
    with_range = device.reserve(1)
    granularity = with_range.granularity
    with_range.close()
    wanted = min(SEGMENT_BYTES, cache.num_blocks * cache.block_bytes // SMALLEST_SHARE)
    each = blocks_per_segment(cache.block_bytes, granularity, wanted)
    blocks = cache.num_blocks // each * each
    longest = -(-config.scheduler.max_model_len // cache.block_size)
    if blocks < longest:
        raise ConfigError(
            f"--kv-pool elastic: memory comes in segments of {gib(each * cache.block_bytes)}, of which "
            f"{cache.num_blocks // each} fit; that holds no sequence of {config.scheduler.max_model_len} tokens"
        )
    told = f"memory of the KV cache comes and goes in {blocks // each} segments of {gib(each * cache.block_bytes)}: as asked"
    reasons = (*config.reasons, told)
    return replace(config, cache=replace(cache, num_blocks=blocks), reasons=reasons), each


def elastic_cache(
    config: EngineConfig, device: Device, blocks_each: int, spare: int
) -> tuple[torch.Tensor, ElasticMemory]:
    """A KV cache of whole segments, the first of them mapped, and `spare` blocks behind them that always are."""
    m, cache = config.model, config.cache
    nbytes = cache.num_blocks * cache.block_bytes
    memory = device.reserve(nbytes + spare * cache.block_bytes)
    if spare:
        memory.commit(nbytes, whole_granules(spare * cache.block_bytes, memory.granularity))
    mapper = SegmentMapper(memory, cache.block_bytes, blocks_each, cache.num_blocks)
    mapper.map_now([0])
    dtype: torch.dtype = getattr(torch, cache.kv_dtype)
    shape = (cache.num_blocks + spare, m.num_layers, 2, cache.block_size, m.num_kv_heads, m.head_dim)
    whole = memory.tensor[: nbytes + spare * cache.block_bytes]
    return whole.view(dtype).view(shape), ElasticMemory(memory, mapper, blocks_each)
