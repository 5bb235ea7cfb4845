"""What `xllm serve` says while it starts: the plan with its reasons, progress, and where to go."""

import json
import shlex
import sys
from typing import Any, TextIO

from rich.console import Console as Rich
from tqdm import tqdm

from xllm.server.state import ServerState
from xllm.server.version import version
from xllm.wire.messages import Loading

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Console:
    """Called from any thread. Words go to `out`, progress bars to `err`."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None):
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._rich = Rich(file=self._out, highlight=False, soft_wrap=True)
        self._bar: tqdm[Any] | None = None
        self._what = ""

    def say(self, text: str, style: str | None = None) -> None:
        self._rich.print(text, style=style, markup=False)
        self._out.flush()

    def start(self, model: str) -> None:
        self.say(f"xLLM {version()} serving {model}", "bold")

    def on_event(self, event: str | Loading) -> None:
        """A decision with its reason, or news about something long."""
        if isinstance(event, str):
            self.say(f"  {event}", "dim")
        elif event.total == 0:
            self.end_progress()
            self.say(f"  {event.what}", "dim")
        else:
            self._progress(event)

    def _progress(self, event: Loading) -> None:
        if self._what != event.what:
            self.end_progress()
            self._what = event.what
            if self._err.isatty():
                tqdm.monitor_interval = 0  # no thread for a bar this short
                self._bar = tqdm(
                    total=event.total, desc=f"  {event.what}", unit="B", unit_scale=True, file=self._err
                )
        if self._bar is not None:
            self._bar.update(event.done - self._bar.n)
        elif event.done >= event.total:
            self.say(f"  {event.what}: {event.total / 1e6:.1f} MB", "dim")
        if event.done >= event.total:
            self.end_progress()

    def end_progress(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._what = None, ""

    def ready(self, url: str, state: ServerState, seconds: float) -> None:
        if defaults := state.default_params:
            shown = ", ".join(f"{name}={value}" for name, value in sorted(defaults.items()))
            self.say(f"  sampling defaults of the model: {shown} (--generation-config none for ours)", "dim")
        keys = state.options.api_keys()
        if not keys and state.options.host not in LOOPBACK:
            self.say("  note: other machines can reach this port and no --api-key is set", "yellow")
        self.say(f"Ready: {url}/v1  model={state.model}  ({seconds:.1f} s)", "bold green")
        self.say(f"Try:   {curl(url, state.model, with_key=bool(keys))}")


def curl(url: str, model: str, *, with_key: bool) -> str:
    key = ' -H "Authorization: Bearer $XLLM_API_KEY"' if with_key else ""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}]})
    return f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
