"""The engine as a child process: what becomes of it when its parent ends, and what its parent learns when it ends."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import msgspec
import psutil
import pytest

from tests import checkpoints
from tests.processes import freeze
from xllm.config.options import EngineOptions
from xllm.core.errors import EngineFault, Unavailable
from xllm.core.sampling import SamplingParams
from xllm.engine.build import decide
from xllm.engine.client import ProcessClient
from xllm.wire.dial import Dial
from xllm.wire.doors import Listening
from xllm.wire.hub import Limits
from xllm.wire.messages import Abort, FollowKv, Loading, Outputs, Shutdown, Submit, SubmitMany

LISTENING = Listening(("tcp://127.0.0.1:*",), token="secret", name="one")
LONG = SamplingParams(max_tokens=100, ignore_eos=True)

PARENT = """
    import sys, threading
    from xllm.config.options import EngineOptions
    from xllm.engine.build import decide
    from xllm.engine.client import ProcessClient
    from xllm.wire.doors import Listening
    listening = Listening(("tcp://127.0.0.1:*",)) if "listening" in sys.argv else None
    client = ProcessClient(decide(EngineOptions(model=sys.argv[1], threads=1)), listening=listening)
    print(client.pid, flush=True)
    threading.Event().wait()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.save_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture
def config(model):
    return decide(EngineOptions(model=str(model), threads=1))


def wait_until(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("channel", ["alone", "listening"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_engine_outlives_its_parent_nor_leaves_files(model, how, channel, tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), str(model), channel],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    with parent:
        assert parent.stdout is not None
        engine = int(parent.stdout.readline())
        assert psutil.pid_exists(engine)
        parent.send_signal(how)
        parent.wait()
        wait_until(lambda: _has_ended(engine))
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("listening", [None, LISTENING], ids=["alone", "listening"])
def test_a_ctrl_c_in_the_terminal_is_the_parents_to_handle(config, listening):
    with contextlib.closing(ProcessClient(config, listening=listening)) as client:
        psutil.Process(client.pid).send_signal(signal.SIGINT)
        client.send(Abort(request_ids=[]))
        beats = client.pulse()[0]
        wait_until(lambda: client.receive(0.1) is not None and client.pulse()[0] is not beats)
        assert client.dead() is None


def test_start_reports_loading_and_the_time_of_each_part(config):
    heard: list[Loading] = []
    with contextlib.closing(ProcessClient(config, heard.append)) as client:
        assert set(client.startup_s) >= {"import", "kernels", "weights", "memory", "warm-up"}
    assert heard
    assert all(isinstance(message, Loading) for message in heard)


@pytest.mark.parametrize("listening", [None, LISTENING], ids=["alone", "listening"])
def test_a_checkpoint_that_cannot_be_loaded_is_told_in_a_sentence(model, config, listening, tmp_path):
    import dataclasses

    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    broken = dataclasses.replace(config, model=dataclasses.replace(config.model, directory=str(tmp_path)))
    with pytest.raises(EngineFault) as fault:
        ProcessClient(broken, listening=listening)
    assert "safetensors" in fault.value.message


@pytest.mark.parametrize("listening", [None, LISTENING], ids=["alone", "listening"])
def test_a_killed_engine_is_noticed_and_named(config, listening):
    client = ProcessClient(config, listening=listening)
    psutil.Process(client.pid).kill()
    wait_until(lambda: client.dead() is not None)
    assert "SIGKILL" in (client.dead() or "")
    wait_until(lambda: _refuses(client))
    client.close()
    client.close()  # twice is once


def test_an_engine_that_listens_serves_others_and_obeys_its_owner_alone(config):
    asks = Submit(
        request_id="r",
        prompt_token_ids=[3, 4, 5],
        params=SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True),
    )
    with contextlib.closing(ProcessClient(config, listening=LISTENING)) as client:
        (address,) = client.addresses
        assert re.fullmatch(r"tcp://127\.0\.0\.1:\d+", address)
        with contextlib.closing(Dial(address)) as stranger:
            assert not stranger.wait_ready(20.0)
            assert "token" in (stranger.reason or "")
        with contextlib.closing(Dial(address, token="secret")) as other:
            assert other.wait_ready(20.0)
            assert other.peer == "one"
            other.send(Shutdown())
            other.send(FollowKv(call_id=1))
            for end in (client, other):
                end.send(asks)
            tokens = [_tokens(end) for end in (client, other)]
            assert tokens[0] == tokens[1]
            assert len(tokens[0]) == 5
            many = [msgspec.structs.replace(asks, request_id=str(k), params=LONG) for k in range(400)]
            other.send(SubmitMany(requests=many))
            wait_until(lambda: client.receive(0.1) is not None and client.pulse()[0].outstanding > 0)
        wait_until(lambda: client.receive(0.1) is not None and client.pulse()[0].outstanding == 0)
    assert client.dead() == "the engine process ended unexpectedly (exit code 0)"


def test_an_address_that_is_taken_is_told_in_a_sentence(config):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(EngineFault) as fault:
            ProcessClient(config, listening=Listening((address,)))
    assert fault.value.message == f"cannot listen at {address}: it is in use by another process"


def test_a_parent_that_was_stopped_for_long_goes_on(model):
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), str(model), "listening"],
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        try:
            assert parent.stdout is not None
            engine = psutil.Process(int(parent.stdout.readline()))
            freeze(parent.pid)
            time.sleep(Limits().silence_s + 2.0)
            parent.send_signal(signal.SIGCONT)
            with pytest.raises(psutil.TimeoutExpired):
                engine.wait(1.0)
        finally:
            parent.kill()


def _tokens(client):
    tokens: list[int] = []
    deadline = time.monotonic() + 20.0
    while time.monotonic() < deadline:
        message = client.receive(0.1)
        for output in message.outputs if isinstance(message, Outputs) else ():
            tokens += output.token_ids
            if output.finish is not None:
                return tokens
    raise AssertionError(tokens)


def _has_ended(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _refuses(client):
    try:
        client.send(Abort(request_ids=[]))
    except Unavailable:
        return True
    return False


def test_stacks_are_dumped_on_request(model, tmp_path):
    """Whichever thread the signal meets: a thread of a library has no Python frames and is not called current."""
    code = PARENT.replace("print(client.pid, flush=True)", "client.dump_stacks()")
    written = tmp_path / "stderr"
    with (
        written.open("wb") as stderr,
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(model)], stderr=stderr) as parent,
    ):
        try:
            wait_until(
                lambda: re.search(
                    r"Thread 0x.*process\.py\", line \d+ in main", written.read_text(), re.DOTALL
                )
            )
        finally:
            parent.kill()
