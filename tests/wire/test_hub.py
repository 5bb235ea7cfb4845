"""Several clients of one engine, over real sockets."""

import asyncio
import contextlib
import threading

import psutil
import pytest

from tests.wire.echoing import WAIT_S, Echo, ask, until
from xllm.core.errors import ConfigError
from xllm.core.output import Finish
from xllm.wire.dial import Dial, State
from xllm.wire.doors import Listen
from xllm.wire.hub import Hub, Limits
from xllm.wire.messages import (
    Abort,
    Fault,
    Heartbeat,
    Outputs,
    Reply,
    ResetPrefixCache,
    Shutdown,
    Sleep,
    Submit,
    WireError,
)

TOKEN = "a token"


@pytest.fixture
def listen(tmp_path):
    return [Listen(f"ipc://{tmp_path}/hub", owner=True), Listen("tcp://127.0.0.1:*", token=TOKEN)]


@pytest.fixture
def hub(listen):
    with contextlib.closing(Hub(listen)) as hub:
        yield hub


@pytest.fixture
def echo(listen):
    with contextlib.closing(Echo(Hub(listen))) as echo:
        yield echo


@pytest.fixture
def dial():
    """Makes clients that are ready."""
    with contextlib.ExitStack() as stack:

        def make(address, **options):
            made = stack.enter_context(contextlib.closing(Dial(address, token=TOKEN, **options)))
            assert made.wait_ready(WAIT_S), made.reason
            return made

        yield make


def answers(client, count):
    """-> tokens of each request, once so many have ended."""
    tokens: dict[str, list[int]] = {}
    while count:
        message = client.receive(WAIT_S)
        assert isinstance(message, Outputs), (message, client.reason)
        for output in message.outputs:
            assert output.error is None
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            count -= output.finish is not None
    return tokens


def test_two_clients_call_their_requests_alike_and_each_gets_its_own(echo, dial):
    clients = [dial(address) for address in echo.hub.addresses]
    for i, client in enumerate(clients):
        client.send(ask("same/id", [i, i, i]))
        client.send(ResetPrefixCache(call_id=7 + i))
    for i, client in enumerate(clients):
        assert answers(client, 1) == {"same/id": [i, i, i]}
        assert client.receive(WAIT_S) == Reply(call_id=7 + i, value=True)
        assert client.receive(0.0) is None


def test_a_thousand_requests_of_eight_clients_with_colliding_ids(echo, dial):
    clients = [dial(echo.hub.addresses[i % 2]) for i in range(8)]
    got: list[dict[str, list[int]]] = [{} for _ in clients]

    def work(i):
        for k in range(125):
            clients[i].send(ask(f"r{k}", [i, k, i + k]))
        got[i] = answers(clients[i], 125)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, tokens in enumerate(got):
        assert tokens == {f"r{k}": [i, k, i + k] for k in range(125)}
    assert not echo.running
    assert not echo.aborted


@pytest.mark.parametrize("which", [0, 1], ids=["ipc", "tcp"])
def test_ten_thousand_messages_each_way_in_order(hub, dial, which):
    client = dial(hub.addresses[which])
    for i in range(10_000):
        client.send(Submit(request_id=str(i), prompt_token_ids=[i], params=ask("", []).params))
        hub.send(Heartbeat(progress=i, busy=True))
    for i in range(10_000):
        beat, submit = client.receive(WAIT_S), hub.receive(WAIT_S)
        assert isinstance(beat, Heartbeat)
        assert beat.progress == i
        assert isinstance(submit, Submit)
        assert submit.prompt_token_ids == [i]


def test_what_is_for_all_reaches_all_and_who_comes_later_hears_of_the_fault(hub, dial):
    first = [dial(address) for address in hub.addresses]
    hub.send(Heartbeat(progress=1, busy=False))
    hub.send(Fault(reason="the end"))
    for client in first:
        assert client.receive(WAIT_S) == Heartbeat(progress=1, busy=False)
        assert client.receive(WAIT_S) == Fault(reason="the end")
    assert dial(hub.addresses[0]).receive(WAIT_S) == Fault(reason="the end")


def test_the_last_word_of_an_engine_arrives_before_its_end(hub, dial):
    client = dial(hub.addresses[1])
    for i in range(50):
        hub.send(Heartbeat(progress=i, busy=True))
    hub.send(Fault(reason="the end"))
    hub.close()
    hub.close()  # twice is once
    for i in range(50):
        assert client.receive(WAIT_S) == Heartbeat(progress=i, busy=True)
    assert client.receive(WAIT_S) == Fault(reason="the end")
    assert client.receive(WAIT_S) is None
    assert client.state is State.LOST
    with pytest.raises(WireError, match=r"is lost: the engine has said goodbye"):
        client.send(Abort(request_ids=[]))


def test_who_says_goodbye_leaves_nothing_behind(hub, dial):
    stays, goes = dial(hub.addresses[0]), dial(hub.addresses[0])
    for client in (stays, goes):
        client.send(ask("r", [1]))
    until(lambda: hub.receive(0.0) is not None)
    assert hub.receive(WAIT_S) is not None
    goes.close()
    assert hub.receive(WAIT_S) == Abort(request_ids=["2/r"])
    assert hub.clients == 1
    assert goes.receive(None) is None  # at once


def test_an_abort_reaches_only_what_the_client_has_here(hub, dial):
    one, other = dial(hub.addresses[0]), dial(hub.addresses[0])
    one.send(ask("r", [1]))
    assert hub.receive(WAIT_S) is not None
    other.send(Abort(request_ids=["r", "1/r"]))
    one.send(Abort(request_ids=["r", "unknown"]))
    assert hub.receive(WAIT_S) == Abort(request_ids=["1/r"])
    assert hub.receive(0.1) is None


def test_a_name_in_use_and_one_too_many_end_with_an_error(listen, dial):
    with contextlib.closing(Hub(listen, Limits(requests=2))) as hub:
        client = dial(hub.addresses[0])
        for id in ("a", "a", "b", "c"):
            client.send(ask(id, [1]))
        errors = [client.receive(WAIT_S).outputs[0] for _ in range(2)]
        assert [(error.request_id, error.finish) for error in errors] == [
            ("a", Finish.ERROR),
            ("c", Finish.ERROR),
        ]
        assert "already here" in errors[0].error
        asked = [hub.receive(WAIT_S) for _ in range(2)]
        assert [one.request_id for one in asked if isinstance(one, Submit)] == ["1/a", "1/b"]


def test_only_an_owner_may_put_the_engine_to_sleep_or_end_it(hub, dial):
    owner, router = (dial(address) for address in hub.addresses)
    router.send(Shutdown())
    router.send(Sleep(call_id=3))
    reply = router.receive(WAIT_S)
    assert reply.call_id == 3
    assert "only" in reply.refused
    owner.send(Shutdown())
    assert hub.receive(WAIT_S) == Shutdown()


def test_a_token_is_asked_for_and_told_to_nobody(hub, caplog):
    assert TOKEN not in repr(Listen("tcp://127.0.0.1:*", token=TOKEN))
    with contextlib.closing(Dial(hub.addresses[1], token="wrong")) as stranger:
        assert not stranger.wait_ready(WAIT_S)
        assert stranger.reason == "refused: the token is not the right one"
    assert hub.clients == 0
    assert "wrong" not in caplog.text


def test_an_owner_that_takes_nothing_is_dropped_and_its_requests_with_it(listen, dial):
    with contextlib.closing(Hub(listen, Limits(unacknowledged_bytes=1 << 20))) as hub:
        lazy, other = dial(hub.addresses[0]), dial(hub.addresses[1])
        lazy.send(ask("r", [1]))
        assert hub.receive(WAIT_S) is not None
        until(lambda: _told(hub, other) and lazy.state is State.LOST)
        assert lazy.reason == "refused: it does not take what it is sent"
        assert hub.receive(WAIT_S) == Abort(request_ids=["1/r"])
        assert other.state is State.READY


def _told(hub, other):
    for i in range(100):
        hub.send(Heartbeat(progress=i, busy=False))
    for i in range(100):
        assert other.receive(WAIT_S) == Heartbeat(progress=i, busy=False)
    return True


def test_who_sends_more_than_the_engine_takes_is_dropped(listen, dial):
    with contextlib.closing(Hub(listen, Limits(unread=10))) as hub:
        client = dial(hub.addresses[0])
        for i in range(11):
            client.send(ask(str(i), [1]))
        assert client.receive(WAIT_S) is None
        assert client.reason == "refused: it sends more than the engine takes"
        received = [hub.receive(WAIT_S) for _ in range(12)]
        assert received[-1] == Abort(request_ids=sorted(f"1/{i}" for i in range(11)))


def test_a_dial_waits_for_an_engine_that_is_not_there_yet(tmp_path):
    address = f"ipc://{tmp_path}/hub"
    with contextlib.closing(Dial(address)) as early:
        assert not early.wait_ready(0.3)
        assert early.state is State.CONNECTING
        with pytest.raises(WireError, match="is connecting"):
            early.send(Shutdown())
        with contextlib.closing(Hub([Listen(address)], name="seven")):
            assert early.wait_ready(WAIT_S)
            assert early.peer == "seven"
            assert early.silent_s < WAIT_S


def test_addresses_that_cannot_be_used_are_told_in_a_sentence(hub):
    for address in hub.addresses:
        with pytest.raises(ConfigError, match="in use by another process"):
            Hub([Listen(address)])
    with pytest.raises(ConfigError, match="an empty token"):
        Hub([Listen("tcp://127.0.0.1:*", token="")])
    with pytest.raises(WireError, match="cannot connect to nonsense"):
        Dial("nonsense")


def test_sessions_leave_no_descriptors_and_no_threads(hub):
    def once():
        for address in hub.addresses:
            with contextlib.closing(Dial(address, token=TOKEN)) as client:
                assert client.wait_ready(WAIT_S)

    once()
    me = psutil.Process()
    until(lambda: hub.clients == 0)
    before = me.num_fds(), me.num_threads()
    for _ in range(30):
        once()
    until(lambda: hub.clients == 0)
    until(lambda: me.num_fds() <= before[0] + 4 and me.num_threads() <= before[1] + 1)


def test_an_event_loop_waits_for_several(echo):
    async def talk():
        news = asyncio.Event()
        loop = asyncio.get_running_loop()
        clients = [
            Dial(address, token=TOKEN, notify=lambda: loop.call_soon_threadsafe(news.set))
            for address in echo.hub.addresses
        ]
        ended = 0
        asked = set()
        while ended < 2:
            await asyncio.wait_for(news.wait(), WAIT_S)
            news.clear()
            for client in clients:
                if client.state is State.READY and client not in asked:
                    asked.add(client)
                    client.send(ask("r", [5]))
                while (message := client.receive(0.0)) is not None:
                    ended += isinstance(message, Outputs)
        for client in clients:
            await asyncio.to_thread(client.close)

    asyncio.run(talk())
