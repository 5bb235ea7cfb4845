import gzip
import json
import re
from contextlib import nullcontext
from typing import Any

import pytest

from tests.bench.commands import bench
from xllm.bench import offline
from xllm.bench.completion import Ask
from xllm.bench.offline import measure_latency, measure_throughput
from xllm.bench.options import LatencyOptions
from xllm.core.errors import ConfigError
from xllm.core.output import CompletionOutput, RequestMetrics, RequestOutput
from xllm.core.stats import ExecutorStats, SchedulerStats

STATS = SchedulerStats(
    0, 0, 0, 0.0, 0, 0, 0, 0, 0, 0, 0, ExecutorStats(steps=40, graph_steps=30, device_s=0.1, bubble_s=0.004)
)


class CountingEngine:
    """Generates what it is asked for at once and remembers the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[Any], list[Any]]] = []

    def generate(
        self, prompts: Any, sampling_params: Any = None, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        self.calls.append((prompts, sampling_params))
        return [self._output(p, s) for p, s in zip(prompts, sampling_params, strict=True)]

    def stats(self) -> SchedulerStats:
        return STATS

    def _output(self, prompt: Any, params: Any) -> RequestOutput:
        ids = prompt.get("prompt_token_ids") or [0] * len(prompt["prompt"].split())
        completion = CompletionOutput(index=0, token_ids=[1] * params.max_tokens, finish_reason="length")
        return RequestOutput("r", None, ids, None, [completion], True, RequestMetrics(arrival=0.0))


def test_throughput_counts_prompt_and_output_tokens():
    engine = CountingEngine()
    asks = [Ask([1, 2, 3], 3, 5), Ask("two words", 2, 7)]
    result, generated = measure_throughput(engine, asks, progress=False)
    assert result.keys() == {
        "elapsed_time",
        "num_requests",
        "total_num_tokens",
        "requests_per_second",
        "tokens_per_second",
    }
    assert (result["num_requests"], result["total_num_tokens"], generated) == (2, 17, 12)
    assert result["tokens_per_second"] == pytest.approx(17 / result["elapsed_time"])
    assert all(p.ignore_eos for p in engine.calls[0][1])


def test_latency_measures_fresh_batches_after_the_warm_up():
    engine = CountingEngine()
    options = LatencyOptions(
        input_len=6, output_len=2, batch_size=3, num_iters_warmup=2, num_iters=4, disable_tqdm=True
    )
    result = measure_latency(engine, options, vocab_size=100, seed=0)
    assert len(engine.calls) == 6
    assert len(result["latencies"]) == 4
    assert result["percentiles"].keys() == {"10", "25", "50", "75", "90", "99"}
    prompts = [tuple(p["prompt_token_ids"]) for batch, _ in engine.calls for p in batch]
    assert len(set(prompts)) == 18
    assert all(len(p) == 6 for p in prompts)


@pytest.fixture
def counting(monkeypatch) -> CountingEngine:
    engine = CountingEngine()
    monkeypatch.setattr(offline, "_engine", lambda options: nullcontext((engine, 100, "/nowhere")))
    return engine


def test_throughput_from_the_command_line(counting, tmp_path, capsys):
    path = tmp_path / "result.json"
    argv = ["throughput", "toy", "--num-prompts", "5", "--random-input-len", "9", "--random-output-len", "3"]
    assert bench(*argv, "--disable-tqdm", "--output-json", str(path)) == 0
    assert "output tokens/s" in capsys.readouterr().out
    assert json.loads(path.read_text())["total_num_tokens"] == 60


def test_throughput_of_a_file(counting, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one two three", "output_tokens": 2}\n')
    assert bench("throughput", "toy", "--dataset-name", "custom", "--dataset-path", str(path)) == 0
    assert counting.calls[0][0] == [{"prompt": "one two three"}]


def test_latency_from_the_command_line(counting, tmp_path, capsys):
    path = tmp_path / "result.json"
    argv = [
        "latency",
        "toy",
        "--num-iters",
        "2",
        "--num-iters-warmup",
        "0",
        "--batch-size",
        "1",
        "--disable-tqdm",
    ]
    assert bench(*argv, "--output-json", str(path)) == 0
    printed = capsys.readouterr().out
    assert "Avg latency:" in printed and "99% percentile latency:" in printed
    assert json.loads(path.read_text()).keys() >= {"avg_latency", "latencies", "percentiles"}


def test_latency_refuses_nothing_to_do(counting):
    with pytest.raises(ConfigError, match="at least 1"):
        bench("latency", "toy", "--num-iters", "0")


def test_both_run_on_the_real_engine(tmp_path, capsys):
    from tests.checkpoints import save_qwen3

    model = str(save_qwen3(tmp_path))
    lengths = ["--random-input-len", "20", "--random-output-len", "4", "--num-prompts", "6"]
    assert bench("throughput", model, *lengths, "--disable-tqdm", "--dtype", "float32") == 0
    lengths = ["--input-len", "20", "--output-len", "4", "--batch-size", "2", "--num-iters", "2"]
    assert bench("latency", model, *lengths, "--disable-tqdm", "--dtype", "float32") == 0
    printed = capsys.readouterr().out
    assert "Throughput:" in printed
    assert "Avg latency:" in printed


def test_steps_are_described_and_profiled(tmp_path, capsys):
    """A trace is written of a device whose work PyTorch sees."""
    from tests.checkpoints import save_qwen3

    model = str(save_qwen3(tmp_path))
    args = [
        "--random-input-len", "20", "--random-output-len", "4", "--num-prompts", "3", "--disable-tqdm", "--profile",
        "--profile-dir", str(tmp_path), "--dtype", "float32", "--max-num-seqs", "4", "--threads", "1",
    ]  # fmt: skip
    assert bench("throughput", model, *args, "--device", "reference") == 0
    printed = capsys.readouterr().out
    assert re.search(r"Steps: \d+, [1-9]\d* of them as graphs; on the device [\d.]+ ms each", printed)
    assert "aten::" in printed
    (trace,) = tmp_path.glob("xllm-trace-*.json.gz")
    assert b"aten::" in gzip.decompress(trace.read_bytes())
    with pytest.raises(ConfigError, match="on a CPU the operators are plain C"):
        bench("throughput", model, *args, "--device", "cpu")
