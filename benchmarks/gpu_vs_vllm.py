"""One table out of the result files of `gpu_workloads.py` and of a peer that ran the same workloads on the same card.

    python -m benchmarks.gpu_vs_vllm --where "one H200, ..." OURS.json THEIRS.json ... [--out results/gpu-vs-vllm]

Files of a model belong together by the model's name. Medians over runs; beside each ratio stands the bar it is held to.
"""

import argparse
import json
import statistics
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
COLUMNS = {  # title: workload, key, whether more is better
    "W1 out tok/s": ("W1", "output_tok_s", True),
    "W2 TTFT ms": ("W2", "ttft_ms_median", False),
    "W2 TPOT ms": ("W2", "tpot_ms_median", False),
    "W3 prompt tok/s": ("W3", "prompt_tok_s", True),
    "W4 out tok/s": ("W4", "output_tok_s", True),
    "W5 out tok/s": ("W5", "output_tok_s", True),
}
BARS = {  # ratios to the peer, and seconds to ready
    "Qwen3-0.6B": ((1.35, 0.5, 0.42, 1.1, 1.5, 1.3), 12.0),
    "Qwen3-8B": ((1.15, 0.85, 0.85, 1.0, 1.12, 1.1), 20.0),
}
PLACES = ("out", "model_root", "workloads")  # arguments that are paths of the machine


def runs(record: dict[str, Any], workload: str, key: str) -> list[float]:
    return [run[key] for run in record["results"][workload]]


def shown(values: list[float]) -> str:
    digits = 0 if statistics.median(values) >= 100 else 2
    spread = f" ({min(values):,.{digits}f}..{max(values):,.{digits}f}, n={len(values)})"
    return f"{statistics.median(values):,.{digits}f}{spread}"


def ready_s(record: dict[str, Any]) -> float:
    """From the process's start."""
    seconds: float = record["ready_s"] if "ready_s" in record else record["start"]["engine_ready_s"]
    return seconds


def model_table(model: str, ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    bars, ready_bar = BARS[model]
    lines = [
        "",
        f"## {model}",
        "",
        f"| | xLLM | {theirs['engine']} | ratio | bar | |",
        "|---|---|---|---|---|---|",
    ]
    for (title, (workload, key, more)), bar in zip(COLUMNS.items(), bars, strict=True):
        a, b = runs(ours, workload, key), runs(theirs, workload, key)
        ratio = statistics.median(a) / statistics.median(b)
        met = ratio >= bar if more else ratio <= bar
        sign = ">=" if more else "<="
        lines.append(
            f"| {title} | {shown(a)} | {shown(b)} | {ratio:.2f} x | {sign} {bar} x | {'met' if met else '**missed**'} |"
        )
    met = ready_s(ours) <= ready_bar
    lines.append(
        f"| ready s | {ready_s(ours):.1f} | {ready_s(theirs):.1f} | | <= {ready_bar:g} s | {'met' if met else '**missed**'} |"
    )
    return lines


def without_places(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"args": {k: v for k, v in record["args"].items() if k not in PLACES}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--where", required=True, help="the machine, and how the runs stood to each other")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu-vs-vllm")
    asked = parser.parse_args()
    of: defaultdict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for path in asked.files:
        record = without_places(json.loads(path.read_text(encoding="utf-8")))
        of[record["model"]]["ours" if record["engine"] == "xllm" else "theirs"] = record
    lines = [f"# Beside a peer on one card, {datetime.now(UTC).strftime('%Y-%m-%d')}", "", asked.where]
    for model in BARS:
        if of[model].keys() == {"ours", "theirs"}:
            lines += model_table(model, **of[model])
    text = "\n".join([*lines, ""])
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.with_suffix(".md").write_text(text, encoding="utf-8")
    asked.out.with_suffix(".json").write_text(json.dumps(of, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
