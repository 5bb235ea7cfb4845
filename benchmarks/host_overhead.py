"""Host time per engine step: everything but the model.

    python benchmarks/host_overhead.py [--batch 1 16] [--steps 400]

The real loop (scheduler, input buffers, sampler, output processing with a real tokenizer) runs a model that takes no
time: its own seconds are subtracted. Depth 1, so that every part is on the step's path; the vocabulary is small, so
that sampling is its bookkeeping and not arithmetic over logits. Medians over steady decode steps.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoint import save_byte_tokenizer
from benchmarks.load import Load
from xllm.bench.collect_env import collect
from xllm.config.decided import (
    CacheConfig,
    EngineConfig,
    ExecutorConfig,
    MemoryConfig,
    ModelConfig,
    SchedulerConfig,
)
from xllm.core.sampling import SamplingParams
from xllm.device.table import open_device
from xllm.engine.admission import Admission
from xllm.engine.core import EngineCore
from xllm.engine.outputs import OutputProcessor
from xllm.executor.build import assemble
from xllm.executor.executor import Executor
from xllm.kv.pool import BlockPool
from xllm.models.forward import Forward
from xllm.ops.table import load_ops
from xllm.scheduler.scheduler import Scheduler
from xllm.text.tokenizer import load_tokenizer
from xllm.wire.channel import MemoryChannel
from xllm.wire.messages import Outputs, Submit

HERE = Path(__file__).resolve().parent
BARS_MS = {1: 0.3, 16: 1.0}
VOCAB, HIDDEN, PROMPT = 256, 8, 64
SETTLE = 50  # steps before measuring: admission, prefill, first use of everything
SAMPLING = {
    "greedy": SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=100_000),
    "temperature, top-p, seed": SamplingParams(
        temperature=0.8, top_p=0.95, seed=1, ignore_eos=True, max_tokens=100_000
    ),
}

Seconds = dict[str, float]


class NullModel:
    """Knows the next token's logits without computing anything."""

    def __init__(self) -> None:
        self.on_layer: Callable[[], None] | None = None
        self._logits = torch.zeros(64, VOCAB)
        self._hidden = torch.zeros(64, HIDDEN)
        self._logits[:, 70] = 1.0

    def tensors(self) -> Iterator[torch.Tensor]:
        return iter(())

    def forward(self, fwd: Forward) -> torch.Tensor:
        assert fwd.logits_rows is not None, "a CPU's steps name their rows"
        return self._hidden[: len(fwd.logits_rows)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._logits[: len(hidden)].clone()


def config(batch: int, length: int) -> EngineConfig:
    model = ModelConfig(
        directory="", architecture="none", vocab_size=VOCAB, hidden_size=HIDDEN, num_layers=1, num_heads=1,
        num_kv_heads=1, head_dim=HIDDEN, max_position=length, eos_ids=(), load_format="dummy", hf={},
    )  # fmt: skip
    scheduler = SchedulerConfig(
        max_model_len=length, max_num_seqs=batch, max_num_batched_tokens=2048, chunked_prefill=True,
        long_prefill_token_threshold=0, batching="chunked", order="fcfs", admission="optimistic", depth=1,
    )  # fmt: skip
    blocks = (length // 16 + 1) * batch
    cache = CacheConfig(
        block_size=16,
        num_blocks=blocks,
        prefix_caching=True,
        block_bytes=16 * 2 * HIDDEN * 4,
        kv_dtype="float32",
    )
    executor = ExecutorConfig(device="cpu", dtype="float32", threads=1, seed=0)
    return EngineConfig(
        model=model,
        scheduler=scheduler,
        cache=cache,
        memory=MemoryConfig(None, 0.9, False),
        executor=executor,
        reasons=(),
    )


class Stopwatch:
    """Adds up the seconds spent in wrapped functions, by part."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def wrap(self, owner: Any, name: str, part: str) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - begin

        setattr(owner, name, timed)

    def take(self) -> Seconds:
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


class Engine:
    """The loop, put together as `build_core` does, around the null model."""

    def __init__(self, batch: int, length: int, tokenizer_directory: Path):
        decided = config(batch, length)
        self.watch = Stopwatch()
        model, device = NullModel(), open_device("cpu")
        device.prepare(threads=1)
        runner = assemble(decided, model, device, load_ops("cpu", torch.float32))
        self.scheduler = Scheduler(decided.scheduler, BlockPool(decided.cache.num_blocks, 16, True))
        self.channel, inbox = MemoryChannel.pair()
        admission = Admission(self.scheduler, eos_ids=frozenset(), max_model_len=length, seed=0)
        self.outputs = OutputProcessor(load_tokenizer(tokenizer_directory))
        self.core = EngineCore(self.scheduler, Executor(lambda: runner, depth=1), inbox, admission, depth=1)
        self.watch.wrap(model, "forward", "model")
        self.watch.wrap(model, "logits", "model")
        self.watch.wrap(self.scheduler, "plan", "plan")
        self.watch.wrap(self.scheduler, "apply", "apply")
        self.watch.wrap(runner, "run", "prepare and sample")
        self.watch.wrap(self.outputs, "process", "output processing")

    def add(self, index: int, params: SamplingParams) -> None:
        prompt = [(index * 31 + i) % 200 + 10 for i in range(PROMPT)]
        for id, child in self.outputs.add(f"r{index}", None, prompt, params, time.monotonic()):
            self.channel.send(Submit(request_id=id, prompt_token_ids=prompt, params=child))

    def step(self) -> Seconds:
        """One turn and its outputs: seconds by part, `model` taken out of the total."""
        begin = time.perf_counter()
        self.core.turn(wait_s=0.0)
        while message := self.channel.receive(0.0):
            if isinstance(message, Outputs):
                self.outputs.process(message.outputs)
        parts = {"total": time.perf_counter() - begin} | self.watch.take()
        model = parts.pop("model", 0.0)
        parts["total"] -= model
        parts["prepare and sample"] = parts.get("prepare and sample", 0.0) - model
        parts["loop"] = parts["total"] - sum(s for part, s in parts.items() if part != "total")
        return parts


def measure(batch: int, params: SamplingParams, steps: int) -> dict[str, float]:
    """Median milliseconds per step by part, and the 99th percentile of the total."""
    with tempfile.TemporaryDirectory() as directory:
        save_byte_tokenizer(Path(directory))
        engine = Engine(batch, PROMPT + steps + SETTLE + 64, Path(directory))
    for i in range(batch):
        engine.add(i, params)
    samples = [engine.step() for _ in range(SETTLE + steps)][SETTLE:]
    assert engine.scheduler.stats().running == batch
    result = {part: statistics.median(s[part] for s in samples) * 1000 for part in samples[0]}
    result["total p99"] = sorted(s["total"] for s in samples)[int(0.99 * len(samples))] * 1000
    return result


def markdown(rows: list[dict[str, Any]], facts: dict[str, str]) -> str:
    parts = list(rows[0]["ms"])
    lines = [
        f"# Host overhead of an engine step, {facts['date']}",
        "",
        f"`{facts['command']}`",
        "",
        f"{facts['machine']}. Milliseconds, median of steady decode steps; the model's own time is not in it.",
        "",
        "| batch | sampling | " + " | ".join(parts) + " | bar | |",
        "|---" * (len(parts) + 4) + "|",
    ]
    for row in rows:
        figures = " | ".join(f"{row['ms'][part]:.3f}" for part in parts)
        bar = BARS_MS.get(row["batch"])
        kept = "" if bar is None else "kept" if row["ms"]["total"] < bar else "missed"
        lines.append(
            f"| {row['batch']} | {row['sampling']} | {figures} | {'' if bar is None else f'< {bar}'} | {kept} |"
        )
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    asked = parser.parse_args()
    with Load() as load:
        rows = [
            {"batch": batch, "sampling": name, "ms": measure(batch, params, asked.steps)}
            for batch in asked.batch
            for name, params in SAMPLING.items()
        ]
    machine = collect()
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python benchmarks/host_overhead.py", *sys.argv[1:]]),
        "machine": f"{machine['cpu']['usable_cores']} cores of {machine['cpu']['model']}, torch "
        f"{machine['packages']['torch']}, Python {machine['python']}; foreign load {load.foreign:.0%} of a core",
    }
    text = markdown(rows, facts)
    asked.results.mkdir(parents=True, exist_ok=True)
    (asked.results / "host-overhead.md").write_text(text, encoding="utf-8")
    everything = json.dumps({"facts": facts, "machine": machine, "rows": rows}, indent=2)
    (asked.results / "host-overhead.json").write_text(everything + "\n", encoding="utf-8")
    print(text)
    kept = all(row["ms"]["total"] < BARS_MS.get(row["batch"], float("inf")) for row in rows)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
