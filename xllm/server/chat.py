"""`xllm chat`: a conversation in the terminal, with the engine in this process or with a server."""

import argparse
import sys
from dataclasses import dataclass

from xllm.config.flags import from_namespace
from xllm.config.options import knob
from xllm.core.errors import XllmError
from xllm.server.answer import Model
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

HELLO = "Ask away. /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves."
HELP = """\
/reset   forget the conversation so far
/exit    leave (as does Ctrl-D)
/help    this
Ctrl-C   stop the answer"""


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """The conversation."""

    system: str | None = knob(None, "system message to begin with", metavar="TEXT")


def add_parsers(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    add_parser(subparsers, "chat", "talk to a model in the terminal", ChatOptions).set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    prompt = one_shot_prompt(from_namespace(TalkOptions, namespace))
    model = open_model(namespace)
    try:
        chat = Chat(model, from_namespace(ChatOptions, namespace).system)
        if prompt is not None:
            return ask_once(model.chat([*chat.messages, {"role": "user", "content": prompt}]))
        converse(HELLO, chat.on_line)
        return 0
    finally:
        model.close()


class Chat:
    """The conversation so far. A turn that failed is no part of it."""

    def __init__(self, model: Model, system: str | None):
        self._model = model
        self._begin = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._begin)

    def on_line(self, line: str) -> bool:
        """False ends the conversation."""
        command = line.strip()
        if command == "/exit":
            return False
        if command == "/reset":
            self.messages = list(self._begin)
            print("(forgotten)")
        elif command.startswith("/"):
            print(HELP)
        else:
            self._turn(line)
        return True

    def _turn(self, line: str) -> None:
        asked = [*self.messages, {"role": "user", "content": line}]
        try:
            text = show(self._model.chat(asked), speed_to=sys.stdout)
        except XllmError as e:
            complain(e)
            return
        self.messages = [*asked, {"role": "assistant", "content": text}]
