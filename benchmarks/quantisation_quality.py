"""How far quantised weights move the demo model's next-token distributions.

    python benchmarks/quantisation_quality.py [--device reference|cuda] [--each 12] [--out results/...md]

Every scheme and the float model read the same conversations, of wordings made anew; compared are their distributions
over the next token at every position: the mean and the 99th percentile of KL(float || quantised) in nats, how often both
prefer the same token, and the mean log-probability of the text itself. "bfloat16" is the same model with weights in
bfloat16 against the float32 one, for scale.
"""

import argparse
from datetime import UTC, datetime
from pathlib import Path

import torch

from tests.models.harness import Driver, Sequence
from tools.demo.corpus.mixture import held_out_set
from tools.demo.tokenizer import render
from xllm.models.checkpoint import read_model_config
from xllm.models.loader import load_model
from xllm.models.source import locate
from xllm.ops.table import load_ops
from xllm.text.tokenizer import load_tokenizer

SCHEMES = ("bfloat16", "fp8", "int8", "int4")
LONGEST = 512  # tokens of a conversation


def log_probabilities(driver: Driver, ids: list[int]) -> torch.Tensor:
    """[len(ids), V] float64: of the token after each."""
    logits = driver.step([(Sequence(ids), len(ids))], every_token=True)
    driver.free = list(range(driver.kv_cache.shape[0]))
    return logits.double().log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="reference")
    parser.add_argument("--each", type=int, default=12, help="conversations per category")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--out", help="file for the table")
    asked = parser.parse_args()
    directory = locate("demo", None)
    tokenizer = load_tokenizer(directory)
    texts = [render(c) for c in held_out_set(asked.seed, asked.each)]
    samples = [tokenizer.encode(text, add_special_tokens=False)[:LONGEST] for text in texts]

    def driver(dtype: torch.dtype, scheme: str | None) -> Driver:
        config = read_model_config(directory, None, "auto")
        where = "cuda" if asked.device == "cuda" else "cpu"
        with torch.device(where):
            ops = load_ops(asked.device, dtype, scheme)
            return Driver(load_model(config, dtype=dtype, device=where, ops=ops), config, dtype=dtype)

    exact = driver(torch.float32, None)
    truth = [log_probabilities(exact, ids) for ids in samples]
    lines = [
        "| weights | KL mean | KL p99 | same favourite | log-probability of the text |",
        "|---|---|---|---|---|",
        f"| float32 | | | | {_own(truth, samples):.4f} |",
    ]
    for scheme in SCHEMES:
        plain = scheme == "bfloat16"
        changed = driver(torch.bfloat16 if plain else torch.float32, None if plain else scheme)
        moved = [log_probabilities(changed, ids) for ids in samples]
        kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(truth, moved, strict=True)])
        same = torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in zip(truth, moved, strict=True)])
        lines.append(
            f"| {scheme} | {kl.mean():.2e} | {kl.quantile(0.99):.2e} | {same.double().mean():.2%} | {_own(moved, samples):.4f} |"
        )
        print(lines[-1], flush=True)
    tokens = sum(map(len, samples))
    head = [
        f"# What quantised weights do to the demo model, {datetime.now(UTC):%Y-%m-%d}",
        f"`python benchmarks/quantisation_quality.py --device {asked.device} --each {asked.each} --seed {asked.seed}`",
        f"{len(samples)} held-out conversations, {tokens} tokens; torch {torch.__version__}. KL in nats, float32 || quantised.",
    ]
    table = "\n\n".join([*head, "\n".join(lines)]) + "\n"
    print(table)
    if asked.out:
        Path(asked.out).write_text(table, encoding="utf-8")


def _own(found: list[torch.Tensor], samples: list[list[int]]) -> float:
    chosen = [
        p[:-1].gather(1, torch.tensor(ids[1:], device=p.device)[:, None])
        for p, ids in zip(found, samples, strict=True)
    ]
    return float(torch.cat(chosen).mean())


if __name__ == "__main__":
    main()
