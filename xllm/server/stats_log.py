"""Once a second a sample for the metrics; every ten seconds of work a line about throughput and load."""

import asyncio
import logging
import time

from xllm.core.stats import SchedulerStats
from xllm.server.state import ServerState

log = logging.getLogger("xllm.stats")

SAMPLE_S = 1.0
LINE_S = 10.0


async def report(state: ServerState) -> None:
    """Runs until cancelled."""
    before, since = await state.engine.stats(), time.monotonic()
    while True:
        await asyncio.sleep(SAMPLE_S)
        now = await state.engine.stats()
        if now is None:
            continue
        state.metrics.sample_step(now)
        elapsed = time.monotonic() - since
        if elapsed >= LINE_S:
            if before is not None and not state.options.disable_log_stats and worked(before, now):
                log.info("%s", line(before, now, elapsed))
            before, since = now, time.monotonic()
        elif before is None:
            before, since = now, time.monotonic()


def worked(before: SchedulerStats, now: SchedulerStats) -> bool:
    return bool(now.running or now.waiting or now.generation_tokens > before.generation_tokens)


def line(before: SchedulerStats, now: SchedulerStats, seconds: float) -> str:
    prompt = (now.prompt_tokens - before.prompt_tokens) / seconds
    generated = (now.generation_tokens - before.generation_tokens) / seconds
    looked_up = now.prefix_queried_tokens - before.prefix_queried_tokens
    hit = (now.prefix_hit_tokens - before.prefix_hit_tokens) / looked_up if looked_up else 0.0
    return (
        f"{now.running} running, {now.waiting} waiting, "
        f"{prompt:.1f} prompt tok/s, {generated:.1f} output tok/s, KV {now.kv_usage:.0%}, prefix hits {hit:.0%}"
    )
