"""`make demo-cluster`: a router and three instances of the demo model. One computes long prompts for the two that answer, and
one of those is killed while it streams.

Says what it does and what it saw. Exit code 1 where anything was not as it should be.
"""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx
import psutil

ROLES = ("--prefill", "1", "--decode", "2")
READY_S, ANSWER_S, STOP_S = 180.0, 120.0, 60.0
BEFORE_THE_KILL = 100  # characters of the answer that have arrived by then
SHOWN = 404  # characters of an answer; the demo model talks to itself when its story has ended
TRIES = 3  # a kill may come when the last token has just been made
QUESTION = "What is xLLM?"
STORY = "Tell me a story."
LIST = " ".join(f"Shelf {n} of the library has {n * 7} books about stars." for n in range(1, 61))
LONG = f"{LIST} What is a library?"
STORY_TOKENS = 1200


class Failed(Exception):
    """Something was not as it should be."""


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    finish: str
    longest_pause_s: float
    instance: str
    id: str


class Up:
    """`xllm up demo`, its lines kept."""

    def __init__(self) -> None:
        command = [
            str(Path(sys.executable).with_name("xllm")), "up", "demo",
            *ROLES, "--port", "0", "--no-view",
        ]  # fmt: skip
        say(f"starting `{' '.join(['xllm', *command[1:]])}`")
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            text=True, start_new_session=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            self._queue.put(line.rstrip())
        self._queue.put(None)

    def wait_for(self, pattern: str, timeout_s: float) -> str:
        """The next line that begins so."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self._queue.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                raise Failed(f"no line `{pattern}` within {timeout_s:.0f} s") from None
            if line is None:
                raise Failed(f"`xllm up` ended with exit code {self.process.wait()}")
            if re.match(pattern, line):
                return line

    def processes(self) -> list[psutil.Process]:
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def instance(self, name: str) -> psutil.Process:
        for child in psutil.Process(self.process.pid).children():
            if name in child.cmdline():
                return child
        raise Failed(f"there is no process of {name}")


@contextmanager
def cluster() -> Iterator[Up]:
    up = Up()
    try:
        yield up
    finally:
        if up.process.poll() is None:
            up.process.kill()  # what it has started ends with it
            up.process.wait()


def say(text: str) -> None:
    print(f"==> {text}", flush=True)


def ask(
    url: str, question: str, tokens: int | None = None, *, show: bool = True, up: Up | None = None
) -> Answer:
    """Streams the answer to the terminal: to its own end, or exactly `tokens` long. With `up` the instance that streams it
    is killed meanwhile."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({} if tokens is None else {"max_tokens": tokens, "ignore_eos": True}),
    }
    text, used, finish, id = "", 0, "", ""
    last, pause_s = 0.0, 0.0
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=ANSWER_S) as response:
        if response.status_code != 200:
            raise Failed(f"HTTP {response.status_code}: {response.read().decode()}")
        instance = response.headers.get("x-xllm-instance", "")
        victim = None if up is None else up.instance(instance)
        for frame in frames(response):
            id, used = frame["id"], (frame.get("usage") or {}).get("completion_tokens", used)
            for choice in frame["choices"]:
                finish = choice.get("finish_reason") or finish
                piece = choice["delta"].get("content") or ""
                if show:
                    print(piece[: max(0, SHOWN - len(text))], end="", flush=True)
                text += piece
                pause_s = max(pause_s, time.monotonic() - (last or time.monotonic()))
                last = time.monotonic()
            if victim is not None and len(text) >= BEFORE_THE_KILL:
                os.killpg(victim.pid, signal.SIGKILL)  # its server and its engine
                print(f" [kill -9 {instance}, process {victim.pid}] ", end="", flush=True)
                victim = None
    if show:
        print(" ...\n" if len(text) > SHOWN else "\n", flush=True)
    return Answer(text, used, finish, pause_s, instance, id)


def frames(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            frame = json.loads(line.removeprefix("data: "))
            if "error" in frame:
                raise Failed(f"the stream ended with an error: {frame['error']['message']}")
            yield frame


def show_way(url: str, answer: Answer) -> bool:
    """Where the request went and why, as the router tells it; whether it has moved."""
    found = httpx.get(f"{url}/v1/requests/{answer.id}", timeout=10)
    if found.status_code != 200:
        raise Failed(f"GET /v1/requests/{answer.id}: HTTP {found.status_code}: {found.text}")
    stages = found.json()["completions"][0]["stages"]
    say(f"GET /v1/requests/{answer.id} says:")
    for stage in stages:
        say(
            f"  {stage['sent_s']:.3f} s: to {stage['instance']} ({stage['why']}), {stage['tokens']} tokens from it"
        )
    return len({stage["instance"] for stage in stages}) > 1


def show_help(url: str, answer: Answer) -> None:
    """Who computed the prompt, and what that was worth, as the router tells it."""
    found = httpx.get(f"{url}/v1/requests/{answer.id}", timeout=10).json()["completions"][0]
    stage = found["stages"][0]
    helped = stage["kv_from"]
    if helped is None or not helped["tokens"]:
        raise Failed(
            f"the prompt of {found['prompt_tokens']} tokens was not computed by another instance: {stage}"
        )
    reasons = helped["reasons"]
    say(
        f"{helped['tokens']} of the {found['prompt_tokens']} tokens of the prompt were computed by {helped['instance']} and read by "
        f"{stage['instance']} in {helped['waited_s'] * 1000:.0f} ms (expected {reasons['paired_s'] * 1000:.0f} ms; "
        f"alone, with what decodes there held up, {reasons['alone_s'] * 1000:.0f} ms)"
    )


def compare(undisturbed: Answer, disturbed: Answer) -> None:
    if disturbed.text != undisturbed.text:
        pairs = zip(disturbed.text, undisturbed.text, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        raise Failed(f"the answers differ after {same} characters: {disturbed.text[same : same + 60]!r}")
    if (disturbed.tokens, disturbed.finish) != (undisturbed.tokens, undisturbed.finish):
        raise Failed(f"{disturbed.tokens} tokens ({disturbed.finish}), not {undisturbed.tokens}")


def end(up: Up) -> None:
    say("Ctrl-C")
    there = up.processes()
    begin = time.monotonic()
    up.process.send_signal(signal.SIGINT)
    try:
        code = up.process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        raise Failed(f"it does not end within {STOP_S:.0f} s") from None
    seconds = time.monotonic() - begin
    _, left = psutil.wait_procs(there, timeout=5)
    if left := [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        raise Failed(f"still there: {left}")
    if code != 0:
        raise Failed(f"it ended with exit code {code}")
    say(f"all {len(there)} processes are gone after {seconds:.1f} s, exit code 0")


def run(up: Up) -> None:
    say(ready := up.wait_for("Ready: ", READY_S))
    url = ready.split()[1].removesuffix("/v1")
    say(f"asking the router: {QUESTION}\n")
    answer = ask(url, QUESTION)
    say(f"{answer.tokens} tokens, from {answer.instance}")
    say("a long prompt, which an instance for prompts computes:\n")
    show_help(url, ask(url, LONG, 40))
    say(f"a longer answer of {STORY_TOKENS} tokens, undisturbed, kept for comparison: {STORY}")
    undisturbed = ask(url, STORY, STORY_TOKENS, show=False)
    say(f"{undisturbed.tokens} tokens, from {undisturbed.instance}")
    for _ in range(TRIES):
        say("the same again, and the instance that streams it is killed meanwhile:\n")
        disturbed = ask(url, STORY, STORY_TOKENS, up=up)
        moved = show_way(url, disturbed)
        compare(undisturbed, disturbed)
        up.wait_for(rf"{disturbed.instance} +\| Ready: ", READY_S)
        say(f"{disturbed.instance} has been started again and is ready")
        if moved:
            break
        say("the kill came too late: the instance had made the last token; once more")
    else:
        raise Failed("no request has moved to another instance")
    say(
        f"{disturbed.tokens} tokens, the same text as undisturbed; the longest pause was "
        f"{disturbed.longest_pause_s * 1000:.0f} ms (undisturbed {undisturbed.longest_pause_s * 1000:.0f} ms)"
    )
    end(up)


def main() -> int:
    with cluster() as up:
        try:
            run(up)
        except (Failed, httpx.HTTPError, psutil.Error) as e:
            print(f"\ndemo failed: {e}\nwhat was said last:", file=sys.stderr)
            print("\n".join(f"  {line}" for line in up.lines[-60:]), file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
