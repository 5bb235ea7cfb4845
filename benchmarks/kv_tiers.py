"""Conversations whose KV is larger than the device's: with host memory and disk below it, and without.

    python -m benchmarks.kv_tiers [--shape 0.6B] [--talks 64] [--rounds 8] [--share 0.25] [--engine-args '{"device": "cuda"}']

Each conversation says something in every round, all of them in turn, and each reply becomes part of its history. The
device's KV cache holds `--share` of what they are in the end, host memory all of it. Every way runs in a process of its
own, `--repeats` times; medians go to `benchmarks/results/kv-tiers.*`. The same tokens come out every time, or it
stops (but for `--inexact`).
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import LARGE, SHAPE
from benchmarks.load import MARK
from benchmarks.serving_soak import TINY, write_model
from xllm.bench.collect_env import collect

SHAPES = {"0.6B": SHAPE, "8B": LARGE, "tiny": TINY}
HERE = Path(__file__).resolve().parent
WAYS = {"device alone": (False, False), "host memory": (True, False), "host memory and disk": (True, True)}


def gib_of(tokens: int, shape: dict[str, Any]) -> float:
    """In bfloat16."""
    each = 4 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    return tokens * each / 2**30


def run(asked: argparse.Namespace, way: str) -> dict[str, Any]:
    """One way, in this process."""
    from xllm import LLM, SamplingParams

    shape = SHAPES[asked.shape]
    longest = asked.rounds * (asked.said + asked.reply)
    total = asked.talks * longest
    host, disk = WAYS[way]
    rng = random.Random(1)
    params = SamplingParams(temperature=0.0, max_tokens=asked.reply, ignore_eos=True, detokenize=False)
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        write_model(model, shape)
        tiers: dict[str, Any] = {"kv_offloading_size": 1.1 * gib_of(total, shape)} if host else {}
        if disk:
            tiers |= {"kv_offloading_size": 0.3 * gib_of(total, shape), "kv_disk_path": scratch}
            tiers |= {"kv_disk_size": 1.2 * gib_of(total, shape)}
        with LLM(
            str(model), load_format="dummy", skip_tokenizer_init=True, max_model_len=longest + 64, max_num_seqs=asked.at_once,
            kv_cache_memory_bytes=int(asked.share * gib_of(total, shape) * 2**30), **tiers, **json.loads(asked.engine_args),
        ) as llm:  # fmt: skip
            histories: list[list[int]] = [[] for _ in range(asked.talks)]
            waits: list[float] = []
            begin = time.perf_counter()
            for _ in range(asked.rounds):
                for history in histories:
                    history += [rng.randrange(3, shape["vocab_size"]) for _ in range(asked.said)]
                prompts = [{"prompt_token_ids": history} for history in histories]
                for history, out in zip(
                    histories, llm.generate(prompts, params, use_tqdm=False), strict=True
                ):
                    history += out.outputs[0].token_ids
                    if out.metrics is not None and out.metrics.prefill_s is not None:
                        waits.append(out.metrics.prefill_s)
            seconds = time.perf_counter() - begin
            stats = llm.stats()
    tiers_told = {
        t.medium: {"hits": t.hits, "stored": t.stored, "evicted": t.evicted, "failures": t.failures, "skipped": t.skipped}
        for t in stats.tiers
    }  # fmt: skip
    return {
        "way": way, "seconds": seconds, "prefill_ms": 1e3 * statistics.median(waits), "computed": stats.prompt_tokens,
        "queried": stats.prefix_queried_tokens, "cached": stats.prefix_hit_tokens, "tiers": tiers_told,
        "tokens": [hash(tuple(history)) for history in histories],
    }  # fmt: skip


def apart(asked: argparse.Namespace, way: str) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.kv_tiers", *sys.argv[1:], "--only", way]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
    line = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
    if line is None:
        raise SystemExit(f"{way} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    result: dict[str, Any] = json.loads(line.removeprefix(MARK))
    print(
        f"{way}: {result['seconds']:.1f} s, {result['computed']} prompt tokens computed, {result['tiers']}",
        flush=True,
    )
    return result


def table(asked: argparse.Namespace, results: dict[str, list[dict[str, Any]]], command: str) -> str:
    total = asked.talks * asked.rounds * (asked.said + asked.reply)
    lines = [
        f"# Conversations larger than the device's KV, {datetime.now(UTC).strftime('%Y-%m-%d %H:%M UTC')}", "", f"`{command}`", "",
        f"{asked.shape} shape, {asked.talks} conversations of {asked.rounds} rounds, {asked.said} tokens said and {asked.reply} replied each; {total} tokens in "
        f"the end, of which the device holds {asked.share:.0%}. Median of {asked.repeats}.", "",
        "| | seconds | beside the device alone | prompt tokens computed | found in a cache | loaded from host, disk, blocks |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    alone = statistics.median(r["seconds"] for r in results["device alone"])
    for way, runs in results.items():
        seconds = statistics.median(r["seconds"] for r in runs)
        last = runs[-1]
        loaded = ", ".join(str(tier["hits"]) for tier in last["tiers"].values()) or "-"
        lines.append(
            f"| {way} | {seconds:.1f} | {alone / seconds:.2f} x faster | {last['computed']:,} | "
            f"{last['cached'] / max(1, last['queried']):.0%} | {loaded} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=tuple(SHAPES), default="0.6B")
    parser.add_argument("--talks", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--said", type=int, default=512, help="tokens of a conversation in a round")
    parser.add_argument("--reply", type=int, default=32)
    parser.add_argument("--at-once", type=int, default=16, help="conversations that run at once")
    parser.add_argument("--share", type=float, default=0.25, help="of all their KV that the device holds")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engine-args", default="{}", help="JSON of further options of LLM(...)")
    parser.add_argument(
        "--inexact",
        action="store_true",
        help="replies may differ: in bfloat16 on a card they depend on the batch",
    )
    parser.add_argument("--only", choices=tuple(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "kv-tiers")
    asked = parser.parse_args()
    if asked.only is not None:
        print(MARK + json.dumps(run(asked, asked.only)))
        return
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(asked.repeats):
        for way, runs in results.items():
            runs.append(apart(asked, way))
    first, *others = (r["tokens"] for runs in results.values() for r in runs)
    equal = [a == b for other in others for a, b in zip(first, other, strict=True)]
    print(f"{sum(equal)} of {len(equal)} conversations are the same as in the first run")
    if not all(equal) and not asked.inexact:
        raise SystemExit("the replies differ between the ways")
    text = table(asked, results, " ".join(["python -m benchmarks.kv_tiers", *sys.argv[1:]]))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.with_suffix(".md").write_text(text, encoding="utf-8")
    record = {"machine": collect(), "results": results}
    asked.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
