"""`make demo`: serve the demo model, ask it a real question over HTTP, show the answer as it arrives, stop the server."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx

QUESTION = "What is xLLM?"
READY_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0

NEXT = """
How to go on:
  .venv/bin/xllm serve demo        an OpenAI-compatible server on http://127.0.0.1:8000
  .venv/bin/xllm chat demo         talk to the model in this terminal
  .venv/bin/xllm serve MODEL       any supported Hugging Face model, by hub id or directory

  from openai import OpenAI
  client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
  answer = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "Hello!"}])
  print(answer.choices[0].message.content)
"""


def say(text: str) -> None:
    print(f"==> {text}", flush=True)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def server(port: int, log: IO[str]) -> Iterator[subprocess.Popen[str]]:
    """`xllm serve demo`, stopped as Ctrl-C would on every way out, in a process group of its own."""
    xllm = Path(sys.executable).with_name("xllm")
    command = [str(xllm), "serve", "demo", "--port", str(port)]
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_ready(url: str, process: subprocess.Popen[str]) -> float:
    """Seconds until `/ready` answers 200. Raises `RuntimeError` when the server ends or time is up."""
    start = time.monotonic()
    while (waited := time.monotonic() - start) < READY_TIMEOUT_S:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {process.returncode}")
        try:
            if httpx.get(f"{url}/ready", timeout=2).status_code == 200:
                return waited
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.1)
    raise RuntimeError(f"the server was not ready after {READY_TIMEOUT_S:.0f} s")


def frames(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            frame = json.loads(line.removeprefix("data: "))
            if "error" in frame:
                raise RuntimeError(frame["error"]["message"])
            yield frame


def ask(url: str) -> tuple[float, float, int]:
    """Prints the streamed answer; returns seconds to its first piece, seconds to its end, and tokens."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 128,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start = time.monotonic()
    first, tokens = None, 0
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=ANSWER_TIMEOUT_S) as response:
        if response.status_code != 200:
            raise RuntimeError(f"HTTP {response.status_code}: {response.read().decode()}")
        for frame in frames(response):
            for choice in frame["choices"]:
                if text := choice["delta"].get("content"):
                    first = first or time.monotonic()
                    print(text, end="", flush=True)
            if usage := frame.get("usage"):
                tokens = usage["completion_tokens"]
    print(flush=True)
    if first is None:
        raise RuntimeError("the answer was empty")
    return first - start, time.monotonic() - start, tokens


def run(log: IO[str]) -> None:
    url = f"http://127.0.0.1:{(port := free_port())}"
    say(f"starting `xllm serve demo --port {port}`")
    with server(port, log) as process:
        say(f"ready after {wait_ready(url, process):.1f} s; asking over HTTP: {QUESTION}\n")
        ttft, total, tokens = ask(url)
        print()
        say(
            f"{tokens} tokens in {total:.2f} s: {tokens / total:.0f} tokens/s, the first after {ttft * 1000:.0f} ms"
        )
    say("server stopped")


def main() -> int:
    directory = Path(tempfile.mkdtemp(prefix="xllm-demo-"))
    path = directory / "server.log"
    try:
        with path.open("w") as log:
            run(log)
    except (RuntimeError, httpx.HTTPError) as e:
        tail = path.read_text(errors="replace").splitlines()[-40:]
        print(f"\ndemo failed: {e}\nthe server's log ({path}):\n  " + "\n  ".join(tail), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    print(NEXT)
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
