"""Two instances on one card whose KV together is more than it has: who needs memory has it, and nobody fails.

    python -m benchmarks.shared_card [--shape 0.6B] [--requests 110] [--prompt 8000] [--reply 512] [--later 6] [--rest 25]

Two engines with `--kv-pool elastic`, each in a process of its own, start at the same time and do nothing for some seconds.
Then the first gets all its requests at once, the second its own `--later` seconds after; both rest for `--rest` seconds,
and with `--again` the first gets as many once more. What each has mapped and, on a card, what is taken in all is written down
ten times a second and, where matplotlib is installed, drawn. Exits with 1 where a request failed.
"""

import argparse
import json
import select
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from benchmarks.kv_tiers import SHAPES
from benchmarks.load import MARK
from benchmarks.serving_soak import write_model
from xllm.bench.collect_env import collect

HERE = Path(__file__).resolve().parent
EVERY_S = 0.1
NAMES = ("first", "second")


def child(asked: argparse.Namespace) -> None:
    """One engine. Each line of input is `seed`: all requests at once. Tells what it has mapped, and what became of them."""
    import random

    from xllm import LLM, SamplingParams

    lock = threading.Lock()

    def tell(**what: Any) -> None:
        with lock:
            print(MARK + json.dumps({"at": time.time(), **what}), flush=True)

    params = SamplingParams(temperature=0.0, max_tokens=asked.reply, ignore_eos=True, detokenize=False)
    with LLM(
        asked.model, load_format="dummy", skip_tokenizer_init=True, kv_pool="elastic", max_num_seqs=asked.requests,
        max_model_len=asked.prompt + asked.reply, separate_process=True, **json.loads(asked.engine_args),
    ) as llm:  # fmt: skip
        capacity = llm.config.cache.num_blocks * llm.config.cache.block_bytes
        at_work, over = threading.Event(), threading.Event()

        def watch() -> None:  # while the main thread waits for outputs, and so hears from the engine
            while not over.wait(EVERY_S):
                if at_work.is_set() and (segments := llm.stats().segments) is not None:
                    mapped = segments.mapped / segments.capacity * capacity
                    tell(
                        mapped=mapped, grown=segments.grown, shrunk=segments.shrunk, refused=segments.refused
                    )

        watching = threading.Thread(target=watch)
        watching.start()
        tell(ready=True, capacity=capacity)
        while True:
            if not select.select([sys.stdin], [], [], EVERY_S)[0]:
                tell(mapped=llm.limit_kv_memory(None))
                continue
            line = sys.stdin.readline()
            if not line:
                break
            rng = random.Random(int(line))
            prompts = [
                {"prompt_token_ids": [rng.randrange(3, 1000) for _ in range(asked.prompt)]}
                for _ in range(asked.requests)
            ]
            begin = time.time()
            at_work.set()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            at_work.clear()
            failed = [out.error for out in outputs if len(out.outputs[0].token_ids) != asked.reply]
            tell(ended=True, seconds=time.time() - begin, failed=failed, preemptions=llm.stats().preemptions)
        over.set()
        watching.join()


class Instance:
    def __init__(self, name: str, model: str, asked: argparse.Namespace):
        command = [sys.executable, "-m", "benchmarks.shared_card", *sys.argv[1:], "--model", model]
        self.name = name
        self.told: list[dict[str, Any]] = []
        self._news = threading.Condition()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE.parent
        )
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            if line.startswith(MARK):
                with self._news:
                    self.told.append(json.loads(line.removeprefix(MARK)))
                    self._news.notify_all()
        with self._news:
            self.told.append({"at": time.time(), "gone": True})
            self._news.notify_all()

    def wait_for(self, what: str, times: int = 1, timeout_s: float = 300.0) -> dict[str, Any]:
        with self._news:
            there = self._news.wait_for(lambda: len(self._of(what)) >= times or self._of("gone"), timeout_s)
            if not there or len(self._of(what)) < times:
                raise SystemExit(f"the {self.name} instance has not {what} within {timeout_s:.0f} s")
            return self._of(what)[times - 1]

    def _of(self, what: str) -> list[dict[str, Any]]:
        return [one for one in self.told if what in one]

    def ask(self, seed: int) -> None:
        assert self._process.stdin is not None
        print(seed, file=self._process.stdin, flush=True)

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def series(self, begin: float) -> list[tuple[float, float]]:
        return [(one["at"] - begin, one["mapped"] / 2**30) for one in self._of("mapped")]


class Card:
    """What is taken of its memory, by everybody."""

    def __init__(self) -> None:
        self.series: list[tuple[float, float]] = []
        self._process: subprocess.Popen[str] | None = None
        try:
            self._process = subprocess.Popen(
                ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "200"],
                stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()
        except FileNotFoundError:
            pass

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            self.series.append((time.time(), float(line.split()[0]) / 1024))

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()


def run(asked: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        write_model(model, SHAPES[asked.shape])
        card = Card()
        instances = [Instance(name, str(model), asked) for name in NAMES]
        first, second = instances
        capacities = [one.wait_for("ready")["capacity"] for one in instances]
        begin = time.time()
        time.sleep(3.0)
        first.ask(1)
        time.sleep(asked.later)
        second.ask(2)
        ended = [first.wait_for("ended"), second.wait_for("ended")]
        time.sleep(asked.rest)
        if asked.again:
            first.ask(3)
            ended.append(first.wait_for("ended", 2))
            time.sleep(asked.rest)
        for one in instances:
            one.end()
        card.end()
    return {
        "capacities_gib": [nbytes / 2**30 for nbytes in capacities], "ended": ended,
        "mapped_gib": {one.name: one.series(begin) for one in instances},
        "last": {one.name: one._of("grown")[-1] for one in instances},
        "taken_gib": [(at - begin, used) for at, used in card.series],
    }  # fmt: skip


def draw(record: dict[str, Any], out: Path) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        return
    figure, axes = pyplot.subplots(figsize=(8, 3.2))
    for name, series in record["mapped_gib"].items():
        axes.plot(*zip(*series, strict=True), label=f"KV of the {name} instance")
    if record["taken_gib"]:
        axes.plot(
            *zip(*record["taken_gib"], strict=True), label="taken of the card", color="gray", linewidth=0.8
        )
    axes.set_xlabel("seconds")
    axes.set_ylabel("GiB")
    axes.set_xlim(left=0)
    axes.legend(loc="upper right", fontsize=8)
    figure.tight_layout()
    figure.savefig(out)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=tuple(SHAPES), default="0.6B")
    parser.add_argument("--requests", type=int, default=110, help="of each instance, all at once")
    parser.add_argument("--prompt", type=int, default=8000, help="tokens")
    parser.add_argument("--reply", type=int, default=512, help="tokens")
    parser.add_argument(
        "--later", type=float, default=6.0, help="seconds after which the second instance is asked"
    )
    parser.add_argument("--rest", type=float, default=25.0, help="seconds with nothing to do")
    parser.add_argument("--again", action="store_true", help="ask the first once more at the end")
    parser.add_argument("--engine-args", default="{}", help="JSON of further options of LLM(...)")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "shared-card")
    asked = parser.parse_args()
    if asked.model is not None:
        child(asked)
        return 0
    record = run(asked)
    failed = sum(len(one["failed"]) for one in record["ended"])
    shares = ", ".join(f"{share:.1f}" for share in record["capacities_gib"])
    print(
        f"KV that each could have: {shares} GiB; {asked.requests} requests of {asked.prompt} + {asked.reply} tokens each time"
    )
    for who, one in zip(("first", "second", "first again"), record["ended"], strict=False):
        print(
            f"{who}: {one['seconds']:.1f} s, {len(one['failed'])} failed, {one['preemptions']} preemptions so far"
        )
    for name, series in record["mapped_gib"].items():
        last = record["last"][name]
        print(
            f"{name}: {series[0][1]:.2f} GiB mapped at first, {max(size for _, size in series):.1f} at most, {series[-1][1]:.2f} at the end; "
            f"{last['grown']} segments grown, {last['shrunk']} shrunk, {last['refused']} times refused"
        )
    if record["taken_gib"]:
        print(f"taken of the card: {max(size for _, size in record['taken_gib']):.1f} GiB at most")
    record |= {
        "machine": collect(),
        "when": datetime.now(UTC).isoformat(timespec="minutes"),
        "asked": sys.argv[1:],
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.with_suffix(".json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    draw(record, asked.out.with_suffix(".svg"))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
