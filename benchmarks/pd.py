"""Prefill and decode on different instances: what that does for streams, and what moving KV costs.

    python -m benchmarks.pd [--model demo|0.6B|8B] [--device cpu|cuda] [--cards one|two] [--parts streams,ttft,kv,simulated]

`streams`: tokens of steady streams under bursts of long prompts, one prefill and one decode instance against two mixed
ones, through an `xllm router` each, in turn. `ttft`: a long prompt on two idle instances, computed by one of them alone and
by the other for it, in turn. `kv`: bytes per second that an instance fetches of what the other has computed before, by
block size, and `benchmarks.kv_transport` beside it. `simulated`: the first part over instances without a model. Shapes
other than the demo have random weights. On a card each instance takes `--kv-gib` and its weights; `--cards one` puts all on
the first card, which then holds four.
"""

import argparse
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Self

from benchmarks import pd_report
from benchmarks.cluster_rig import Foreign, Rig, ask, healthy, serving
from benchmarks.kv_tiers import SHAPES
from benchmarks.pd_load import Direct, Load, Target, play, simulated, trace_of
from benchmarks.serving_soak import metrics, write_model
from xllm.bench import simulate, simulate_report
from xllm.bench.collect_env import collect
from xllm.bench.simulate_options import SimulateOptions
from xllm.core.peers import KvFrom

HERE = Path(__file__).resolve().parent
SETTINGS = {"mixed": ("both", "both"), "pd": ("prefill", "decode")}
COUNTED = ("fetches", "fetched_blocks")
TOLD_S = 0.6  # an engine tells its counters four times a second
LOADS = {
    "cpu": Load(4, 32, 256, burst=4, every_s=1.2, bursts=12, long_prompt=1800),
    "cuda": Load(32, 128, 512, burst=4, every_s=2.0, bursts=10, long_prompt=8192),
}
LENGTHS = {"cpu": "512,1024,1800", "cuda": "2048,8192,16384"}
SIZES = {"cpu": "16,64", "cuda": "16,64,128"}
KV_GIB = {"cpu": 0.25, "cuda": 10.0}
BUDGETS = {"cpu": 512, "cuda": 2048}  # tokens of a step
# what steps take in the simulator: of the demo on a core, and of 8B on an H200 each, over NVLink
STEPS: dict[str, dict[str, float]] = {
    "cpu": {"base_ms": 1.0, "token_us": 60.0, "fetch_us": 1.0},
    "cuda": {"base_ms": 4.1, "token_us": 26.0, "fetch_us": 0.7},
}
SCALE, SIMULATED_BURSTS = 4.0, 4


class Pair:
    """Two instances and a router over them, started."""

    def __init__(self, rig: Rig, asked: argparse.Namespace, setting: str, *flags: str):
        self._rig = rig
        self.names = [f"{setting}-{n}" for n in range(2)]
        self.urls = list[str]()
        for n, role in enumerate(SETTINGS[setting]):
            own = ("--role", role, *engine(asked), *flags)
            with card(asked, n):
                url, _ = rig.instance(self.names[n], asked.directory, *own, cluster=setting)
            self.urls.append(url)
        self._router_name = f"{setting}-router"
        self.router, _ = rig.router(self._router_name, asked.directory, cluster=setting)
        self.target = Target(self.router, asked.directory, asked.ids)
        self._found: dict[str, Any] = {}

    def ready(self) -> Self:
        """Waits until all of it answers."""
        for name, url in zip(self.names, self.urls, strict=True):
            self._rig.until(partial(healthy, url), name)
        self._rig.until(lambda: serving(self.router, 2), self._router_name)
        self._found = {one["id"]: one for one in ask(self.router, "/v1/instances")["data"]}
        return self

    def peer(self, compute: bool = True) -> KvFrom:
        """The first instance, to get KV from, and what it has not got yet if it is to `compute`."""
        one = self._found[self.names[0]]
        return KvFrom(one["address"], one["id"], one["epoch"], compute)

    def direct(self, n: int) -> Direct:
        return Direct(self._found[self.names[n]]["address"])

    def fetched(self) -> dict[str, float]:
        """Counters of both instances."""
        time.sleep(TOLD_S)
        found = [metrics(url) for url in self.urls]
        return {name: sum(one.get(f"kv_peer_{name}_total", 0.0) for one in found) for name in COUNTED}


@contextmanager
def card(asked: argparse.Namespace, n: int) -> Iterator[None]:
    """What is started meanwhile sees one card."""
    if asked.device != "cuda":
        yield
        return
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = before.split(",") if before else ["0", "1"]
    os.environ["CUDA_VISIBLE_DEVICES"] = cards[n if asked.cards == "two" else 0]
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def engine(asked: argparse.Namespace) -> list[str]:
    flags = ["--device", asked.device, "--kv-cache-memory-bytes", str(int(asked.kv_gib * 2**30)),
             "--max-num-batched-tokens", str(asked.budget), "--kv-transport", asked.kv_transport]  # fmt: skip
    if asked.device == "cpu":
        flags += ["--threads", "1"]
    if asked.model != "demo":
        load = asked.load
        ends = (load.long_prompt + load.long_output, load.stream_prompt + load.stream_output)
        flags += ["--load-format", "dummy", "--max-model-len", str(max(*asked.lengths, *ends) + 64)]
    return flags


# ---- the parts


def streams(asked: argparse.Namespace, pairs: dict[str, Pair]) -> list[dict[str, Any]]:
    for pair in pairs.values():  # what is imported, compiled, connected and measured with the first requests
        play(pair.target, dataclasses.replace(asked.load, bursts=1), f"warm {pair.names[0]}")
    runs = []
    for repeat in range(asked.repeats):
        for setting in list(pairs)[:: 1 if repeat % 2 == 0 else -1]:
            pair = pairs[setting]
            before = pair.fetched()
            with Foreign() as foreign:
                run = play(pair.target, asked.load, f"streams {setting} {repeat}")
            after = pair.fetched()
            run |= {"setting": setting, "repeat": repeat, "foreign": foreign.share}
            run |= {name: after[name] - before[name] for name in before}
            runs.append(run)
            print(pd_report.run_line(run), flush=True)
    return runs


def first_tokens(asked: argparse.Namespace, pair: Pair) -> list[dict[str, Any]]:
    runs = []
    own, other, peer = pair.direct(1), pair.direct(0), pair.peer()
    for tokens in asked.lengths:
        for repeat in range(asked.pairs + 1):  # the first ones connect
            for way in list(pd_report.WAYS)[:: 1 if repeat % 2 == 0 else -1]:
                id = f"ttft {way} {tokens} {repeat}"
                door = other if way == "there" else own
                took = door.first_token(id, prompt_of(asked, id, tokens), peer if way == "paired" else None)
                if repeat:
                    runs.append({"way": way, "tokens": tokens, **took})
        print(pd_report.ttft_line(runs, tokens), flush=True)
    own.close()
    other.close()
    return runs


def prompt_of(asked: argparse.Namespace, seed: str, tokens: int) -> list[int]:
    """That no other seed's begins like."""
    return random.Random(seed).choices(asked.ids, k=tokens)


def blocks(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """One instance computes a prompt, then the other one fetches it."""
    found: list[dict[str, Any]] = []
    tokens = max(asked.lengths)
    for size in asked.sizes:
        with Rig() as rig:
            pair = Pair(rig, asked, "pd", "--block-size", str(size)).ready()
            there, own, peer = pair.direct(0), pair.direct(1), pair.peer(compute=False)  # nor a first token
            for repeat in range(asked.pairs + 2):  # the first ones connect
                id = f"kv {size} {repeat}"
                prompt = prompt_of(asked, id, tokens)
                there.first_token(id, prompt)
                took = own.first_token(id, prompt, peer)
                if repeat > 1:
                    found.append({"block_size": size, "block_bytes": own.block_bytes, **took})
            there.close()
            own.close()
        print(pd_report.kv_line(found, size), flush=True)
    return found


def transport_alone(asked: argparse.Namespace, runs: list[dict[str, Any]]) -> str:
    """The table of `benchmarks.kv_transport` for the same pieces."""
    pieces = sorted({one["block_bytes"] for one in runs})
    total = int(max(pd_report.bytes_of(one) for one in runs))
    command = [sys.executable, "-m", "benchmarks.kv_transport", "--device", asked.device, "--total", str(total),
               "--sizes", ",".join(map(str, pieces))]  # fmt: skip
    if asked.kv_transport != "auto":
        command += ["--transports", asked.kv_transport]
    if asked.device == "cuda" and asked.cards == "two":
        command += ["--giver-card", "1"]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=HERE.parent).stdout


def in_simulator(asked: argparse.Namespace, kind: str) -> list[dict[str, Any]]:
    found = []
    load = dataclasses.replace(asked.load if kind == asked.device else LOADS[kind], bursts=SIMULATED_BURSTS)
    steps = STEPS[kind]
    for setting, prefill in (("mixed", 0), ("pd", 1)):
        options = SimulateOptions(
            instances=2, prefill=prefill, workers=2, time_scale=SCALE, context_ns=0.0, plots=False,
            max_num_batched_tokens=BUDGETS[kind], max_num_seqs=64, num_blocks=16384, base_ms=steps["base_ms"],
            token_us=steps["token_us"], fetch_us=steps["fetch_us"],
        )  # fmt: skip
        rows = simulate.fitting(trace_of(load, steps["base_ms"]), options)
        done, answering, lateness = simulate.play("prefix_aware", rows, options)
        host = simulate_report.summarise("prefix_aware", done, answering, lateness)["host"]
        run = simulated(done, load) | {"setting": setting, "kind": kind, **steps, "host": host}
        run["load"] = dataclasses.asdict(load)
        found.append(run)
        print(f"simulated, {kind}: {pd_report.run_line(run)}", flush=True)
    return found


# ---- all of it


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", choices=("demo", *SHAPES))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--cards", default="one", choices=("one", "two"))
    parser.add_argument("--parts", default="streams,ttft,kv,simulated")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each setting")
    parser.add_argument(
        "--pairs", type=int, default=12, help="prompts of each length and way, and of each block size"
    )
    parser.add_argument("--lengths", help="tokens of the prompts of `ttft`; `kv` takes the longest")
    parser.add_argument("--sizes", help="tokens of a block, for `kv`")
    parser.add_argument("--load", help='changes to it as JSON, such as {"bursts": 4, "streams": 2}')
    parser.add_argument("--budget", type=int, help="tokens of a step at most")
    parser.add_argument("--kv-gib", type=float, help="KV cache of an instance")
    parser.add_argument("--kv-transport", default="auto")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "pd")
    asked = parser.parse_args()
    asked.load = Load(**{**dataclasses.asdict(LOADS[asked.device]), **json.loads(asked.load or "{}")})
    asked.lengths = [int(n) for n in (asked.lengths or LENGTHS[asked.device]).split(",")]
    asked.sizes = [int(n) for n in (asked.sizes or SIZES[asked.device]).split(",")]
    asked.budget = asked.budget or BUDGETS[asked.device]
    asked.kv_gib = asked.kv_gib or KV_GIB[asked.device]
    return asked


def main() -> int:
    asked = arguments()
    parts = asked.parts.split(",")
    record: dict[str, Any] = {
        "machine": collect(), "at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "argv": sys.argv[1:],
        "model": asked.model, "device": asked.device, "cards": asked.cards, "load": dataclasses.asdict(asked.load),
        "budget": asked.budget, "kv_gib": asked.kv_gib,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        asked.directory, asked.ids = "demo", range(300, 3800)
        if asked.model != "demo":
            asked.directory = str(Path(scratch) / "model")
            shape = SHAPES[asked.model]
            write_model(Path(asked.directory), shape)
            asked.ids = range(3, min(30000, shape["vocab_size"]))
        if "streams" in parts or "ttft" in parts:
            with Rig() as rig:
                settings = SETTINGS if "streams" in parts else ["pd"]
                pairs = {setting: Pair(rig, asked, setting) for setting in settings}
                for pair in pairs.values():
                    pair.ready()
                if "streams" in parts:
                    record["streams"] = streams(asked, pairs)
                if "ttft" in parts:
                    record["ttft"] = first_tokens(asked, pairs["pd"])
        if "kv" in parts:
            record["kv"] = blocks(asked)
            record["kv_transport"] = transport_alone(asked, record["kv"])
    if "simulated" in parts:
        record["simulated"] = [run for kind in STEPS for run in in_simulator(asked, kind)]
    asked.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    asked.out.with_suffix(".md").write_text(pd_report.page(record))
    return 0 if all(run["failed"] == 0 for run in record.get("streams", [])) else 1


if __name__ == "__main__":
    raise SystemExit(main())
