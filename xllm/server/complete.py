"""`xllm complete`: a model goes on with a text in the terminal."""

import argparse
import sys

from xllm.config.flags import from_namespace
from xllm.core.errors import XllmError
from xllm.server.talk import (
    TalkOptions,
    add_parser,
    ask_once,
    complain,
    converse,
    one_shot_prompt,
    open_model,
    show,
)

DEFAULT_MAX_TOKENS = 128  # a text has no end of its own as an answer has
HELLO = "Every line is a text to go on with. Ctrl-C stops, Ctrl-D leaves."


def add_parsers(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    add_parser(subparsers, "complete", "let a model continue a text in the terminal").set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    prompt = one_shot_prompt(from_namespace(TalkOptions, namespace))
    model = open_model(namespace, max_tokens=DEFAULT_MAX_TOKENS)

    def on_line(line: str) -> bool:
        try:
            show(model.complete(line), speed_to=sys.stdout)
        except XllmError as e:
            complain(e)
        return True

    try:
        if prompt is not None:
            return ask_once(model.complete(prompt))
        converse(HELLO, on_line)
        return 0
    finally:
        model.close()
