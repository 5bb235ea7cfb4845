"""An engine core behind a `Hub`, used by two front ends at once."""

import contextlib
import threading
import time

import pytest

from tests import checkpoints
from tests.engine.scripted import ScriptedRunner, expected, make_core, submit
from xllm.config.options import EngineOptions
from xllm.core.output import Finish
from xllm.engine.build import build_core, decide
from xllm.engine.client import InlineClient
from xllm.wire.dial import Dial
from xllm.wire.doors import Listen
from xllm.wire.hub import Hub
from xllm.wire.messages import Outputs, Ready, Shutdown

WAIT_S = 30.0


@pytest.fixture
def hub(tmp_path):
    with contextlib.closing(Hub([Listen(f"ipc://{tmp_path}/hub"), Listen("tcp://127.0.0.1:*")])) as hub:
        yield hub


@contextlib.contextmanager
def running(core):
    loop = threading.Thread(target=core.run)
    loop.start()
    yield
    core.stopping = True
    loop.join()
    core.close()


@contextlib.contextmanager
def dialled(hub):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(Dial(address))) for address in hub.addresses]
        assert all(client.wait_ready(WAIT_S) for client in clients)
        yield clients


def collect(client, count):
    """-> tokens and finish of each of `count` requests."""
    tokens: dict[str, list[int]] = {}
    ends: dict[str, Finish] = {}
    deadline = time.monotonic() + WAIT_S
    while len(ends) < count:
        message = client.receive(0.1)
        assert time.monotonic() < deadline
        for output in message.outputs if isinstance(message, Outputs) else ():
            assert output.request_id not in ends
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish is not None:
                ends[output.request_id] = output.finish
    return tokens, ends


def test_a_scripted_engine_serves_two_clients_that_call_their_requests_alike(hub):
    core, _ = make_core()
    core.inbox = hub
    with running(core), dialled(hub) as clients:
        prompts = [{f"r{k}": [10 * i + k + 1] * (k + 1) for k in range(12)} for i in range(2)]
        for k in range(12):
            for client, mine in zip(clients, prompts, strict=True):
                client.send(submit(f"r{k}", mine[f"r{k}"], max_tokens=20))
        for client, mine in zip(clients, prompts, strict=True):
            tokens, ends = collect(client, 12)
            assert tokens == {id: expected(prompt, 20) for id, prompt in mine.items()}
            assert set(ends.values()) == {Finish.LENGTH}
    core.scheduler.audit()


def test_a_client_that_goes_takes_its_requests_along_and_no_others(hub):
    slow = ScriptedRunner(before=lambda plan: time.sleep(0.002))
    core, _ = make_core(slow)
    core.inbox = hub
    with running(core), dialled(hub) as (goes, stays):
        for client in (goes, stays):
            for k in range(4):
                client.send(submit(f"r{k}", [k + 1], max_tokens=100))
        assert goes.receive(WAIT_S) is not None
        goes.close()
        tokens, _ = collect(stays, 4)
        assert tokens == {f"r{k}": expected([k + 1], 100) for k in range(4)}
        deadline = time.monotonic() + WAIT_S
        while core.busy:
            assert time.monotonic() < deadline
    core.scheduler.audit()
    assert core.scheduler.stats().kv_usage == 0.0


def test_a_model_answers_two_clients_at_once_as_it_answers_one_alone(tmp_path, hub):
    config = decide(EngineOptions(model=str(checkpoints.save_qwen3(tmp_path / "model")), threads=1))
    requests = [submit(f"r{k}", [20 + k, 7, 5, 100 + k], max_tokens=24) for k in range(6)]
    wanted: dict[str, list[int]] = {}
    with contextlib.closing(InlineClient(config)) as alone:
        wanted = {}
        for one in requests:
            alone.send(one)
            wanted |= collect(alone, 1)[0]
    core, config = build_core(config, hub, hub.send, {})
    hub.send(Ready(config=config))
    with running(core), dialled(hub) as clients:
        for client in clients:
            ready = client.receive(WAIT_S)
            assert isinstance(ready, Ready)
            assert ready.config == config
        for one in requests:
            for client in clients:
                client.send(one)
        for client in clients:
            assert collect(client, 6)[0] == wanted
        clients[0].send(Shutdown())  # not its to say
        clients[0].send(requests[0])
        assert collect(clients[0], 1)[0] == {"r0": wanted["r0"]}
