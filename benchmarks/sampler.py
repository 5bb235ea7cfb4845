"""Time of one sampling step by kind of request, at a real vocabulary and at a tiny one (where only overhead is left).

    python benchmarks/sampler.py [--rows 1 16] [--threads 2] [--rounds 30]
    python benchmarks/sampler.py --device cuda --rows 1 64 512

Logits are random and flat, as those of a model without training are: the hardest case for top-p. Best of the rounds,
each a step whose token ids the host has read. On a card: the kinds that a decode graph holds, over bfloat16 logits, in a
graph of their own; and once more for peaked logits, as trained models have them.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from xllm.core.plan import NewSequence
from xllm.core.sampling import SamplingParams
from xllm.device.table import open_device
from xllm.executor.sampling import Sampler
from xllm.ops.table import load_ops

PROMPT, OUTPUT = 480, 20
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy, penalties": {
        "temperature": 0.0, "presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.1,
    },
    "greedy, 5 logprobs": {"temperature": 0.0, "logprobs": 5},
    "temperature": {"temperature": 0.8},
    "temperature, min-p": {"temperature": 0.8, "min_p": 0.05},
    "temperature, top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "temperature, top-p 0.9, top-k 50": {"temperature": 0.8, "top_p": 0.9, "top_k": 50},
    "temperature, top-k 5000": {"temperature": 0.8, "top_k": 5000},
    "bias, bad words, allowed": {
        "temperature": 0.8, "logit_bias": dict.fromkeys(range(50), 1.0),
        "bad_words_token_ids": [[i, i + 1] for i in range(20)], "allowed_token_ids": list(range(250)),
    },
}  # fmt: skip


def best_ms(kind: dict[str, Any], rows: int, vocab: int, rounds: int) -> float:
    tokens = torch.randint(
        0, vocab, (rows, PROMPT + OUTPUT + rounds), generator=torch.Generator().manual_seed(0)
    )
    sampler = Sampler(max_num_seqs=rows, vocab_size=vocab, tokens=tokens)
    for slot in range(rows):
        ids = tokens[slot, : PROMPT + OUTPUT].tolist()
        sampler.admit(
            NewSequence(
                slot=slot, request_id=str(slot), token_ids=ids, prompt_len=PROMPT, params=SamplingParams(**kind),
                seed=slot, stop_ids=[0], blocks=(),
            )
        )  # fmt: skip
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1)) * 3
    seconds = []
    for step in range(rounds):
        begin = time.perf_counter()
        sampled = sampler.sample(logits, list(range(rows)), [PROMPT + OUTPUT + step] * rows)
        sampled.token_ids.tolist()
        sampled.host_logprobs()
        seconds.append(time.perf_counter() - begin)
    return min(seconds) * 1e3


def best_in_a_graph(kind: dict[str, Any], rows: int, vocab: int, rounds: int, peak: float) -> float:
    """Milliseconds of sampling alone; `peak` raises 30 tokens of each row."""
    device = open_device("cuda")
    device.prepare(threads=1)
    tokens = torch.zeros(rows, 8, dtype=torch.int64, device="cuda")
    ops = load_ops("cuda", torch.bfloat16)
    sampler = Sampler(max_num_seqs=rows, vocab_size=vocab, tokens=tokens, device=device, ops=ops)
    for slot in range(rows):
        sampler.admit(
            NewSequence(
                slot=slot, request_id=str(slot), token_ids=[0], prompt_len=1, params=SamplingParams(**kind), seed=slot,
                stop_ids=(), blocks=(),
            )
        )  # fmt: skip
    sampler.upload()
    logits = torch.randn(rows, vocab, device="cuda") * 3
    logits[:, torch.randperm(vocab, device="cuda")[:30]] += peak
    logits = logits.bfloat16()
    slots, positions = torch.arange(rows, device="cuda"), torch.ones(rows, dtype=torch.int64, device="cuda")
    graph = device.capture(lambda: sampler.sample_plain(logits, slots, positions, tokens))
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(20):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 20)
    return min(times)


def on_a_card(kind: dict[str, Any]) -> bool:
    """Whether a decode graph holds it."""
    return not {"presence_penalty", "logprobs", "logit_bias"} & kind.keys()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--vocab", type=int, nargs="+", default=[256, 151_936])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    cases = [(vocab, rows) for vocab in asked.vocab for rows in asked.rows]
    print(f"Best of {asked.rounds}, ms; {asked.threads} threads, torch {torch.__version__}\n")
    print("| |" + "".join(f" {rows} x {vocab} |" for vocab, rows in cases))
    print("|---|" + "---|" * len(cases))
    timed: dict[str, Callable[..., float]] = {"": best_ms}
    if asked.device == "cuda":
        timed = {f", peak {peak}": partial(best_in_a_graph, peak=peak) for peak in (0, 20)}
    with torch.inference_mode():
        for name, kind in KINDS.items():
            for suffix, best in timed.items() if asked.device == "cpu" or on_a_card(kind) else ():
                times = [best(kind, rows, vocab, asked.rounds) for vocab, rows in cases]
                print(f"| {name}{suffix} |" + "".join(f" {ms:.4g} |" for ms in times), flush=True)


if __name__ == "__main__":
    main()
