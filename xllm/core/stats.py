"""What an engine tells about itself, for metrics and for whoever balances load."""

import msgspec

from xllm.core.peers import PeerStats
from xllm.core.places import PlaceStats
from xllm.core.segments import SegmentStats
from xllm.core.transfer import TierStats


class ExecutorStats(msgspec.Struct, frozen=True):
    """How steps ran on the device. All are counters."""

    steps: int = 0
    graph_steps: int = 0  # replayed as a whole; the others ran kernel by kernel
    graph_failures: int = 0  # captures that failed; those steps run kernel by kernel
    device_s: float = 0.0  # seconds the device spent on steps
    bubble_s: float = 0.0  # seconds it waited for a step that was submitted while the one before it ran
    places: PlaceStats | None = None  # of a contiguous KV pool


class EventStats(msgspec.Struct, frozen=True):
    """How often it was told what is cached. Counters."""

    batches: int = 0  # of KV cache events, published
    dropped: int = 0  # numbered, and never published
    changes: int = 0  # turns of the engine that changed what is cached, where anybody may want to know


class SchedulerStats(msgspec.Struct, frozen=True):
    """A snapshot. Counters (`*_tokens`, `preemptions`, `evictions`) only grow; the rest is how it stands now."""

    running: int
    waiting: int
    steps_in_flight: int
    kv_usage: float  # share of the blocks that is held, 0 to 1
    prefix_queried_tokens: int  # prompt tokens looked up in the prefix cache
    prefix_hit_tokens: int  # of those, found
    preemptions: int
    evictions: int  # cached blocks given up for new ones
    prompt_tokens: int  # computed in prefill; recomputation after a preemption included
    generation_tokens: int  # sampled and kept
    step_tokens: int  # of the last step planned
    executor: ExecutorStats = ExecutorStats()  # the engine's; the scheduler knows nothing of it
    kv_events: EventStats = EventStats()  # so are these
    tiers: tuple[TierStats, ...] = ()  # below the device, nearest first
    segments: SegmentStats | None = None  # of the KV cache, where its memory comes and goes
    peers: PeerStats = PeerStats()  # KV from and to other engines
    cached_blocks: int = 0  # on the device, that prompts can find; of an engine that tells what it caches
