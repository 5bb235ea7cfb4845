"""xLLM on a set of workloads that another engine runs too, in one process, without HTTP.

    python benchmarks/gpu_workloads.py --workloads DIR --model Qwen3-0.6B --only W1,W2 --repeats 3 --out result.json

DIR holds a module `workloads` with `run_suite(engine, names, repeats)`, `warm_up(engine)`, `write_model_dir(model, root)`
and a class `Engine` of three methods, implemented below. Weights are random (`--load-format dummy`). `--engine-args` takes
JSON of further `LLM(...)` options. The time to ready counts from the start of the process.
"""

import argparse
import importlib
import itertools
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil

from xllm import LLM, SamplingParams
from xllm.bench.offline import describe_steps
from xllm.bench.profile import profiled_if
from xllm.core.output import Finish
from xllm.core.places import PlaceStats
from xllm.core.stats import ExecutorStats
from xllm.wire.messages import Outputs, Submit


class Adapter:
    """What the workloads ask of an engine."""

    name = "xllm"

    def __init__(self, llm: LLM):
        self.llm = llm
        self._ids = itertools.count()

    def generate(self, requests: list[Any]) -> list[int]:
        outputs = self.llm.generate(
            [{"prompt_token_ids": r.prompt} for r in requests], [_params(r) for r in requests], use_tqdm=False
        )
        return [len(out.outputs[0].token_ids) for out in outputs]

    def stream(self, request: Any) -> list[float]:
        """Seconds from submission to each token, as they leave the engine."""
        client = self.llm._client
        begin = time.perf_counter()
        id = f"stream-{next(self._ids)}"
        client.send(Submit(request_id=id, prompt_token_ids=request.prompt, params=_params(request)))
        times: list[float] = []
        while True:
            message = client.receive(1.0)
            if not isinstance(message, Outputs):
                continue
            now = time.perf_counter() - begin
            for output in message.outputs:
                times += [now] * len(output.token_ids)
                if output.finish is not None:
                    assert output.finish is Finish.LENGTH, output
                    return times

    def reset_prefix_cache(self) -> None:
        self.llm.reset_prefix_cache()


def _params(request: Any) -> SamplingParams:
    return SamplingParams(
        temperature=request.temperature, max_tokens=request.max_tokens, ignore_eos=True, detokenize=False
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", required=True, help="directory with the module `workloads`")
    parser.add_argument("--model", default="Qwen3-0.6B")
    parser.add_argument("--only", default="W1,W2,W3,W4,W5")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-model-len", type=int, default=16384)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.85)
    parser.add_argument("--engine-args", default="{}", help="JSON of further options of LLM(...)")
    parser.add_argument("--profile", metavar="WORKLOAD", help="a trace of one more run of this workload")
    parser.add_argument("--out", help="file for the numbers")
    asked = parser.parse_args()
    sys.path.insert(0, asked.workloads)
    workloads = importlib.import_module("workloads")

    directory = workloads.write_model_dir(asked.model, str(Path(tempfile.gettempdir()) / "models"))
    llm = LLM(
        directory, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", device="cuda",
        max_model_len=asked.max_model_len, gpu_memory_utilization=asked.gpu_memory_utilization,
        **json.loads(asked.engine_args),
    )  # fmt: skip
    ready_s = time.time() - psutil.Process().create_time()
    parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in llm._client.startup_s.items())
    print(f"[xllm] {asked.model} ready after {ready_s:.1f} s ({parts})", flush=True)
    for reason in llm.config.reasons:
        print(f"[xllm] {reason}", flush=True)
    engine = Adapter(llm)
    workloads.warm_up(engine)
    record: dict[str, Any] = {
        "engine": "xllm", "model": asked.model, "python": platform.python_version(), "ready_s": ready_s,
        "startup_s": llm._client.startup_s, "args": vars(asked), "results": {}, "steps": {},
    }  # fmt: skip
    for name in asked.only.split(","):
        before = llm.stats().executor
        record["results"].update(workloads.run_suite(engine, (name,), asked.repeats))
        steps = _difference(llm.stats().executor, before)
        record["steps"][name] = msgspec.to_builtins(steps)
        print(f"[xllm] {name} {describe_steps(steps)}", flush=True)
        if asked.out:
            Path(asked.out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if asked.profile:
        with profiled_if(True, str(Path(asked.out or ".").parent)):
            workloads.run_suite(engine, (asked.profile,), 1)
    llm.shutdown()


def _difference(now: ExecutorStats, before: ExecutorStats) -> ExecutorStats:
    def less(new: Any, old: Any) -> Any:
        fields = msgspec.to_builtins(new)
        return {key: value - getattr(old, key) for key, value in fields.items() if key != "places"}

    places = None
    if now.places is not None:
        places = PlaceStats(places=now.places.places, **less(now.places, before.places))
    return ExecutorStats(**less(now, before), places=places)


if __name__ == "__main__":
    main()
