"""The engine as a child process: what becomes of it when its parent ends, and what its parent learns when it ends."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from tests import checkpoints
from xllm.config.options import EngineOptions
from xllm.core.errors import EngineFault, Unavailable
from xllm.engine.build import decide
from xllm.engine.client import ProcessClient
from xllm.wire.messages import Abort, Loading

PARENT = """
    import sys, threading
    from xllm.config.options import EngineOptions
    from xllm.engine.build import decide
    from xllm.engine.client import ProcessClient
    client = ProcessClient(decide(EngineOptions(model=sys.argv[1], threads=1)))
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


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_engine_outlives_its_parent_nor_leaves_files(model, how, tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), str(model)],
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


def test_a_ctrl_c_in_the_terminal_is_the_parents_to_handle(config):
    with contextlib.closing(ProcessClient(config)) as client:
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


def test_a_checkpoint_that_cannot_be_loaded_is_told_in_a_sentence(model, config, tmp_path):
    import dataclasses

    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    broken = dataclasses.replace(config, model=dataclasses.replace(config.model, directory=str(tmp_path)))
    with pytest.raises(EngineFault) as fault:
        ProcessClient(broken)
    assert "safetensors" in fault.value.message


def test_a_killed_engine_is_noticed_and_named(config):
    client = ProcessClient(config)
    psutil.Process(client.pid).kill()
    wait_until(lambda: client.dead() is not None)
    assert "SIGKILL" in (client.dead() or "")
    wait_until(lambda: _refuses(client))
    client.close()
    client.close()  # twice is once


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
