"""One round of the CPU workloads on xLLM, in a process of its own: prints one line of JSON."""

import argparse
import time
from typing import Any

from benchmarks import workloads
from benchmarks.load import Load, emit
from xllm.core.output import RequestOutput
from xllm.core.sampling import SamplingParams
from xllm.engine.llm import LLM


def run(llm: LLM, requests: list[workloads.Request]) -> tuple[float, list[RequestOutput]]:
    """(seconds for all, results in order)."""
    prompts: list[Any] = [{"prompt_token_ids": r.prompt} for r in requests]
    params = [SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=r.output_len) for r in requests]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    assert [len(o.outputs[0].token_ids) for o in outputs] == [r.output_len for r in requests]
    return seconds, outputs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=None)
    asked = parser.parse_args()
    llm = LLM(asked.model, dtype=asked.dtype, threads=asked.threads, max_model_len=4096, seed=0)
    run(llm, workloads.warm_up())
    result: dict[str, Any] = {"decisions": list(llm.config.reasons)}
    with Load() as load:
        _, (output,) = run(llm, workloads.w2())
        m, (request,) = output.metrics, workloads.w2()
        assert m.first_token is not None
        assert m.finished is not None
        result["ttft_ms"] = (m.first_token - m.arrival) * 1000
        result["tpot_ms"] = (m.finished - m.first_token) * 1000 / (request.output_len - 1)
        seconds, outputs = run(llm, workloads.w1s())
        result["w1s_tok_s"] = sum(r.output_len for r in workloads.w1s()) / seconds
        result["first_tokens"] = [o.outputs[0].token_ids[0] for o in outputs]
        seconds, _ = run(llm, workloads.w3())
        result["w3_tok_s"] = sum(len(r.prompt) for r in workloads.w3()) / seconds
    emit(result, load)
    llm.shutdown()


if __name__ == "__main__":
    main()
