"""What `xllm serve` prints, on a terminal and into a file."""

import io

import pytest

from tests.server.live import serving
from xllm.server.console import Console
from xllm.server.options import ServerOptions
from xllm.wire.messages import Loading


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_without_a_terminal():
    out, err = io.StringIO(), io.StringIO()
    console = Console(out, err)
    console.start("demo [x]")
    console.on_event("dtype bfloat16: the checkpoint's [bold]own[/bold]")
    console.on_event(Loading(what="compiling"))
    for done in (0, 500_000, 2_000_000):
        console.on_event(Loading(what="weights", done=done, total=2_000_000))
    lines = out.getvalue().splitlines()
    assert lines[0].endswith("serving demo [x]")
    assert lines[1:] == [
        "  dtype bfloat16: the checkpoint's [bold]own[/bold]",
        "  compiling",
        "  weights: 2.0 MB",
    ]
    assert "\x1b" not in out.getvalue()
    assert err.getvalue() == ""


def test_a_bar_on_a_terminal():
    out, err = Terminal(), Terminal()
    console = Console(out, err)
    for done in (0, 1_000_000, 2_000_000):
        console.on_event(Loading(what="weights", done=done, total=2_000_000))
    console.on_event(Loading(what="draft weights", done=1, total=5))
    console.end_progress()
    assert "weights: 100%" in err.getvalue()
    assert "draft weights" in err.getvalue()
    assert "weights" not in out.getvalue()


@pytest.mark.parametrize(
    ("options", "note"),
    [
        (ServerOptions(), False),
        (ServerOptions(host="0.0.0.0"), True),
        (ServerOptions(host="0.0.0.0", api_key=("k",)), False),
    ],
)
def test_ready(tmp_path, options, note):
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20}')
    out = io.StringIO()
    with serving(tmp_path, options) as live:
        Console(out, io.StringIO()).ready("http://127.0.0.1:1", live.server.state, 1.23)
    text = out.getvalue()
    assert "sampling defaults of the model: temperature=0.6, top_k=20" in text
    assert "Ready: http://127.0.0.1:1/v1  model=fake  (1.2 s)" in text
    assert "curl http://127.0.0.1:1/v1/chat/completions" in text
    assert ("no --api-key is set" in text) == note
    assert "k'" not in text
    assert ("Authorization" in text) == bool(options.api_key)


def test_a_quote_in_the_model_name_does_not_break_the_hint(tmp_path):
    from dataclasses import replace

    out = io.StringIO()
    with serving(tmp_path) as live:
        state = live.server.state
        state.asked = replace(state.asked, served_model_name="it's")
        Console(out, io.StringIO()).ready("http://x", state, 1.0)
    assert """'{"model": "it'"'"'s",""" in out.getvalue()
