import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import zmq

from xllm.config.decided import KvEventsConfig
from xllm.core.errors import ConfigError
from xllm.wire.publisher import END, Kept, Publisher

WAIT_MS = 10_000


def settings(directory, **changes):
    defaults = {
        "endpoint": f"ipc://{directory}/live", "bind": True, "replay_endpoint": f"ipc://{directory}/replay", "topic": "kv@pod@model",
        "buffer_steps": 100, "hwm": 1000, "max_queue_size": 1000,
    }  # fmt: skip
    return KvEventsConfig(**{**defaults, **changes})


@pytest.fixture
def context():
    with zmq.Context() as context:
        yield context


@pytest.fixture
def start(tmp_path):
    with contextlib.ExitStack() as stack:

        def start(encode=bytes, **changes):
            publisher = Publisher(settings(tmp_path, **changes), encode)
            stack.callback(publisher.close)
            return publisher

        yield start


def connect(context, kind, address):
    socket = context.socket(kind)
    socket.linger = 0
    socket.rcvtimeo = WAIT_MS
    socket.connect(address)
    return socket


def subscriber(context, publisher, topic=b""):
    """Connected, and known to be: batches are published until one came through."""
    socket = connect(context, zmq.SUB, publisher.endpoint)
    socket.subscribe(topic)
    deadline = time.monotonic() + 10
    while not socket.poll(5):
        assert time.monotonic() < deadline
        publisher.publish(b"hello")
    return socket


def wait_until(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


def numbers_again(context, publisher, first, delimiter=(b"",)):
    with connect(context, zmq.DEALER, publisher._config.replay_endpoint) as replay:
        replay.send_multipart([*delimiter, first.to_bytes(8, "big")])
        found: list[tuple[int, bytes]] = []
        while True:
            *before, topic, number, payload = replay.recv_multipart()
            assert before == list(delimiter)
            if number == END:
                assert (topic, payload) == (b"", b"")
                return found
            assert topic == b"kv@pod@model"
            found.append((int.from_bytes(number, "big"), payload))


def test_a_subscriber_gets_topic_number_and_payload_in_order(context, start):
    publisher = start()
    with subscriber(context, publisher, topic=b"kv@") as live:
        for i in range(500):
            publisher.publish(b"%d" % i)
        topic, number, payload = live.recv_multipart()
        while payload == b"hello":
            topic, number, payload = live.recv_multipart()
        begin = int.from_bytes(number, "big")
        for i in range(500):
            assert (topic, number, payload) == (b"kv@pod@model", (begin + i).to_bytes(8, "big"), b"%d" % i)
            if i < 499:
                topic, number, payload = live.recv_multipart()


@pytest.mark.parametrize("delimiter", [(b"",), ()])
def test_a_late_subscriber_replays(context, start, delimiter):
    publisher = start()
    for i in range(10):
        publisher.publish(b"%d" % i)
    wait_until(lambda: publisher.published == 10)
    assert numbers_again(context, publisher, 0, delimiter) == [(i, b"%d" % i) for i in range(10)]
    assert numbers_again(context, publisher, 7, delimiter) == [(i, b"%d" % i) for i in range(7, 10)]
    assert numbers_again(context, publisher, 10, delimiter) == []


def test_only_the_last_batches_are_kept_and_the_loss_shows(context, start):
    publisher = start(buffer_steps=3)
    for i in range(10):
        publisher.publish(b"%d" % i)
    wait_until(lambda: publisher.published == 10)
    assert [number for number, _ in numbers_again(context, publisher, 2)] == [7, 8, 9]


def test_a_replay_longer_than_any_default_limit_is_whole(context, start):
    publisher = start(buffer_steps=5000, max_queue_size=5000)
    for _ in range(5000):
        publisher.publish(b"x" * 100)
    wait_until(lambda: publisher.published == 5000)
    assert [number for number, _ in numbers_again(context, publisher, 0)] == list(range(5000))


def test_kept_is_bounded_in_bytes_too():
    kept = Kept(steps=100, limit_bytes=10)
    for number in range(5):
        kept.add(number, zmq.Frame(b"1234"), 4)
    assert [number for number, _ in kept.since(0)] == [3, 4]
    kept.add(5, zmq.Frame(b"x" * 50), 50)
    assert [number for number, _ in kept.since(0)] == [5]


def test_nonsense_on_the_replay_socket_harms_nobody(context, start):
    publisher = start()
    publisher.publish(b"0")
    with connect(context, zmq.DEALER, publisher._config.replay_endpoint) as replay:
        for nonsense in ([b""], [b"", b"12"], [b"x", b"y" * 8], [b""] * 9, [b"", b"z" * 5000]):
            replay.send_multipart(nonsense)
    assert numbers_again(context, publisher, 0) == [(0, b"0")]


def test_a_full_queue_drops_visibly_and_blocks_nobody(context, start):
    encoding, go_on = threading.Event(), threading.Event()

    def encode(batch):
        encoding.set()
        assert go_on.wait(10)
        return batch

    publisher = start(encode, max_queue_size=2)
    publisher.publish(b"0")
    assert encoding.wait(10)
    for i in range(1, 6):
        publisher.publish(b"%d" % i)
    assert publisher.dropped == 3
    go_on.set()
    wait_until(lambda: publisher.published == 3)
    publisher.publish(b"6")
    wait_until(lambda: publisher.published == 4)
    assert [number for number, _ in numbers_again(context, publisher, 0)] == [0, 1, 2, 6]


def test_a_batch_that_cannot_be_encoded_is_lost_alone(context, start, caplog):
    def encode(batch):
        if batch == b"bad":
            raise ValueError("no")
        return batch

    publisher = start(encode)
    for batch in (b"good", b"bad", b"good"):
        publisher.publish(batch)
    wait_until(lambda: publisher.published == 2)
    assert publisher.dropped == 1
    assert [number for number, _ in numbers_again(context, publisher, 0)] == [0, 2]
    assert "number 1 will be missing" in caplog.text


def test_a_subscriber_that_never_reads_gets_the_rest_by_replay(context, start):
    publisher = start(hwm=10, buffer_steps=3000, max_queue_size=3000)
    live = context.socket(zmq.SUB)
    live.linger = 0
    live.rcvhwm = 1
    live.subscribe(b"")
    with live, contextlib.ExitStack() as others:
        live.connect(publisher.endpoint)
        other = others.enter_context(subscriber(context, publisher))  # reads all the while
        first = publisher.published
        for _ in range(2000):
            publisher.publish(b"x" * 4096)
        wait_until(lambda: publisher.published >= first + 2000)
        assert publisher.dropped == 0
        assert [n for n, _ in numbers_again(context, publisher, first)][-1] == publisher.published - 1
        assert other.poll(WAIT_MS)


def test_a_subscriber_that_dies_is_forgotten(context, start):
    publisher = start()
    code = (
        "import sys, zmq; s = zmq.Context().socket(zmq.SUB); s.subscribe(b''); s.connect(sys.argv[1]);"
        "s.recv(); print('there', flush=True); s.recv_multipart(); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, publisher.endpoint],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        os.set_blocking(child.stdout.fileno(), False)
        heard: list[bytes] = []

        def there():
            publisher.publish(b"hello")
            assert child.stdout is not None
            heard.append(child.stdout.read() or b"")
            return b"there" in b"".join(heard)

        wait_until(there)
        child.send_signal(signal.SIGKILL)
    with subscriber(context, publisher) as live:
        publisher.publish(b"after")
        while live.recv_multipart()[2] != b"after":
            pass


@pytest.mark.parametrize("scheme", ["ipc", "tcp", "replay"])
def test_an_endpoint_in_use_is_refused_with_a_sentence(start, scheme):
    first = start(endpoint="tcp://127.0.0.1:*") if scheme == "tcp" else start()
    changes = {"ipc": {}, "tcp": {"endpoint": first.endpoint}, "replay": {"endpoint": "tcp://127.0.0.1:*"}}[
        scheme
    ]
    with pytest.raises(ConfigError, match="in use by another process"):
        start(**changes)


def test_an_endpoint_that_cannot_be_is_refused_with_a_sentence(start, tmp_path):
    with pytest.raises(ConfigError, match="cannot listen at ipc://"):
        start(endpoint=f"ipc://{tmp_path}/absent/live")
    with pytest.raises(ConfigError, match=r"cannot listen at tcp://192\.0\.2\.1"):
        start(replay_endpoint="tcp://192.0.2.1:5558")  # not ours


def test_a_file_left_behind_is_taken_over(start):
    start().close()
    start()


def test_it_connects_to_a_collector(context, start):
    with context.socket(zmq.SUB) as collector:
        collector.linger = 0
        collector.subscribe(b"")
        port = collector.bind_to_random_port("tcp://127.0.0.1")
        publisher = start(endpoint=f"tcp://localhost:{port}", bind=False)

        def came():
            publisher.publish(b"x")
            return collector.poll(5)

        wait_until(came)


def test_without_replay_nothing_is_kept(context, start):
    publisher = start(replay_endpoint=None)
    with subscriber(context, publisher) as live:
        live.recv_multipart()
    assert list(publisher._kept.since(0)) == []


def test_closing_sends_what_waits_and_ends_the_thread(context, start):
    publisher = start()
    with subscriber(context, publisher) as live:
        for i in range(50):
            publisher.publish(b"%d" % i)
        publisher.close()
        publisher.close()
        assert publisher.published == publisher._next
        while (last := live.recv_multipart()[2]) != b"49":
            assert last
    assert not publisher._thread.is_alive()
