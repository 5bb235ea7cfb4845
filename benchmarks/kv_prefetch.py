"""Decode steps while KV comes up from host memory, beside the same steps while nothing does.

    python -m benchmarks.kv_prefetch [--shape 8B] [--streams 16] [--prefix 8192] [--every 16] [--engine-args '{"device": "cuda"}']

Steady streams decode. At every `--every`th token of the first one, but for its last, a visitor comes with a long known
beginning and a few words of its own, and goes after one token. In the phase `device` those beginnings lie in the device's cache, in
`host` each must come up from host memory first; all else is the same. Both phases run in one process, in turn. What each
found where is counted and must be so, or it stops. Medians go to `benchmarks/results/kv-prefetch.*`.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import count, cycle, pairwise
from pathlib import Path
from typing import Any

from benchmarks.kv_tiers import SHAPES, gib_of
from benchmarks.serving_soak import write_model
from xllm import LLM, SamplingParams
from xllm.bench.collect_env import collect
from xllm.core.stats import SchedulerStats
from xllm.wire.messages import Outputs, Submit

HERE = Path(__file__).resolve().parent
WAYS = ("none", "device", "host")
HOT = 2  # beginnings that stay on the device; of the others there are so many that they cannot
OWN = 8  # a visitor's own tokens
SETTLED_S = 0.6  # an engine tells its counters four times a second


class Scene:
    """Streams and visitors of one engine."""

    def __init__(self, llm: LLM, asked: argparse.Namespace, device_tokens: int):
        self._llm, self._asked = llm, asked
        self._rng = random.Random(1)
        self._ids = count()
        block = llm.config.cache.block_size
        self.blocks = asked.prefix // block
        self.prefix = self.blocks * block
        self._known = {
            "device": [self._tokens(self.prefix) for _ in range(HOT)],
            "host": [self._tokens(self.prefix) for _ in range(1 + -(-device_tokens // self.prefix))],
        }

    def fill(self) -> None:
        """All beginnings are computed once, and saved."""
        for known in self._known.values():
            for prefix in known:
                self._run([prefix], 1)

    def phase(self, way: str) -> dict[str, Any]:
        asked, self._visits = self._asked, 0
        if way == "device":
            for prefix in self._known[way]:
                self._run([prefix], 1)
        visitors = self._visitors(cycle(self._known[way])) if way in self._known else None
        before = self._stats()
        begin = time.perf_counter()
        times = self._run([self._tokens(asked.prompt) for _ in range(asked.streams)], asked.tokens, visitors)
        seconds = time.perf_counter() - begin
        gaps = [1e3 * (late - early) for early, late in pairwise(times)]
        after = self._stats()
        steps = after.executor.steps - before.executor.steps
        loaded = after.tiers[0].hits - before.tiers[0].hits
        self._check(way, loaded)
        return {
            "way": way, "visits": self._visits, "steps": steps, "loaded_blocks": loaded, "seconds": seconds,
            "stored_blocks": after.tiers[0].stored - before.tiers[0].stored,
            "loaded_gb_s": loaded * self._llm.config.cache.block_bytes / seconds / 1e9,
            "step_ms": statistics.fmean(gaps), "step_p50_ms": statistics.median(gaps), "device_ms": 1e3 * (after.executor.device_s - before.executor.device_s) / steps,
            "between_ms": 1e3 * (after.executor.bubble_s - before.executor.bubble_s) / steps,
        }  # fmt: skip

    def _check(self, way: str, loaded: int) -> None:
        wanted = self._visits * self.blocks if way == "host" else 0
        if loaded < 0.9 * wanted or loaded > wanted:
            raise SystemExit(f"{way}: {loaded} blocks came from host memory, of {wanted} that should have")

    def _visitors(self, prefixes: Iterator[Sequence[int]]) -> Iterator[list[int]]:
        for prefix in prefixes:
            self._visits += 1
            yield [*prefix, *self._tokens(OWN)]

    def _run(
        self, prompts: list[list[int]], tokens: int, visitors: Iterator[list[int]] | None = None
    ) -> list[float]:
        """When the tokens of the first one came."""
        streams = [self._send(prompt, tokens) for prompt in prompts]
        open, times = set(streams), list[float]()
        last = tokens - 3 * self._asked.every
        while open:
            message = self._llm._client.receive(1.0)
            for output in message.outputs if isinstance(message, Outputs) else ():
                if output.error is not None:
                    raise SystemExit(f"a request failed: {output.error}")
                if output.finish is not None:
                    open.discard(output.request_id)
                if output.request_id != streams[0]:
                    continue
                times += [time.perf_counter()] * len(output.token_ids)
                if visitors is not None and len(times) % self._asked.every == 0 and len(times) < last:
                    open.add(self._send(next(visitors), 1))
        return times

    def _send(self, prompt: list[int], tokens: int) -> str:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        id = f"prefetch-{next(self._ids)}"
        self._llm._client.send(Submit(request_id=id, prompt_token_ids=prompt, params=params))
        return id

    def _stats(self) -> SchedulerStats:
        time.sleep(SETTLED_S)
        return self._llm.stats()

    def _tokens(self, number: int) -> list[int]:
        return self._rng.choices(range(3, self._llm.config.model.vocab_size), k=number)


def measure(asked: argparse.Namespace) -> list[dict[str, Any]]:
    shape = SHAPES[asked.shape]
    streaming = asked.streams * (asked.prompt + asked.tokens + 128)
    device = streaming + (HOT + 2) * (asked.prefix + 128)
    host = 2 * device + 4 * streaming
    with tempfile.TemporaryDirectory() as model:
        write_model(Path(model), shape)
        with LLM(
            model, load_format="dummy", skip_tokenizer_init=True, max_num_seqs=asked.streams + 8,
            max_model_len=max(asked.prefix, asked.prompt + asked.tokens) + 128, kv_offloading_size=gib_of(host, shape),
            kv_cache_memory_bytes=int(gib_of(device, shape) * 2**30), **json.loads(asked.engine_args),
        ) as llm:  # fmt: skip
            scene = Scene(llm, asked, device)
            scene.fill()
            scene.phase("host")  # the first of its kind: what is measured and compiled as it goes
            runs = []
            for repeat in range(asked.repeats):
                for way in WAYS[:: 1 if repeat % 2 == 0 else -1]:
                    runs.append(scene.phase(way))
                    print(", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in runs[-1].items()), flush=True)  # fmt: skip
    return runs


def page(asked: argparse.Namespace, runs: list[dict[str, Any]]) -> str:
    def middle(way: str, key: str) -> float:
        return statistics.median(run[key] for run in runs if run["way"] == way)

    lines = [
        f"# Decode steps while KV comes up from host memory, {datetime.now(UTC).strftime('%Y-%m-%d %H:%M UTC')}", "",
        f"`{' '.join(['python -m benchmarks.kv_prefetch', *sys.argv[1:]])}`", "",
        f"{asked.shape} shape, {asked.streams} streams of {asked.prompt} + {asked.tokens} tokens; a visitor with {asked.prefix} known tokens every "
        f"{asked.every} steps. Medians of {asked.repeats} runs of each kind, in turn.", "",
        "| known beginnings lie | visitors | blocks loaded | GB/s | ms between a stream's tokens | beside `device` | median | ms a step on the device | between two |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for way in WAYS:
        share = middle(way, "step_ms") / middle("device", "step_ms")
        lines.append(
            f"| {'no visitors' if way == 'none' else way} | {middle(way, 'visits'):.0f} | {middle(way, 'loaded_blocks'):.0f} | "
            f"{middle(way, 'loaded_gb_s'):.1f} | {middle(way, 'step_ms'):.3f} | {share:.3f} | {middle(way, 'step_p50_ms'):.3f} | "
            f"{middle(way, 'device_ms'):.3f} | {middle(way, 'between_ms'):.3f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=tuple(SHAPES), default="0.6B")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a stream's prompt")
    parser.add_argument("--tokens", type=int, default=768, help="that a stream decodes")
    parser.add_argument("--prefix", type=int, default=8192, help="known tokens of a visitor")
    parser.add_argument("--every", type=int, default=16, help="steps between visitors")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engine-args", default="{}", help="JSON of further options of LLM(...)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "kv-prefetch")
    asked = parser.parse_args()
    runs = measure(asked)
    text = page(asked, runs)
    asked.out.with_suffix(".md").write_text(text, encoding="utf-8")
    record = {"machine": collect(), "runs": runs}
    asked.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
