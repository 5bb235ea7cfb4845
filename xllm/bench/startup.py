"""`xllm bench startup`: how long until the first token, and which part takes how long.

Each round starts a fresh `xllm serve` and measures from outside: process start to `/ready`, and to
the first token. One more fresh process starts the engine as the server does and reports the parts from inside.
"""

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from xllm.bench.options import StartupOptions
from xllm.config.flags import add_flags, from_namespace, to_argv
from xllm.config.options import EngineOptions
from xllm.core.errors import ConfigError, XllmError

POLL_S = 0.02
STOP_S = 30.0
PARTS_MARK = "xllm-startup-parts "


def run(engine: EngineOptions, options: StartupOptions) -> int:
    if options.rounds < 1:
        raise ConfigError("--rounds must be at least 1")
    model, engine_flags = engine.model, to_argv(engine)
    rounds = []
    for i in range(options.rounds):
        rounds.append(measure_server(model, engine_flags, options.timeout))
        shown = ", ".join(f"{k} {v:.2f} s" for k, v in rounds[-1].items())
        print(f"round {i + 1} of {options.rounds}: {shown}", flush=True)
    result: dict[str, Any] = {
        "model": model,
        "engine_flags": engine_flags,
        "rounds": rounds,
        "median_s": {part: statistics.median(r[part] for r in rounds) for part in rounds[0]},
        "parts_s": measure_parts(model, engine_flags, options.timeout),
    }
    print(report(result))
    if options.output_json:
        Path(options.output_json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def report(result: dict[str, Any]) -> str:
    lines = ["", "from process start, median:"]
    lines += [f"  {name:<24} {seconds:8.2f} s" for name, seconds in result["median_s"].items()]
    lines += ["inside one start:"]
    lines += [f"  {name:<24} {seconds:8.2f} s" for name, seconds in result["parts_s"].items()]
    return "\n".join(lines)


def measure_server(model: str, engine_flags: Sequence[str], timeout_s: float) -> dict[str, float]:
    """Seconds from process start to `ready` and to the `first token`. Raises `XllmError` when it does not start."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [*_xllm(), "serve", model, "--port", str(port), *engine_flags]
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
        try:
            return _watch(f"http://127.0.0.1:{port}", process, start, timeout_s)
        except (XllmError, httpx.HTTPError) as e:
            log.seek(0)
            raise XllmError(f"{e}; the server's log ends:\n{log.read()[-2000:]}") from e
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _watch(url: str, process: "subprocess.Popen[str]", start: float, timeout_s: float) -> dict[str, float]:
    def wait_ready() -> float:
        while time.perf_counter() - start < timeout_s:
            if process.poll() is not None:
                raise XllmError(f"the server ended with exit code {process.returncode}")
            try:
                if client.get("/ready").status_code == 200:
                    return time.perf_counter() - start
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(POLL_S)
        raise XllmError(f"/ready did not answer 200 within {timeout_s:.0f} s")

    with httpx.Client(base_url=url, timeout=timeout_s) as client:
        ready = wait_ready()
        served = client.get("/v1/models").json()["data"][0]["id"]
        body = {"model": served, "prompt": "a", "max_tokens": 1}
        client.post("/v1/completions", json=body).raise_for_status()
    return {"ready": ready, "first token": time.perf_counter() - start}


def measure_parts(model: str, engine_flags: Sequence[str], timeout_s: float) -> dict[str, float]:
    command = [sys.executable, "-m", "xllm.bench.startup", model, *engine_flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    for line in done.stdout.splitlines():
        if line.startswith(PARTS_MARK):
            parts: dict[str, float] = json.loads(line.removeprefix(PARTS_MARK))
            return parts
    raise XllmError(f"the engine did not start:\n{done.stderr[-2000:]}")


def _xllm() -> list[str]:
    return [sys.executable, "-c", "import sys; from xllm.cli import main; sys.exit(main())"]


async def _start_engine(argv: Sequence[str]) -> dict[str, float]:
    """The engine as `xllm serve` starts it, in seconds by part; runs in a process made for it."""
    from xllm.core.sampling import SamplingParams

    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    add_flags(parser, EngineOptions)
    options = from_namespace(EngineOptions, parser.parse_args(argv))
    parts, last = {}, time.perf_counter()

    def lap(part: str) -> None:
        nonlocal last
        parts[part], last = time.perf_counter() - last, time.perf_counter()

    from xllm.engine.async_llm import AsyncLLM

    lap("front end: import")
    llm = await AsyncLLM.start(options)
    lap("front end: start engine")
    async for _ in llm.generate({"prompt_token_ids": [1]}, SamplingParams(max_tokens=1)):
        pass
    lap("front end: first token")
    parts |= {f"engine: {part}": seconds for part, seconds in llm.startup_s.items()}
    await llm.shutdown()
    return parts


if __name__ == "__main__":
    print(PARTS_MARK + json.dumps(asyncio.run(_start_engine(sys.argv[1:]))))
