"""Puts the result tables of `benchmarks/results/` into the READMEs, between their `results:begin` and `results:end`.

python benchmarks/tables.py
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_vs_vllm import COLUMNS, ready_s, runs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results:begin", "<!-- results:end -->"
WORDS: dict[str, dict[str, str]] = {
    "README.md": {
        "rounds": "median of {rounds} rounds",
        "ratio": "ratio",
        "ttft_ms": "first token after a prompt of 512, ms",
        "tpot_ms": "each further token, ms",
        "w1s_tok_s": "16 requests at once, output tokens/s",
        "w3_tok_s": "4 prompts of 1024, prompt tokens/s",
        "gpu": "{model} shape on one H200, bf16, beside vLLM 0.26 on the same machine; medians.",
        "W1": "256 requests, 100..1024 in and out, output tokens/s",
        "ttft": "first token after a prompt of 512, ms",
        "tpot": "each further token, ms",
        "W3": "16 prompts of 8192, prompt tokens/s",
        "W4": "512 requests, 32 in, 512 out, output tokens/s",
        "W5": "256 requests with 2048 shared tokens, output tokens/s",
        "ready": "from start to ready, s; the first start on a machine compiles kernels, 18 s in all",
    },
    "README_zh.md": {
        "rounds": "{rounds} 轮的中位数",
        "ratio": "比值",
        "ttft_ms": "512 token 提示的首 token 时间，ms",
        "tpot_ms": "之后每个 token，ms",
        "w1s_tok_s": "16 个请求并发，输出 token/s",
        "w3_tok_s": "4 个 1024 token 提示，输入 token/s",
        "gpu": "{model} 规格，单张 H200，bf16，与同一机器上的 vLLM 0.26 对比；均为中位数。",
        "W1": "256 个请求，输入输出各 100..1024，输出 token/s",
        "ttft": "512 token 提示的首 token 时间，ms",
        "tpot": "之后每个 token，ms",
        "W3": "16 个 8192 token 提示，输入 token/s",
        "W4": "512 个请求，输入 32、输出 512，输出 token/s",
        "W5": "256 个请求共享 2048 token 前缀，输出 token/s",
        "ready": "从启动到就绪，s；机器上首次启动需编译内核，共 18 s",
    },
}


def comparison(result: dict[str, Any], readme: str) -> str:
    words, facts = WORDS[readme], result["facts"]
    rounds = words["rounds"].format(rounds=facts["rounds"])
    lines = [
        f"{facts['model']}, {facts['dtype']}. {facts['machine']}; {rounds}, {facts['date']}.",
        "",
        f"| | xLLM | transformers | {words['ratio']} |",
        "|---|---|---|---|",
    ]
    for key, row in result["table"].items():
        ours, theirs = row["xllm"]["median"], row["transformers"]["median"]
        lines.append(f"| {words[key]} | {ours:.1f} | {theirs:.1f} | {row['ratio']:.2f} x |")
    return "\n".join(lines)


def on_card(model: str, pair: dict[str, Any], readme: str) -> str:
    words = WORDS[readme]
    lines = [
        words["gpu"].format(model=model),
        "",
        f"| | xLLM | vLLM | {words['ratio']} |",
        "|---|---|---|---|",
    ]
    names = ("W1", "ttft", "tpot", "W3", "W4", "W5")
    for name, (workload, key, _) in zip(names, COLUMNS.values(), strict=True):
        ours, theirs = (statistics.median(runs(pair[side], workload, key)) for side in ("ours", "theirs"))
        digits = 0 if ours >= 100 else 2
        lines.append(f"| {words[name]} | {ours:,.{digits}f} | {theirs:,.{digits}f} | {ours / theirs:.2f} x |")
    ours, theirs = ready_s(pair["ours"]), ready_s(pair["theirs"])
    return "\n".join([*lines, f"| {words['ready']} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} x |"])


def main() -> None:
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("cpu-vs-transformers-*.json"))]
    if not results:
        raise SystemExit(f"no results in {RESULTS}: run benchmarks/cpu_vs_transformers.py first")
    gpu = RESULTS / "gpu-vs-vllm.json"
    cards: dict[str, Any] = json.loads(gpu.read_text(encoding="utf-8")) if gpu.exists() else {}
    for readme in WORDS:
        path = ROOT / readme
        before, rest = path.read_text(encoding="utf-8").split(BEGIN, 1)
        first_line, rest = rest.split("\n", 1)
        after = rest.split(END, 1)[1]
        tables = "\n\n".join(
            [
                *(comparison(result, readme) for result in results),
                *(on_card(model, pair, readme) for model, pair in cards.items()),
            ]
        )
        path.write_text(f"{before}{BEGIN}{first_line}\n\n{tables}\n\n{END}{after}", encoding="utf-8")
        print(f"{readme}: {len(results)} table(s)")


if __name__ == "__main__":
    main()
