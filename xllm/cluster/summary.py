"""The statistics of several engines as those of one."""

from collections.abc import Sequence

from xllm.core.stats import EventStats, ExecutorStats, SchedulerStats

_MEANS = ("kv_usage",)


def total(parts: Sequence[SchedulerStats]) -> SchedulerStats:
    """Sums; of `kv_usage` the mean. What only one engine can say (tiers, segments, peers) is left out."""
    numbers = {
        name: sum(getattr(part, name) for part in parts)
        for name in SchedulerStats.__struct_fields__
        if name not in ("executor", "kv_events", "tiers", "segments", "peers")
    }
    for name in _MEANS:
        numbers[name] = numbers[name] / max(1, len(parts))
    executor = {
        name: sum(getattr(part.executor, name) for part in parts)
        for name in ExecutorStats.__struct_fields__
        if name != "places"
    }
    events = {
        name: sum(getattr(part.kv_events, name) for part in parts) for name in EventStats.__struct_fields__
    }
    return SchedulerStats(**numbers, executor=ExecutorStats(**executor), kv_events=EventStats(**events))
