"""What the scheduler costs the host per step: microseconds of `plan` + `apply` at a steady decode batch.

    python benchmarks/scheduler_overhead.py [--steps 300] [--batch 1 16 256] [--context 512] [--block-size 16]

No model runs: results are made up outside of the time taken. Several runs, the median is printed (and the 99th
percentile, which includes the steps in which many sequences fill a block at once).
"""

import argparse
import statistics
from time import perf_counter

from xllm.config.decided import SchedulerConfig
from xllm.core.plan import StepPlan, StepResult
from xllm.core.request import Request
from xllm.core.sampling import SamplingParams
from xllm.kv.pool import BlockPool
from xllm.scheduler.scheduler import Scheduler


def scheduler_for(batch: int, context: int, steps: int, block_size: int) -> Scheduler:
    tokens = context + steps + 64
    config = SchedulerConfig(
        max_model_len=tokens,
        max_num_seqs=batch,
        max_num_batched_tokens=8192,
        chunked_prefill=True,
        long_prefill_token_threshold=0,
        batching="chunked",
        order="fcfs",
        admission="optimistic",
        depth=2,
    )
    scheduler = Scheduler(config, BlockPool(batch * (tokens // block_size + 2), block_size))
    params = SamplingParams(max_tokens=None, ignore_eos=True)
    for i in range(batch):
        prompt = [(i * 7919 + j) % 50_000 for j in range(context - i % block_size)]
        scheduler.add(Request(str(i), prompt, params, float(i), tokens, i, stop_ids=frozenset({50_001})))
    return scheduler


def measure(batch: int, context: int, steps: int, block_size: int) -> tuple[list[float], list[float]]:
    """Seconds per plan and per apply of `steps` steady decode steps, two steps in flight."""
    scheduler = scheduler_for(batch, context, steps, block_size)
    plans: list[StepPlan] = []
    plan_s: list[float] = []
    apply_s: list[float] = []
    now = 0.0
    while len(apply_s) < steps:
        start = perf_counter()
        plan = scheduler.plan(now)
        planned = perf_counter() - start
        assert plan is not None
        plans.append(plan)
        if len(plans) < 2:
            continue
        oldest = plans.pop(0)
        result = StepResult(oldest.step, [[7] if sampled else [] for sampled in oldest.samples])
        start = perf_counter()
        scheduler.apply(result, now)
        applied = perf_counter() - start
        if plan.num_tokens == batch == oldest.num_tokens:  # a steady step, not prefill
            plan_s.append(planned)
            apply_s.append(applied)
        now += 0.01
    return plan_s, apply_s


def percentile_99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


def main() -> None:
    parser = argparse.ArgumentParser(description="host time of the scheduler per decode step")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--block-size", type=int, default=16)
    options = parser.parse_args()
    print(f"{'batch':>6} {'plan us':>9} {'apply us':>9} {'sum us':>9} {'p99 sum us':>11}")
    for batch in options.batch:
        plan_s, apply_s = measure(batch, options.context, options.steps, options.block_size)
        both = [p + a for p, a in zip(plan_s, apply_s, strict=True)]
        columns = [
            statistics.median(plan_s),
            statistics.median(apply_s),
            statistics.median(both),
            percentile_99(both),
        ]
        print(
            f"{batch:>6} {columns[0] * 1e6:>9.1f} {columns[1] * 1e6:>9.1f} {columns[2] * 1e6:>9.1f} {columns[3] * 1e6:>11.1f}"
        )


if __name__ == "__main__":
    main()
