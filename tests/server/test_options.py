"""Server options, the socket, the operator's template."""

import socket

import pytest

from tests.server.fake_engine import byte_tokenizer
from xllm.core.errors import ConfigError, InvalidRequest
from xllm.server.listen import CannotListen, listen
from xllm.server.options import ServerOptions
from xllm.server.serve import address
from xllm.server.templates import choose_template, request_template
from xllm.server.version import version


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": -1}, {"port": 65536}, {"shutdown_timeout": -1.0}, {"shutdown_timeout": float("nan")}, {"api_key": ("",)},
        {"api_key": ("a", " ")}, {"root_path": "x"}, {"root_path": "/x/"},
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong)).replace("_", "-")):
        ServerOptions(**wrong)


@pytest.mark.parametrize(
    ("host", "shown"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("localhost", "localhost")],
)
def test_the_address_that_is_shown(host, shown):
    with listen(host, 0) as listener:
        assert address(host, listener) == f"http://{shown}:{listener.getsockname()[1]}"


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_ipv6():
    try:
        listener = listen("::1", 0)
    except CannotListen:
        pytest.skip("no IPv6 here")
    with listener:
        assert address("::1", listener).startswith("http://[::1]:")


def test_a_taken_port():
    with listen("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(CannotListen, match="choose another with --port"):
            listen("127.0.0.1", first.getsockname()[1])


def test_the_operators_template_is_text_or_a_file(tmp_path):
    tokenizer = byte_tokenizer()
    hello = [{"role": "user", "content": "Hi"}]
    (tmp_path / "t.jinja").write_text("file {{ messages[0].content }}")
    for given in ("{{ 'text' }} {{ messages[0].content }}", str(tmp_path / "t.jinja")):
        template = choose_template(tokenizer, given)
        assert template is not None
        assert template.render(hello) == f"{'text' if given.startswith('{') else 'file'} Hi"
    with pytest.raises(ConfigError, match="neither a readable file"):
        choose_template(tokenizer, str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="error"):
        choose_template(tokenizer, "{% for %}")
    assert choose_template(byte_tokenizer(template=None), None) is None


def test_a_requests_template_that_does_not_compile():
    for text in ("{% for %}", "{{ " + "(" * 5000 + ")" * 5000 + " }}"):
        with pytest.raises(InvalidRequest) as refused:
            request_template(byte_tokenizer(), text)
        assert refused.value.param == "chat_template"


def test_version_without_an_installation(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("xllm.server.version.installed", absent)
    assert version() == "0+source"
