"""What becomes of sessions when a process dies, stops or talks nonsense."""

import contextlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zmq

from tests.processes import freeze
from tests.wire.echoing import WAIT_S, Echo, ask, until
from xllm.wire import session
from xllm.wire.dial import Dial, State
from xllm.wire.doors import Listen
from xllm.wire.hub import Hub, Limits
from xllm.wire.messages import (
    VERSION,
    Abort,
    Beat,
    FromClient,
    FromHub,
    Goodbye,
    Heartbeat,
    Hello,
    Outputs,
    Refused,
    Submit,
    Welcome,
    WireError,
)

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def process(what, address):
    with subprocess.Popen(
        [sys.executable, "-m", "tests.wire.echoing", what, address],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        try:
            assert child.stdout is not None
            yield child, child.stdout.readline().strip()
        finally:
            child.kill()


@pytest.fixture
def echo(tmp_path):
    listen = [Listen(f"ipc://{tmp_path}/hub"), Listen("tcp://127.0.0.1:*")]
    with contextlib.closing(Echo(Hub(listen, Limits(silence_s=1.5)))) as echo:
        yield echo


@pytest.fixture(params=[0, 1], ids=["ipc", "tcp"])
def address(echo, request):
    return echo.hub.addresses[request.param]


def test_a_killed_client_is_forgotten_and_its_requests_are_aborted(echo, address):
    with process("ask", address) as (child, said):
        assert said == "ready"
        until(lambda: echo.running)
        child.kill()
        until(lambda: echo.aborted == ["1/forever"], timeout_s=4.0)
    assert echo.hub.clients == 0


def test_a_stopped_client_holds_up_nobody(echo, address):
    with process("ask", address) as (child, _), contextlib.closing(Dial(address)) as other:
        assert other.wait_ready(WAIT_S)
        until(lambda: echo.running)
        freeze(child.pid)
        deadline = time.monotonic() + 4.0
        while not echo.aborted:
            assert time.monotonic() < deadline
            for i in range(50):
                echo.hub.send(Heartbeat(progress=i, busy=True))
            for i in range(50):
                assert other.receive(WAIT_S) == Heartbeat(progress=i, busy=True)
        assert echo.aborted == ["1/forever"]
        child.send_signal(signal.SIGCONT)
        assert child.stdout is not None
        assert "nothing was heard" in child.stdout.readline()
        assert other.state is State.READY


def test_an_owner_may_be_stopped_for_as_long_as_it_likes(tmp_path):
    listen = [Listen(f"ipc://{tmp_path}/owner", owner=True), Listen(f"ipc://{tmp_path}/hub")]
    with (
        contextlib.closing(Echo(Hub(listen, Limits(silence_s=0.5)))) as echo,
        process("ask", echo.hub.addresses[0]) as (owner, _),
        process("ask", echo.hub.addresses[1]) as (other, _),
    ):
        until(lambda: len(echo.running) == 2)
        for child in (owner, other):
            freeze(child.pid)
        until(lambda: echo.aborted)  # of the one that is no owner
        time.sleep(1.5)
        assert echo.aborted == ["2/forever"]
        assert echo.hub.clients == 1
        owner.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("kind", ["ipc", "tcp"])
def test_an_engine_that_dies_or_stops_is_lost_within_three_seconds(tmp_path, kind, how):
    asked = f"ipc://{tmp_path}/hub" if kind == "ipc" else "tcp://127.0.0.1:*"
    with process("serve", asked) as (child, address), contextlib.closing(Dial(address)) as client:
        assert client.wait_ready(WAIT_S)
        client.send(ask("r", []))
        begin = time.monotonic()
        child.send_signal(how)
        assert client.receive(WAIT_S) is None
        assert time.monotonic() - begin < 3.0
        assert client.state is State.LOST


def test_time_in_which_a_process_itself_was_stopped_is_nobodys_silence(tmp_path):
    with process("serve", f"ipc://{tmp_path}/hub") as (child, address), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(Dial(address, silence_s=30.0))) for _ in range(5)]
        assert all(client.wait_ready(WAIT_S) for client in clients)
        freeze(child.pid)
        time.sleep(2.5)  # the hub forgets who is silent for 1.5 s
        child.send_signal(signal.SIGCONT)
        for client in clients:
            client.send(ask("r", [4]))
            assert _own_output(client).token_ids == [4]


def test_after_an_engines_death_a_new_dial_finds_the_next_one(tmp_path):
    asked = f"ipc://{tmp_path}/hub"
    with process("serve", asked) as (child, address), contextlib.closing(Dial(address)) as old:
        assert old.wait_ready(WAIT_S)
        child.kill()
        assert old.receive(WAIT_S) is None
        with contextlib.closing(Dial(address)) as new, process("serve", asked):
            assert new.wait_ready(WAIT_S)
            new.send(ask("r", [4]))
            assert isinstance(new.receive(WAIT_S), Outputs)


# somebody who speaks badly


@pytest.fixture
def raw(address):
    """A bare socket: what is sent and what comes are bytes."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.connect(address)
    yield dealer
    dealer.close()
    context.term()


def heard(raw):
    assert raw.poll(round(WAIT_S * 1000))
    return session.unseal(raw.recv(), session.from_hub)


def begun(raw, name):
    """A session by hand."""
    raw.send(session.seal(name, 0, Hello()))
    assert heard(raw) == (name, 0, Welcome(silence_s=1.5, unacknowledged_bytes=Limits().unacknowledged_bytes))


def test_a_gap_ends_the_session_and_what_was_asked_in_it(echo, raw):
    begun(raw, 77)
    raw.send(session.seal(77, 0, ask("r", [])))
    raw.send(session.seal(77, 2, Beat()))
    assert heard(raw)[2] == Refused(reason="message 1 should have come, 2 came")
    until(lambda: echo.aborted == ["1/r"])


def test_a_hello_said_twice_is_one_and_an_unknown_session_is_refused(echo, raw):
    begun(raw, 77)
    raw.send(session.seal(77, 0, Hello()))
    raw.send(session.seal(78, 0, Beat()))
    assert heard(raw) == (0, 0, Refused(reason="there is no such session"))
    raw.send(session.seal(77, 0, Goodbye()))
    until(lambda: echo.hub.clients == 0)


def test_another_version_is_refused_in_a_sentence(echo, raw):
    raw.send(b"\x01anything")
    assert "peer speaks wire version 1" in heard(raw)[2].reason


def test_a_hub_of_another_version_is_lost_with_a_sentence(tmp_path):
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(f"ipc://{tmp_path}/hub")
    with contextlib.closing(Dial(f"ipc://{tmp_path}/hub")) as client:
        identity, _ = router.recv_multipart()
        router.send_multipart([identity, b"\x01whatever"])
        assert not client.wait_ready(WAIT_S)
        assert "peer speaks wire version 1" in (client.reason or "")
    router.close(linger=0)
    context.term()


def test_nonsense_from_anybody_breaks_nothing(echo, raw, caplog):
    """Random bytes, and real frames cut, changed and joined; meanwhile an honest client works on."""
    dice = random.Random(5)
    said: list[FromClient | FromHub] = [
        Hello(), ask("r", [1, 2, 3]), Abort(request_ids=["r"]), Beat(taken=9), Goodbye(), Heartbeat(progress=1, busy=True),
    ]  # fmt: skip
    frames = [session.seal(77, max(0, i - 1), message) for i, message in enumerate(said)]
    with contextlib.closing(Dial(echo.hub.addresses[0])) as honest:
        assert honest.wait_ready(WAIT_S)
        for i in range(3000):
            frame = bytearray(
                dice.choice(frames) if dice.random() < 0.8 else dice.randbytes(dice.randrange(60))
            )
            for _ in range(dice.randrange(3)):
                if frame:
                    frame[dice.randrange(len(frame))] = dice.randrange(256)
            cut = bytes(frame[: dice.randrange(len(frame) + 1)] if dice.random() < 0.3 else frame)
            raw.send_multipart([cut] * dice.choice([1, 1, 1, 2]))
            if i % 100 == 0:
                honest.send(ask(f"r{i}", [i]))
                assert _own_output(honest).token_ids == [i]
        assert honest.state is State.READY
    assert "Traceback" not in caplog.text
    assert len(caplog.records) < 100  # not one for each


def _own_output(client):
    message = client.receive(WAIT_S)
    assert isinstance(message, Outputs)
    return message.outputs[0]


def test_deep_nesting_and_values_that_a_struct_refuses_are_wire_errors():
    good = session.seal(1, 0, Submit(request_id="r", prompt_token_ids=[1], params=ask("", []).params))
    bad = good.replace(b"\xa6params\xde\x00\x00", b"\xa6params\x81\xa1n\xd1\xff\xff")  # n = -1
    assert bad != good
    deep = session.HEADER.pack(VERSION, 1, 0) + b"\x91" * 100_000
    for frame in (bad, deep, b"", good[:5]):
        with pytest.raises(WireError):
            session.unseal(frame, session.from_client)
