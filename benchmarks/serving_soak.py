"""A long run through HTTP: Poisson arrivals at a share of what the server can take, mixed lengths, some hanging up.

    python -m benchmarks.serving_soak [--minutes 10] [--share 0.7] [--cancel-share 0.1] [--serve-args "--device cuda"]

Starts `xllm serve` on random weights of Qwen3-0.6B's shape (`--shape tiny` for a try-out), measures its capacity with
`xllm bench serve`, then drives it with the same tool at that share of it, reading memory of its processes and of the
card and /metrics every few seconds. Held to: no failed request, all KV blocks free afterwards, memory that does not grow
(the medians of the first and of the last third are compared; on a CPU bound the cache with --kv-cache-memory-bytes in
--serve-args, its pages are taken as they are first written).
"""

import argparse
import json
import re
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from benchmarks.checkpoint import SHAPE

HERE = Path(__file__).resolve().parent
XLLM = [sys.executable, "-c", "import sys; from xllm.cli import main; sys.exit(main())"]
TINY = SHAPE | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                "head_dim": 16, "intermediate_size": 128, "vocab_size": 1024}  # fmt: skip
READY_S, SETTLED_S = 180.0, 30.0
EVERY_S = 2.0
GROWTH = 1.05  # of memory: what buffers that fill up slowly may take


def write_model(directory: Path, shape: dict[str, Any]) -> None:
    """A config and a tokenizer that has a text for every id; weights are drawn when the server starts."""
    from tokenizers import Tokenizer, models

    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "bfloat16", "rms_norm_eps": 1e-6,
        "rope_theta": 1000000, "hidden_act": "silu", "attention_bias": False, "eos_token_id": 2,
        **shape,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    vocab = {f"w{i}": i for i in range(shape["vocab_size"])}
    Tokenizer(models.WordLevel(vocab, unk_token="w0")).save(str(directory / "tokenizer.json"))


@contextmanager
def server(directory: Path, arguments: list[str], log: Path) -> Any:
    """(process, base URL) once it answers; ended like a user would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*XLLM, "serve", str(directory), "--load-format", "dummy", "--port", str(port), *arguments]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + READY_S
        while not healthy(url):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)
        yield process, url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def healthy(url: str) -> bool:
    with suppress(OSError):
        return bool(urllib.request.urlopen(f"{url}/health", timeout=5).status == 200)
    return False


def bench(url: str, into: Path, **flags: object) -> dict[str, Any]:
    command = [*XLLM, "bench", "serve", "--base-url", url, "--save-result", "--disable-tqdm", "--ignore-eos"]
    command += ["--result-dir", str(into.parent), "--result-filename", into.name]
    for name, value in flags.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    subprocess.run(command, check=True)
    result: dict[str, Any] = json.loads(into.read_text(encoding="utf-8"))
    return result


def metrics(url: str) -> dict[str, float]:
    text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    return {m[1]: float(m[2]) for m in re.finditer(r"^xllm:(\w+)\{[^}]*\} (\S+)$", text, re.M)}


class Watch(threading.Thread):
    """Reads memory and metrics until stopped."""

    def __init__(self, process: psutil.Process, url: str):
        super().__init__(daemon=True)
        self.process, self.url = process, url
        self.rows: list[dict[str, float]] = []
        self.over = threading.Event()

    def run(self) -> None:
        begin = time.monotonic()
        while not self.over.wait(EVERY_S):
            self.rows.append({"at_s": time.monotonic() - begin, **self.read()})

    def read(self) -> dict[str, float]:
        family = [self.process, *self.process.children(recursive=True)]
        seen = metrics(self.url)
        row = {"rss_mib": sum(p.memory_info().rss for p in family) / 2**20}
        row |= {
            name: seen[name]
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        }
        if (used := card_mib()) is not None:
            row["card_mib"] = used
        return row


def card_mib() -> float | None:
    with suppress(OSError, subprocess.CalledProcessError, ValueError):
        asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return float(subprocess.run(asked, capture_output=True, check=True, text=True).stdout.splitlines()[0])
    return None


def growth(rows: list[dict[str, float]], name: str) -> float:
    """Median of the last third over that of the first."""
    values = [row[name] for row in rows if name in row]
    third = max(1, len(values) // 3)
    return statistics.median(values[-third:]) / statistics.median(values[:third])


def settled(url: str) -> dict[str, float]:
    """The metrics once nothing runs any more, or as they are after a while."""
    end = time.monotonic() + SETTLED_S
    while (now := metrics(url))["num_requests_running"] and time.monotonic() < end:
        time.sleep(0.2)
    return now


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--share", type=float, default=0.7, help="of the capacity that arrives")
    parser.add_argument("--cancel-share", type=float, default=0.1)
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--concurrency", type=int, default=256, help="when the capacity is measured")
    parser.add_argument("--shape", choices=("0.6B", "tiny"), default="0.6B")
    parser.add_argument("--serve-args", default="", help="further arguments of `xllm serve`, in one string")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "serving-soak")
    asked = parser.parse_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    load = {
        "random_input_len": asked.input_len,
        "random_output_len": asked.output_len,
        "random_range_ratio": 0.9,
    }
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "model"
        write_model(directory, SHAPE if asked.shape == "0.6B" else TINY)
        log = Path(f"{asked.out}-server.log")
        with server(directory, shlex.split(asked.serve_args), log) as (process, url):
            before = metrics(url)
            many = 4 * asked.concurrency
            full = bench(
                url, Path(scratch) / "full.json", num_prompts=many, max_concurrency=asked.concurrency, **load
            )
            rate = round(asked.share * full["request_throughput"], 2)
            watch = Watch(psutil.Process(process.pid), url)
            watch.start()
            result = bench(
                url, Path(scratch) / "soak.json", num_prompts=int(rate * asked.minutes * 60), request_rate=rate,
                cancel_share=asked.cancel_share, metric_percentiles="50,90,99", percentile_metrics="ttft,tpot,itl,e2el",
                **load,
            )  # fmt: skip
            watch.over.set()
            watch.join()
            after = settled(url)
    return report(asked, full, result, watch.rows, before, after)


def report(
    asked: argparse.Namespace, full: dict[str, Any], result: dict[str, Any], rows: list[dict[str, float]],
    before: dict[str, float], after: dict[str, float],
) -> int:  # fmt: skip
    grown = {name: growth(rows, name) for name in ("rss_mib", "card_mib") if name in rows[-1]}
    kept = {
        "no request failed": result["failed"] == 0,
        "all KV blocks are free again": after["kv_cache_usage_perc"] == before["kv_cache_usage_perc"],
        "memory is flat": all(times <= GROWTH for times in grown.values()),
    }
    lines = [
        f"# {asked.minutes:g} minutes of serving, {datetime.now(UTC).strftime('%Y-%m-%d %H:%M UTC')}", "",
        f"`python -m benchmarks.serving_soak {shlex.join(sys.argv[1:])}`", "",
        f"Capacity at {asked.concurrency} at once: {full['request_throughput']:.1f} requests/s, "
        f"{full['output_throughput']:.0f} output tokens/s. Offered: {result['request_rate']} requests/s, Poisson, "
        f"{asked.input_len} in and {asked.output_len} out on average, uniform within 90 %; {asked.cancel_share:.0%} hang up.",
        "", "| | |", "|---|---|",
        f"| completed, failed, hung up | {result['completed']}, {result['failed']}, {result['cancelled']} |",
        f"| output tokens/s | {result['output_throughput']:.0f} |",
        f"| most requests at once | {result['max_concurrent_requests']} |",
    ]  # fmt: skip
    for name in ("ttft", "tpot", "itl", "e2el"):
        figures = ", ".join(f"{result[f'p{p}_{name}_ms']:.1f}" for p in (50, 90, 99))
        lines.append(f"| {name} p50, p90, p99, ms | {figures} |")
    for name, times in grown.items():
        first, last = rows[0][name], rows[-1][name]
        lines.append(
            f"| {name} at first, at last; growth | {first:.0f}, {last:.0f}; {times:.3f} x between thirds |"
        )
    lines += [f"| {what} | {'yes' if so else '**no**'} |" for what, so in kept.items()]
    text = "\n".join([*lines, ""])
    Path(f"{asked.out}.md").write_text(text, encoding="utf-8")
    record = {"args": vars(asked) | {"out": str(asked.out)}, "capacity": full, "soak": result, "watch": rows}
    Path(f"{asked.out}.json").write_text(
        json.dumps(record | {"before": before, "after": after}) + "\n", "utf-8"
    )
    print(text)
    return 0 if all(kept.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
