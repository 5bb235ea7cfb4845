"""Every operator of "cuda" on this machine's card: microseconds, and how near that is to what the card can do.

    python -m benchmarks.ops_cuda [--models 0.6B 8B] [--only linear decode] [--variants] [--out results/ops-cuda]
    TRITON_INTERPRET=1 python -m benchmarks.ops_cuda --dry [--variants]

A case is timed as the engine runs it, beside peers (cuBLAS, PyTorch, single operators) and, with --variants, with other
settings of the same kernels. Time is the median of replays of a graph of many calls, which take inputs in turn that no
cache holds together; inputs are random. Each way is compared with the plain PyTorch reference in float32, on outputs
that were poisoned before. `share` is the least time that bytes or arithmetic take at the card's ceilings, measured
first, over the time taken. A variant is named where it beats the engine's way by more than two timings of that differ.
--dry runs everything once, tiny and untimed, in Triton's interpreter.
"""

import argparse
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda_operators import GROUPS, SAME_FOR_ALL
from benchmarks.cuda_products import MODELS, TINY, Case, Scope, Way
from xllm.bench.collect_env import collect
from xllm.device.cuda import CudaDevice
from xllm.device.table import Graph
from xllm.ops.table import load_ops

RESULTS = Path(__file__).resolve().parent / "results" / "ops-cuda"
REPLAYS = 7
GRAPH_US = 4000.0  # a graph is to last about so long
MANY = 128  # calls in a graph of short ones
COLUMNS = {  # and widths
    "kernel": 21, "model": 5, "setting": 28, "us": 8, "rate": 12, "share": 5, "error": 8, "beside": 30, "best variant": 0,
}  # fmt: skip


@dataclass
class Outcome:
    """Of one way."""

    name: str
    variant: bool
    us: float | None = None
    error: float | None = None  # relative; of integers the share that differs
    wrong: bool = False
    failed: str = ""


class Dry:
    """Runs what there is to run once, wherever the kernels run here."""

    ceilings: tuple[float, float] | None = None  # bytes and operations per microsecond

    def measure(self, case: Case) -> tuple[list[Outcome], float]:
        """Every way's outcome, and by how much two timings of the first differ, relative."""
        exact = functools.cache(case.exact)
        outcomes = []
        for way in case.ways:
            outcome = Outcome(way.name, way.variant)
            outcomes.append(outcome)
            try:
                out = self.run(case, way, outcome)
                if way.checked:
                    outcome.error = relative_error(way.read(out), exact())
                    outcome.wrong = outcome.error > case.limit
            except Exception as error:  # one way that cannot run does not end the others
                outcome.failed = (
                    f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[-1][:120]}"
                )
                if self.is_lost(error):
                    print(f"lost the card: {case.kernel}, {case.setting}, {way.name}: {outcome.failed}")
                    raise
        return outcomes, self.again(outcomes[0])

    def run(self, case: Case, way: Way, outcome: Outcome) -> Any:
        """Times it and returns what it gives for inputs 0."""
        way(1)
        if case.reset is not None:
            case.reset()
        return way(0)

    def again(self, first: Outcome) -> float:
        return 0.0

    def is_lost(self, error: Exception) -> bool:
        return False


class Card(Dry):
    """Times it."""

    def __init__(self) -> None:
        self.device = CudaDevice()
        self.device.prepare(threads=1)
        # the pool of all graphs goes with the last of them
        self._keeps_the_pool = self.device.capture(lambda: (torch.ones(1),))
        self._first: tuple[Graph, int] | None = None
        source = torch.randn(3 << 29, dtype=torch.bfloat16)
        target, (a, b) = torch.empty_like(source), torch.randn(2, 8192, 8192, dtype=torch.bfloat16)
        # by a kernel: a graph copies with the copy engine, which is slower than the memory
        copy_us = self.time(self.graph(lambda _: torch.neg(source, out=target), 4)[0], 4)
        product_us = self.time(self.graph(lambda _: a @ b, 4)[0], 4)
        self.ceilings = 2 * source.nbytes / copy_us, 2 * 8192**3 / product_us

    def measure(self, case: Case) -> tuple[list[Outcome], float]:
        self._first = None
        return super().measure(case)

    def run(self, case: Case, way: Way, outcome: Outcome) -> Any:
        assert self.ceilings is not None
        way(0)  # compiles, and makes workspaces
        launches = math.ceil(GRAPH_US / max(1.0, *floors_us(case, self.ceilings)))
        launches = max(4, min(launches, max(case.sets, MANY)))
        graph, out = self.graph(way, launches)
        outcome.us = self.time(graph, launches)
        if way is case.ways[0]:
            self._first = graph, launches
        if case.reset is None:
            poison(out)
            graph.replay()
            return out
        poison(way(0))  # the next call gets the same memory
        case.reset()
        return way(0)

    def again(self, first: Outcome) -> float:
        if self._first is None or first.us is None:
            return 0.0
        once, again = first.us, self.time(*self._first)
        first.us = (once + again) / 2
        return abs(again - once) / first.us

    def is_lost(self, error: Exception) -> bool:
        return self.device.is_lost(error)

    def graph(self, step: Callable[[int], Any], launches: int) -> tuple[Graph, Any]:
        """A graph of so many calls, and what the first of them gives: its memory is not used again within."""
        given: list[Any] = [None]

        def work() -> tuple[torch.Tensor, ...]:
            given[0] = step(0)
            for i in range(1, launches):
                step(i)
            return ()

        return self.device.capture(work), given[0]

    def time(self, graph: Graph, launches: int) -> float:
        """Microseconds per call."""
        graph.replay()
        times = []
        for _ in range(1 + REPLAYS):
            begin = self.device.mark()
            graph.replay()
            end = self.device.mark()
            end.wait()
            times.append(end.since(begin) * 1e6 / launches)
        return statistics.median(times[1:])


def floors_us(case: Case, ceilings: tuple[float, float]) -> tuple[float, float]:
    """The least time that its bytes and its arithmetic take."""
    return case.moved / ceilings[0], case.flops / ceilings[1]


def poison(out: Any) -> None:
    for tensor in out if isinstance(out, tuple) else (out,):
        tensor.fill_(math.nan if tensor.is_floating_point() else -1)


def relative_error(given: torch.Tensor, exact: torch.Tensor) -> float:
    """Of floats the norm of the difference over that of the exact, huge where there is NaN."""
    assert given.shape == exact.shape, f"{given.shape} instead of {exact.shape}"
    if not given.is_floating_point():
        return (given != exact).float().mean().item()
    error = ((given.double() - exact.double()).norm() / exact.double().norm()).item()
    return error if math.isfinite(error) else 1e9


def row_of(case: Case, model: str, outcomes: list[Outcome], noise: float, card: Dry) -> dict[str, Any]:
    """A case as data."""
    row: dict[str, Any] = {"kernel": case.kernel, "model": model, "setting": case.setting, "noise": noise}
    if card.ceilings is not None and outcomes[0].us is not None:
        memory, arithmetic = floors_us(case, card.ceilings)
        amount, unit = (case.moved, "TB/s") if memory > arithmetic else (case.flops, "TFLOP/s")
        row |= {"rate": amount / outcomes[0].us / 1e6, "unit": unit}
        row |= {"share": max(memory, arithmetic) / outcomes[0].us}
    return row | {"ways": [asdict(outcome) for outcome in outcomes]}


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text, in the order of COLUMNS."""
    first, *others = row["ways"]
    good = [w for w in others if w["variant"] and w["us"] is not None and not w["wrong"] and not w["failed"]]
    best = min(good, key=lambda way: way["us"], default=None)
    gain = 1 - best["us"] / first["us"] if best is not None and first["us"] else 0.0
    return [
        row["kernel"], row["model"], row["setting"], _time(first),
        f"{row['rate']:.3g} {row['unit']}" if "rate" in row else "",
        f"{row['share']:.0%}" if "share" in row else "",
        "" if first["error"] is None else f"{first['error']:.1e}",
        ", ".join(f"{way['name']} {_time(way)}" for way in others if not way["variant"]),
        f"{best['name']} {best['us']:.2f} (-{gain:.1%})" if best is not None and gain > row["noise"] else "",
    ]  # fmt: skip


def _time(way: dict[str, Any]) -> str:
    if way["failed"]:
        return "failed"
    return ("-" if way["us"] is None else f"{way['us']:.2f}") + (" WRONG" if way["wrong"] else "")


def complaints(rows: list[dict[str, Any]], *, variants: bool = True) -> list[str]:
    """What failed or was wrong."""
    found = []
    for row in rows:
        for way in row["ways"]:
            if way["wrong"] or (way["failed"] and (variants or not way["variant"])):
                what = way["failed"] or f"error {way['error']:.1e}"
                name = way["name"] or "as the engine runs it"
                found.append(f"{row['kernel']}, {row['model']}, {row['setting']}, {name}: {what}")
    return found


def save(record: dict[str, Any], out: Path) -> None:
    """As JSON and as a table in Markdown."""
    facts, rows = record["facts"], record["rows"]
    lines = [f"# Operators on a card, {facts['date']}", "", f"`{facts['command']}`", "", facts["machine"], ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    if wrong := complaints(rows):
        lines += ["", "Failed or wrong:", "", *(f"- {line}" for line in wrong)]
    out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    Path(f"{out}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def compile_ahead(group: str, scope: Scope) -> None:
    """On all cores at once, over tensors without memory. What fails here fails again where it is timed."""
    assert scope.ops.compiling is not None
    begin = time.monotonic()
    with torch.device("meta"), scope.ops.compiling(os.cpu_count() or 1):
        for case in GROUPS[group](scope):
            for way in case.ways:
                with suppress(Exception):
                    way(0)
    print(f"{group}, {scope.model.name}: compiled in {time.monotonic() - begin:.1f} s", flush=True)


def run_all(asked: argparse.Namespace, card: Dry, rows: list[dict[str, Any]]) -> None:
    ops, end = load_ops("cuda", torch.bfloat16), time.monotonic() + asked.seconds
    models = [TINY] if asked.dry else [MODELS[name] for name in asked.models]
    for group in asked.only:
        for model in models[:1] if group in SAME_FOR_ALL else models:
            scope = Scope(model, ops, asked.variants, asked.dry)
            if not asked.dry:
                compile_ahead(group, scope)
            for case in GROUPS[group](scope):
                name = "" if group in SAME_FOR_ALL else model.name
                rows.append(row_of(case, name, *card.measure(case), card))
                texts = zip(cells(rows[-1]), COLUMNS.values(), strict=True)
                print(" ".join(text.ljust(width) for text, width in texts).rstrip(), flush=True)
                if time.monotonic() > end:
                    print(f"stopped after {asked.seconds} s, in {group}")
                    return


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help=", ".join(GROUPS))  # fmt: skip
    parser.add_argument("--variants", action="store_true", help="other settings of the kernels, too")
    parser.add_argument("--dry", action="store_true", help="everything once, tiny and untimed")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no new case after so many")
    parser.add_argument("--out", type=Path, default=RESULTS, help="of the files, without .json and .md")
    asked = parser.parse_args()
    torch.manual_seed(time.time_ns() % 2**32)
    torch.set_default_device("cpu" if asked.dry else "cuda")
    card, machine = Dry(), "Nothing was timed."
    if not asked.dry:
        card = Card()
        assert card.ceilings is not None
        copies, products = (each / 1e6 for each in card.ceilings)
        machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}; copies {copies:.2f} TB/s, bfloat16 products {products:.0f} TFLOP/s."  # fmt: skip
    rows: list[dict[str, Any]] = []
    everything = {} if asked.dry else collect()
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python -m benchmarks.ops_cuda", *sys.argv[1:]]),
        "machine": machine,
    }
    print(machine, " ".join(name.ljust(width) for name, width in COLUMNS.items()), sep="\n")
    try:
        run_all(asked, card, rows)
    finally:
        print("\n".join(complaints(rows)) or "nothing failed, nothing was wrong")
        if not asked.dry:
            save({"facts": facts, "machine": everything, "rows": rows}, asked.out)
    return 1 if complaints(rows, variants=False) else 0  # a setting may ask for more than a card has


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
