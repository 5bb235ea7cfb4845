"""What `xllm chat` and `xllm complete` share: their flags, where the answers come from, and the terminal."""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

from xllm.config.flags import add_flags, from_namespace
from xllm.config.options import EngineOptions, knob
from xllm.core.errors import ConfigError, XllmError
from xllm.server.answer import Answer, Model

FAILED = 1


@dataclass(frozen=True, kw_only=True)
class TalkOptions:
    """Who answers, and how."""

    url: str | None = knob(None, "OpenAI-compatible server to ask, instead of running MODEL here")
    prompt: str | None = knob(None, "ask this, print the answer and end", short="-q", metavar="TEXT")
    max_tokens: int | None = knob(
        None, "longest answer in tokens (default: what the context holds; of complete: 128)"
    )
    temperature: float | None = knob(None, "0 always takes the likeliest token (default: the model's own)")
    top_p: float | None = knob(
        None, "sample from the likeliest tokens up to this probability (default: the model's own)"
    )

    def sampling(self) -> dict[str, Any]:
        """Only what was given."""
        named = {"max_tokens": self.max_tokens, "temperature": self.temperature, "top_p": self.top_p}
        return {name: value for name, value in named.items() if value is not None}


def add_parser(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, help: str, *more: type
) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(name, help=help)
    what = "directory, hub id or demo (default: demo); with --url the served model (default: the first)"
    parser.add_argument("model", nargs="?", metavar="MODEL", help=what)
    add_flags(parser, TalkOptions, *more, EngineOptions)
    return parser


def open_model(namespace: argparse.Namespace, **usual: Any) -> Model:
    """The engine in this process, or a server. Raises `XllmError` with a sentence when there is neither.

    `usual` is the command's own sampling, under what the flags say.
    """
    options = from_namespace(TalkOptions, namespace)
    sampling = usual | options.sampling()
    engine_options = from_namespace(EngineOptions, namespace)
    if options.url is None:
        from xllm.server.local import LocalModel

        return LocalModel(engine_options, sampling)
    if engine_options != EngineOptions(model=engine_options.model):
        raise ConfigError("engine flags say how to run a model here; with --url it runs elsewhere")
    from xllm.server.remote import RemoteModel

    key = os.environ.get("XLLM_API_KEY") or os.environ.get("OPENAI_API_KEY")
    return RemoteModel(options.url, namespace.model, key, sampling)


def one_shot_prompt(options: TalkOptions) -> str | None:
    """What to ask without a conversation: the flag, or what is piped in."""
    if options.prompt is not None:
        return options.prompt
    return None if sys.stdin.isatty() else sys.stdin.read()


def ask_once(answer: Answer) -> int:
    """Streams one answer to stdout, and its speed to stderr."""
    try:
        show(answer, speed_to=sys.stderr)
    except XllmError as e:
        print(f"xllm: {e.message}", file=sys.stderr)
        return FAILED
    return 0


def show(answer: Answer, *, speed_to: TextIO) -> str:
    """Prints an answer as it comes; Ctrl-C ends it early. Returns its text."""
    begin, first, tokens, texts = time.monotonic(), None, 0, []
    try:
        for piece in answer:
            first = time.monotonic() if first is None and piece.text else first
            tokens = tokens + piece.tokens if piece.total_tokens is None else piece.total_tokens
            texts.append(piece.text)
            print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")
    finally:
        answer.close()
    print(flush=True)
    print(_dim(_speed(tokens, begin, first, time.monotonic()), speed_to), file=speed_to, flush=True)
    return "".join(texts)


def _speed(tokens: int, begin: float, first: float | None, end: float) -> str:
    if first is None:
        return f"no text after {end - begin:.2f} s"
    rate = f", {(tokens - 1) / (end - first):.1f} tok/s" if tokens > 1 and end > first else ""
    return f"{tokens} tokens{rate}, first after {first - begin:.2f} s"


def converse(hello: str, on_line: Callable[[str], bool]) -> None:
    """Reads lines until Ctrl-D or until `on_line` returns False."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and history)
    print(_dim(hello, sys.stdout))
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(_dim("\n(Ctrl-D or /exit leaves)", sys.stdout))
            continue
        if line.strip() and not on_line(line):
            return


def complain(error: XllmError) -> None:
    print(f"xllm: {error.message}", file=sys.stderr)


def _dim(text: str, to: TextIO) -> str:
    return f"\x1b[2m{text}\x1b[0m" if to.isatty() else text
