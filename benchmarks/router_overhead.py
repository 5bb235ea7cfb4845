"""What a router costs: added time to the first token, streamed chunks per second on one core, memory under many streams.

    python -m benchmarks.router_overhead [--pairs 200] [--seconds 20] [--hold 30] [--streams 1000]

Real processes and sockets. The first part asks one `xllm serve demo` in turn itself and through a router. The others put
the router on the first core, and clients with instances whose steps take modelled time on the second, at rates that go up.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from benchmarks.cluster_rig import Foreign, Rig, cpu_s, healthy, serving
from xllm.bench.collect_env import collect
from xllm.bench.http import HttpClient

HERE = Path(__file__).resolve().parent
MODEL = "demo"
IDS = range(300, 3800)  # of the demo's vocabulary
PROMPTS = (64, 512, 1536)  # tokens
BAR_MS, BAR_CHUNKS = 3.0, 2000
RATES = (1000, 2000, 3000, 4000, 6000, 8000)  # tokens/s offered by the instances
AT_ONCE = 200  # streams while rates are measured
HELD_RATE = 1500  # tokens/s of all the streams that are held
INSTANCES = 2
ROUTER_CORE, OTHER_CORE = {0}, {1}
SETTLE_S = 3.0
FILL_S = 25.0  # of short answers, before memory is looked at
FLAT = 1.05  # of memory: what buffers that fill up slowly may take


def body(prompt: list[int], tokens: int) -> bytes:
    asked = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    return json.dumps(asked).encode()


def some(rng: random.Random, count: int) -> list[int]:
    return rng.choices(IDS, k=count)


# ---- the first token


async def first_token_s(client: HttpClient, request: bytes) -> float:
    first: list[float] = []

    def take(status: int, piece: bytes, now: float) -> None:
        assert status == 200, piece
        first.append(now)

    begin = time.perf_counter()
    await client.stream(request, take)
    return first[0] - begin


async def in_turn(direct: str, router: str, tokens: int, pairs: int) -> dict[str, float]:
    """Milliseconds. Prompts are random, so nothing is cached; who is asked first changes with every pair."""
    rng = random.Random(tokens)
    samples: dict[str, list[float]] = {direct: [], router: []}
    async with HttpClient(direct) as one, HttpClient(router) as other:
        clients = [(direct, one), (router, other)]
        for pair in range(-10, pairs):
            for url, client in clients if pair % 2 else clients[::-1]:
                request = client.prepare("POST", "/v1/completions", body(some(rng, tokens), 2))
                seconds = await first_token_s(client, request)
                if pair >= 0:
                    samples[url].append(seconds * 1000)
    asked, routed = sorted(samples[direct]), sorted(samples[router])
    return {
        "prompt_tokens": tokens,
        "direct_p50": statistics.median(asked),
        "router_p50": statistics.median(routed),
        "added_p50": statistics.median(routed) - statistics.median(asked),
        "added_p90": routed[len(routed) * 9 // 10] - asked[len(asked) * 9 // 10],
    }


def first_tokens(pairs: int) -> list[dict[str, float]]:
    with Rig() as rig:
        url, _ = rig.instance("one", MODEL)
        rig.until(lambda: healthy(url), "one")
        router, _ = rig.router("router", MODEL)
        rig.until(lambda: serving(router, 1), "router")
        rows = []
        for tokens in PROMPTS:
            with Foreign() as foreign:
                row = asyncio.run(in_turn(url, router, tokens, pairs))
            rows.append(row | {"foreign": foreign.share})
        return rows


# ---- streams


@dataclass
class Streams:
    """What clients see of all streams. Chunks are counted by their first bytes: they are not the ones to be slow."""

    chunks: int = 0
    tokens: int = 0
    failed: list[str] = field(default_factory=list)
    open: int = 0

    def take(self, status: int, piece: bytes, now: float) -> None:
        if status != 200:
            self.failed.append(piece[:200].decode(errors="replace"))
            return
        self.chunks += piece.count(b"data: {")
        self.tokens += piece.count(b'"token_ids":[') and sum(
            part[: part.index(b"]")].count(b",") + 1 for part in piece.split(b'"token_ids":[')[1:]
        )

    async def one(self, client: HttpClient, rng: random.Random, tokens: int) -> None:
        """One stream after the other, for ever."""
        while True:
            asked = json.loads(body(some(rng, 32), tokens)) | {"return_token_ids": True}
            request = client.prepare("POST", "/v1/completions", json.dumps(asked).encode())
            self.open += 1
            try:
                await client.stream(request, self.take)
            except OSError as e:
                self.failed.append(str(e))
            finally:
                self.open -= 1


async def streaming(
    url: str, router: psutil.Process, number: int, tokens: int, seconds: float, ramp_s: float
) -> dict[str, Any]:
    streams, rng = Streams(), random.Random(number)
    async with HttpClient(url) as client:
        tasks = []
        for _ in range(number):
            tasks.append(asyncio.create_task(streams.one(client, rng, tokens)))
            await asyncio.sleep(ramp_s / number)
        await asyncio.sleep(SETTLE_S)
        begin, chunks, told, used = time.perf_counter(), streams.chunks, streams.tokens, cpu_s([router])
        rss = []
        while time.perf_counter() - begin < seconds:
            await asyncio.sleep(1.0)
            rss.append(router.memory_info().rss / 2**20)
        took = time.perf_counter() - begin
        watched = {
            "chunks_s": (streams.chunks - chunks) / took, "tokens_s": (streams.tokens - told) / took,
            "router_cpu": (cpu_s([router]) - used) / took, "open": streams.open, "failed": len(streams.failed),
            "errors": sorted(set(streams.failed))[:3], "rss_mib": rss,
        }  # fmt: skip
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return watched


def rig_for(rig: Rig, number: int, step_ms: float) -> tuple[str, psutil.Process]:
    """A router over instances that have room for so many streams, and make a token of each in so many ms."""
    each = -(-number // INSTANCES)
    rig.modelled(
        "modelled", INSTANCES, "--model", MODEL, "--vocab-size", "4096", "--base-ms", f"{step_ms:g}", "--token-us", "0",
        "--max-num-seqs", str(each), "--num-blocks", str(each * 140), "--max-model-len", "2048", cores=OTHER_CORE,
    )  # fmt: skip
    url, router = rig.router("router", MODEL, "--routing-policy", "least_loaded", cores=ROUTER_CORE)
    rig.until(lambda: serving(url, INSTANCES), "router")
    return url, router


def at_rate(rate: int, seconds: float) -> dict[str, Any]:
    with Rig() as rig:
        url, router = rig_for(rig, AT_ONCE, AT_ONCE / rate * 1000)
        with Foreign() as foreign:
            seen = asyncio.run(streaming(url, router, AT_ONCE, 500, seconds, 1.0))
    return {"offered": rate} | seen | {"foreign": foreign.share}


def held(number: int, seconds: float) -> dict[str, Any]:
    with Rig() as rig:
        url, router = rig_for(rig, number, number / HELD_RATE * 1000)
        # the router keeps the stories of some thousand requests: first as many as that
        asyncio.run(streaming(url, router, number, 4, FILL_S, 2.0))
        with Foreign() as foreign:
            seen = asyncio.run(streaming(url, router, number, 150, max(seconds, 15.0), 5.0))
    rss = seen["rss_mib"]
    return {
        "streams": number,
        "seconds": len(rss),
        "rss_10s": rss[9],
        "rss_end": rss[-1],
        "foreign": foreign.share,
    } | seen


# ---- the report


def report(
    first: list[dict[str, float]], rates: list[dict[str, Any]], hold: dict[str, Any] | None
) -> list[str]:
    lines = []
    if first:
        lines += [
            "## Time to the first token", "",
            "The same instance (`xllm serve demo`) asked itself and through a router, in turn, one request at a time, "
            "random prompts. Milliseconds.", "",
            "| prompt tokens | itself, p50 | through the router, p50 | added, p50 | added, p90 | bar | | foreign load |",
            "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for row in first:
            lines.append(
                f"| {row['prompt_tokens']} | {row['direct_p50']:.2f} | {row['router_p50']:.2f} | {row['added_p50']:.2f} | "
                f"{row['added_p90']:.2f} | < {BAR_MS:g} | {kept(row['added_p50'] < BAR_MS)} | {row['foreign']:.0%} |"
            )
        lines.append("")
    if rates:
        lines += [
            "## Chunks per second of one process on one core", "",
            f"{AT_ONCE} streams, {INSTANCES} modelled instances that offer so many tokens a second. A router that does not keep "
            "up sends several tokens in a chunk, so chunks fall behind tokens before anything waits.", "",
            "| tokens/s offered | tokens/s | chunks/s | of the router's core | failed | foreign load |",
            "|---|---|---|---|---|---|",
        ]  # fmt: skip
        for row in rates:
            lines.append(
                f"| {row['offered']} | {row['tokens_s']:.0f} | {row['chunks_s']:.0f} | {row['router_cpu']:.0%} | "
                f"{row['failed']} | {row['foreign']:.0%} |"
            )
        most = max(row["chunks_s"] for row in rates)
        lines += ["", f"Most chunks/s: {most:.0f} (bar: {BAR_CHUNKS}, {kept(most >= BAR_CHUNKS)}).", ""]
    if hold is not None:
        flat = hold["rss_end"] <= FLAT * hold["rss_10s"]
        lines += [
            "## Streams held", "",
            "| streams | open at the end | failed | seconds | chunks/s | of the router's core | RSS after 10 s, MiB | RSS at the "
            "end | |", "|---|---|---|---|---|---|---|---|---|",
            f"| {hold['streams']} | {hold['open']} | {hold['failed']} | {hold['seconds']:.0f} | {hold['chunks_s']:.0f} | "
            f"{hold['router_cpu']:.0%} | {hold['rss_10s']:.1f} | {hold['rss_end']:.1f} | {'flat' if flat else '**grows**'} |", "",
        ]  # fmt: skip
    return lines


def kept(so: bool) -> str:
    return "kept" if so else "**missed**"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pairs", type=int, default=200, help="requests of each kind and prompt length; 0: none"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="at each rate; 0: none")
    parser.add_argument("--rates", type=int, nargs="+", default=list(RATES))
    parser.add_argument("--hold", type=float, default=30.0, help="seconds that streams are held; 0: none")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "router-overhead")
    asked = parser.parse_args()
    if (os.cpu_count() or 1) < 2:
        raise SystemExit("it takes two cores")
    first = first_tokens(asked.pairs) if asked.pairs else []
    os.sched_setaffinity(0, OTHER_CORE)
    rates = [at_rate(rate, asked.seconds) for rate in asked.rates] if asked.seconds else []
    hold = held(asked.streams, asked.hold) if asked.hold else None
    machine = collect()
    lines = [
        f"# What a router costs, {datetime.now(UTC).strftime('%Y-%m-%d %H:%M UTC')}", "",
        f"`python -m benchmarks.router_overhead {' '.join(sys.argv[1:])}`", "",
        f"{psutil.cpu_count()} cores of {machine['cpu']['model']}, Python {machine['python']}. Foreign load: of one core, used by "
        "others than the processes of the measurement.", "",
        *report(first, rates, hold),
    ]  # fmt: skip
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{asked.out}.md").write_text("\n".join(lines), encoding="utf-8")
    record = {"machine": machine, "first_token": first, "rates": rates, "held": hold}
    Path(f"{asked.out}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
