"""Where a decode step's time goes on a card, part by part, beside what bytes and arithmetic ask for.

    python -m benchmarks.step_profile [--models 0.6B 8B] [--batch 1 256] [--context 600] [--out results/step-profile]

The engine runs sequences of random weights twice under PyTorch's profiler, with few and with many tokens to generate;
what the second run has more is decode steps. Kernels may overlap (dependent launch), so a kernel is given the time
from its predecessor's end to its own. "Floor" is what its bytes take at the card's copy rate, or its arithmetic at the
rate of a large product, whichever is longer, both measured first.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda_products import MODELS, Model
from benchmarks.ops_cuda import Card
from xllm import LLM, SamplingParams

HERE = Path(__file__).resolve().parent
FEW, MANY = 8, 72  # tokens to generate
NAMES: tuple[tuple[str, str], ...] = (
    ("_decode_inputs", "inputs, copies"),
    ("_look_up", "inputs, copies"),
    ("Memcpy", "inputs, copies"),
    ("Memset", "inputs, copies"),
    ("_few", "attention"),
    ("_decode", "attention"),
    ("_prefill", "attention"),
    ("attend", "attention"),
    ("_gemv", "products"),
    ("_skinny", "products"),
    ("_narrow", "products"),
    ("nvjet", "products"),
    ("splitK", "products"),
    ("gemm", "products"),
    ("_rms_norm", "norms"),
    ("_rope_and_cache", "rotary, KV write"),
    ("_silu_and_mul", "activation"),
    ("_survey", "sampling"),
    ("_choose", "sampling"),
)


@dataclass
class Seen:
    """Of one run under the profiler."""

    microseconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    launches: Counter[str] = field(default_factory=Counter)


def part_of(kernel: str) -> str:
    return next((part for name, part in NAMES if name in kernel), "the rest")


def shares(events: Iterable[tuple[str, float, float]]) -> Seen:
    """Of (name, begin, end) in microseconds: each instant to the kernel that ends next, idle time apart."""
    seen = Seen()
    done = None
    for name, begin, end in sorted(events, key=lambda event: event[2]):
        if done is not None and begin > done:
            seen.microseconds["between kernels"] += begin - done
        part = part_of(name)
        seen.microseconds[part] += end - max(begin, done or begin)
        seen.launches[part] += 1
        done = end
    return seen


def profiled(llm: LLM, prompts: list[Any], tokens: int) -> Seen:
    from torch.profiler import ProfilerActivity, profile

    params = SamplingParams(temperature=0.7, max_tokens=tokens, ignore_eos=True, detokenize=False)
    llm.reset_prefix_cache()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        llm.generate(prompts, params, use_tqdm=False)
        torch.cuda.synchronize()
    events = profiler.profiler.kineto_results.events()
    return shares(
        (e.name(), e.start_ns() / 1e3, (e.start_ns() + e.duration_ns()) / 1e3)
        for e in events
        if str(e.device_type()).endswith("CUDA")
    )


def floors(model: Model, batch: int, context: int, card: tuple[float, float]) -> dict[str, float]:
    """Microseconds a step by part. `card`: bytes and operations per microsecond."""
    rate, operations = card
    numbers = sum(rows * columns for rows, columns in model.weights.values()) * model.layers
    numbers += model.vocab * model.hidden
    kv = 4 * batch * context * model.kv_heads * model.head_dim * model.layers
    row = 2 * batch * model.layers  # bytes of one number each
    return {
        "products": max(2 * numbers / rate, 2 * numbers * batch / operations),
        "attention": kv / rate,
        "norms": row * 2 * 4 * model.hidden / rate,
        "rotary, KV write": row * 2 * model.width / rate,
        "activation": row * 3 * model.intermediate / rate,
        "sampling": 2 * batch * model.vocab / rate,
    }


def measure(name: str, batches: list[int], context: int, card: tuple[float, float]) -> list[dict[str, Any]]:
    model = MODELS[name]
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "bfloat16", "rms_norm_eps": 1e-6,
        "rope_theta": 1000000, "hidden_act": "silu", "attention_bias": False, "eos_token_id": 2,
        "hidden_size": model.hidden, "num_hidden_layers": model.layers, "num_attention_heads": model.q_heads,
        "num_key_value_heads": model.kv_heads, "head_dim": model.head_dim, "intermediate_size": model.intermediate,
        "vocab_size": model.vocab, "max_position_embeddings": 40960, "tie_word_embeddings": model.hidden <= 1024,
    }  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with LLM(
            directory, load_format="dummy", skip_tokenizer_init=True, device="cuda", max_model_len=4096
        ) as llm:
            for batch in batches:
                length = context - (FEW + MANY) // 2
                prompts = [
                    {"prompt_token_ids": torch.randint(1000, (length,), device="cpu").tolist()}
                    for _ in range(batch)
                ]
                profiled(llm, prompts, FEW)  # captures what is missing
                few, many = profiled(llm, prompts, FEW), profiled(llm, prompts, MANY)
                least = floors(model, batch, context, card)
                parts = {
                    part: (us - few.microseconds[part]) / (MANY - FEW)
                    for part, us in many.microseconds.items()
                }
                rows += [
                    {
                        "model": name, "batch": batch, "part": part, "us": us, "floor_us": least.get(part),
                        "kernels": (many.launches[part] - few.launches[part]) / (MANY - FEW),
                    }
                    for part, us in sorted(parts.items(), key=lambda item: -item[1])
                ]  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]], context: int, card: tuple[float, float], command: str) -> str:
    lines = [
        f"# Where a decode step's time goes, {datetime.now(UTC).strftime('%Y-%m-%d %H:%M UTC')}", "", f"`{command}`", "",
        f"{torch.cuda.get_device_name()}; copies {card[0] / 1e6:.2f} TB/s, products {card[1] / 1e6:.0f} TFLOP/s. Context {context}, "
        "bfloat16, random weights, sampled with a temperature. Microseconds a step.",
    ]  # fmt: skip
    for model, batch in dict.fromkeys((row["model"], row["batch"]) for row in rows):
        of = [row for row in rows if (row["model"], row["batch"]) == (model, batch)]
        total, least = sum(r["us"] for r in of), sum(r["floor_us"] or 0.0 for r in of)
        lines += ["", f"## {model}, batch {batch}", "", "| part | us | share | floor | of it | kernels |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in of:
            floor = row["floor_us"]
            known = f"{floor:.0f} | {floor / row['us']:.0%}" if floor and row["us"] > 0 else " | "
            lines.append(
                f"| {row['part']} | {row['us']:.0f} | {row['us'] / total:.0%} | {known} | {row['kernels']:.0f} |"
            )
        lines.append(f"| **step** | **{total:.0f}** | | {least:.0f} | {least / total:.0%} | |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=("0.6B", "8B"), default=["0.6B", "8B"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--context", type=int, default=600)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "step-profile")
    asked = parser.parse_args()
    with torch.device("cuda"):
        card = Card().ceilings
    assert card is not None
    torch.cuda.empty_cache()
    rows = [row for name in asked.models for row in measure(name, sorted(asked.batch), asked.context, card)]
    text = table(rows, asked.context, card, " ".join(["python -m benchmarks.step_profile", *sys.argv[1:]]))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.with_suffix(".md").write_text(text, encoding="utf-8")
    asked.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
