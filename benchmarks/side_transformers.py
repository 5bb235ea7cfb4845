"""One round of the CPU workloads on `transformers` (generate, sdpa), in a process of its own: prints one line of JSON.

W1s is what `generate` offers for many requests: one padded batch, run to the longest; only tokens that were asked for
count. W3 runs as one batch and one after the other, and the better of the two counts.
"""

import argparse
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from benchmarks import workloads
from benchmarks.load import Load, emit


class Clock:
    """A streamer that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(model: Any, requests: list[workloads.Request], clock: Clock | None = None) -> tuple[float, Any]:
    """(seconds, token ids [batch, padded prompt + output])."""
    longest = max(len(r.prompt) for r in requests)
    ids = torch.zeros(len(requests), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, r in enumerate(requests):
        ids[row, longest - len(r.prompt) :] = torch.tensor(r.prompt)
        mask[row, longest - len(r.prompt) :] = 1
    length = max(r.output_len for r in requests)
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=clock,
        )
    return time.perf_counter() - start, out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=None)
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        asked.model, dtype=getattr(torch, asked.dtype), attn_implementation="sdpa"
    ).eval()
    generate(model, workloads.warm_up())
    result: dict[str, Any] = {}
    with Load() as load:
        (request,), clock = workloads.w2(), Clock()
        start = time.perf_counter()
        generate(model, [request], clock)
        times = clock.times[-request.output_len :]  # the streamer is handed the prompt first
        result["ttft_ms"] = (times[0] - start) * 1000
        result["tpot_ms"] = (times[-1] - times[0]) * 1000 / (request.output_len - 1)
        requests = workloads.w1s()
        seconds, out = generate(model, requests)
        result["w1s_tok_s"] = sum(r.output_len for r in requests) / seconds
        result["first_tokens"] = out[:, max(len(r.prompt) for r in requests)].tolist()
        requests = workloads.w3()
        as_batch = generate(model, requests)[0]
        in_turn = sum(generate(model, [r])[0] for r in requests)
        result["w3_tok_s"] = sum(len(r.prompt) for r in requests) / min(as_batch, in_turn)
    emit(result, load)


if __name__ == "__main__":
    main()
