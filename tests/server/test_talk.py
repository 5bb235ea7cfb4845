"""`xllm chat` and `xllm complete`: one question, a conversation, a server elsewhere, the engine here."""

import io
import sys

import pytest

from tests.server.fake_engine import REPLY, client_of, make_engine
from tests.server.live import serving
from xllm.cli import main
from xllm.core.errors import ConfigError
from xllm.server.options import ServerOptions


@pytest.fixture
def terminal(monkeypatch):
    """A terminal at which the given lines are typed; an exception among them is raised instead."""

    def type_in(*lines):
        left = list(lines)

        def read(prompt=""):
            if not left:
                raise EOFError
            line = left.pop(0)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)

    return type_in


@pytest.fixture
def here(monkeypatch, tmp_path):
    """The pretended engine in place of one in this process; the list holds what was started."""
    started = []

    async def start(options, *, in_process=False, on_event=None):
        if options.model == "nowhere":
            raise ConfigError("there is no model called nowhere")
        assert in_process
        started.append(make_engine(tmp_path))
        return started[-1]

    monkeypatch.setattr("xllm.engine.async_llm.AsyncLLM.start", start)
    return started


def test_one_question_to_a_server(live, capsys):
    assert main(["chat", "--url", live.url, "-q", "Where?", "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    assert out == REPLY + "\n"
    assert "tokens, " in err
    assert "tok/s, first after" in err
    assert live.fake.submitted[-1].params.max_tokens is None
    assert live.fake.submitted[-1].params.temperature == 0


def test_a_piped_question(live, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Where?"))
    assert main(["chat", "--url", f"{live.url}/v1/", "fake", "--temperature", "0", "--max-tokens", "6"]) == 0
    assert capsys.readouterr().out == "Grüß\n"


def test_completion_by_a_server(live, capsys):
    assert main(["complete", "--url", live.url, "--prompt", "Once", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == REPLY + "\n"
    assert live.fake.submitted[-1].params.max_tokens == 128


def test_a_conversation(live, capsys, terminal):
    terminal("Hello", "", "And?", "/reset", "Again", "/help", "/what", KeyboardInterrupt(), "/exit", "unread")
    assert (
        main(["chat", "--url", live.url, "--system", "Be kind.", "--temperature", "0", "--max-tokens", "1"])
        == 0
    )
    prompts = [
        live.engine.tokenizer.decode(s.prompt_token_ids, skip_special_tokens=False)
        for s in live.fake.submitted
    ]
    assert [p.count("<|im_start|>") for p in prompts] == [3, 5, 3]
    assert "assistant\nG<|im_end|>" in prompts[1]
    assert all("system\nBe kind." in p for p in prompts)
    out = capsys.readouterr().out
    assert "(forgotten)" in out
    assert out.count("/reset   forget") == 2
    assert "Ctrl-D or /exit leaves" in out


def test_a_turn_that_failed_is_no_part_of_the_conversation(live, capsys, terminal):
    terminal("x" * 600, "short")
    assert main(["chat", "--url", live.url, "--temperature", "0", "--max-tokens", "2"]) == 0
    assert "maximum context length" in capsys.readouterr().err
    assert len(live.fake.submitted) == 1


def test_a_server_that_refuses_or_fails(live, capsys, tmp_path):
    assert main(["chat", "other-model", "--url", live.url, "-q", "x"]) == 1
    assert "the server refused (404): The model `other-model` does not exist." in capsys.readouterr().err
    live.fake.fail_after = 2
    assert main(["chat", "--url", live.url, "-q", "x"]) == 1
    assert "a step failed" in capsys.readouterr().err


def test_the_key_for_a_server(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLLM_API_KEY", "k")
    with serving(tmp_path, ServerOptions(api_key=("k",))) as live:
        assert main(["chat", "--url", live.url, "-q", "x", "--max-tokens", "1"]) == 0
        monkeypatch.setenv("XLLM_API_KEY", "wrong")
        assert main(["chat", "--url", live.url, "-q", "x"]) == 1
        assert "401" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "127.0.0.1:9", "http://[bad", "http://x:port"])
def test_no_server(url, capsys):
    assert main(["chat", "--url", url, "-q", "x"]) == 1
    assert capsys.readouterr().err.startswith("xllm: ")


def test_engine_flags_do_not_go_with_a_url(live, capsys):
    assert main(["chat", "--url", live.url, "-q", "x", "--max-num-seqs", "3"]) == 2
    assert "--url" in capsys.readouterr().err


def test_one_question_to_the_engine_here(here, capsys):
    assert main(["chat", "fake", "-q", "Where?", "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    assert out == REPLY + "\n"
    assert f"{len(REPLY.encode()) + 1} tokens, " in err
    assert client_of(here[0]).closed


def test_a_conversation_with_the_engine_here(here, capsys, terminal):
    terminal("Hello", "x" * 600, "More")
    assert main(["chat", "fake", "--temperature", "0", "--max-tokens", "6"]) == 0
    out, err = capsys.readouterr()
    assert out.count("Grüß") == 2
    assert "maximum context length" in err


def test_completing_lines_here(here, capsys, terminal):
    terminal("Once", "x" * 600, "Twice")
    assert main(["complete", "fake", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.count(REPLY) == 2


def test_ctrl_c_stops_an_answer_here(here, capsys, terminal, monkeypatch):
    terminal("Hello", "And?")
    pressed: list[bool] = []

    def stop_once(text="", **how):
        print_(text, **how)
        if text == "r" and not pressed:
            pressed.append(True)
            raise KeyboardInterrupt

    print_ = print
    monkeypatch.setattr("xllm.server.talk.print", stop_once, raising=False)
    assert main(["chat", "fake", "--temperature", "0"]) == 0
    fake = client_of(here[0])
    assert len(fake.submitted) == 2
    assert len(fake.aborted) == 1
    again = here[0].tokenizer.decode(fake.submitted[1].prompt_token_ids, skip_special_tokens=False)
    assert "assistant\nGr<|im_end|>" in again
    assert REPLY in capsys.readouterr().out


def test_an_engine_error_here(here, capsys, terminal, monkeypatch):
    from tests.server.fake_engine import FakeClient

    make = FakeClient.__init__
    monkeypatch.setattr(
        FakeClient, "__init__", lambda self, *a, **k: make(self, *a, **{**k, "fail_after": 3})
    )
    assert main(["chat", "fake", "-q", "x"]) == 1
    assert "a step failed" in capsys.readouterr().err


def test_no_such_model_here(here, capsys):
    assert main(["chat", "nowhere", "-q", "x"]) == 2
    assert capsys.readouterr().err == "xllm: there is no model called nowhere\n"


def test_a_model_without_a_template_here(monkeypatch, tmp_path, capsys):
    async def start(options, *, in_process=False, on_event=None):
        return make_engine(tmp_path, template=None)

    monkeypatch.setattr("xllm.engine.async_llm.AsyncLLM.start", start)
    assert main(["chat", "fake", "-q", "x"]) == 1
    assert "xllm complete" in capsys.readouterr().err
