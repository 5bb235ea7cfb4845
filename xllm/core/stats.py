"""What the scheduler tells about itself, for metrics and for whoever balances load."""

import msgspec


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
