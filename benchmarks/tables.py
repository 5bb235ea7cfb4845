"""Puts the result tables of `benchmarks/results/` into the READMEs, between their `results:begin` and `results:end`.

python benchmarks/tables.py
"""

import json
from pathlib import Path
from typing import Any

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
    },
    "README_zh.md": {
        "rounds": "{rounds} 轮的中位数",
        "ratio": "比值",
        "ttft_ms": "512 token 提示的首 token 时间，ms",
        "tpot_ms": "之后每个 token，ms",
        "w1s_tok_s": "16 个请求并发，输出 token/s",
        "w3_tok_s": "4 个 1024 token 提示，输入 token/s",
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


def main() -> None:
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("cpu-vs-transformers-*.json"))]
    if not results:
        raise SystemExit(f"no results in {RESULTS}: run benchmarks/cpu_vs_transformers.py first")
    for readme in WORDS:
        path = ROOT / readme
        before, rest = path.read_text(encoding="utf-8").split(BEGIN, 1)
        first_line, rest = rest.split("\n", 1)
        after = rest.split(END, 1)[1]
        tables = "\n\n".join(comparison(result, readme) for result in results)
        path.write_text(f"{before}{BEGIN}{first_line}\n\n{tables}\n\n{END}{after}", encoding="utf-8")
        print(f"{readme}: {len(results)} table(s)")


if __name__ == "__main__":
    main()
