"""Who is let in, and what becomes of those who say something else than the protocol does."""

import contextlib
import os
import random
import socket
import struct
import threading
import time

import msgspec
import psutil
import pytest
import torch

from tests.executor.transports.giving import LONG, contents
from xllm.core.errors import ConfigError
from xllm.executor.transports import base, tcp_serving
from xllm.executor.transports.base import Description, TransportError
from xllm.executor.transports.table import open_transport


@pytest.fixture
def giving():
    transport = open_transport("tcp", contents(8, 100, 1), token="secret")
    yield transport
    transport.close()


@pytest.fixture
def here():
    opened = []

    def open_with(token):
        memory = torch.zeros(8, 100, dtype=torch.uint8)
        opened.append(open_transport("tcp", memory, token=token))
        return memory, opened[-1]

    yield open_with
    for transport in opened:
        transport.close()


def place(transport):
    description = msgspec.msgpack.decode(transport.descriptor(), type=Description)
    return description, tuple(msgspec.msgpack.decode(description.place))


def admitted(transport):
    """A socket that may ask."""
    description, address = place(transport)
    sock = socket.create_connection(address, LONG)
    challenge = sock.recv(tcp_serving.GREETING_BYTES, socket.MSG_WAITALL).removeprefix(tcp_serving.MAGIC)
    proof = tcp_serving.proof("secret", challenge, description.epoch)
    sock.sendall(tcp_serving.MAGIC + description.epoch + proof)
    assert sock.recv(1) == tcp_serving.WELCOME
    return sock


def hangs_up(sock):
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    sock.close()
    return True


def still_gives(giving, here):
    memory, transport = here("secret")
    assert transport.connect(giving.descriptor()).read([7], [0]).wait(LONG)
    return torch.equal(memory[0], contents(8, 100, 1)[7])


@pytest.mark.parametrize("token", [None, "another"])
def test_a_wrong_token_opens_nothing(giving, here, token, caplog):
    _, transport = here(token)
    with pytest.raises(TransportError, match="another XLLM_CLUSTER_TOKEN"):
        transport.connect(giving.descriptor())
    assert "shows a wrong token" in caplog.text
    assert "secret" not in caplog.text
    assert still_gives(giving, here)


def test_one_that_is_another_says_so(giving, here):
    description, _ = place(giving)
    _, transport = here("secret")
    old = msgspec.structs.replace(description, epoch=bytes(16))
    with pytest.raises(TransportError, match="started anew"):
        transport.connect(base.pack(old))


def test_an_empty_token_keeps_nobody_out():
    with pytest.raises(ConfigError, match="empty token"):
        open_transport("tcp", contents(2, 10, 1), token="")


def test_nobody_listens_where_there_is_no_such_address():
    with pytest.raises(ConfigError, match="cannot be given out"):
        open_transport("tcp", contents(2, 10, 1), listen="192.0.2.77")


@pytest.mark.parametrize(
    "request_bytes",
    [
        struct.pack(">QI1I", 1, 1, 8),
        struct.pack(">QI", 1, 0),
        struct.pack(">QI", 1, 9),
        struct.pack(">QI", 1, 2**32 - 1),
    ],
)
def test_blocks_that_there_are_not_end_the_connection(giving, here, request_bytes, caplog):
    sock = admitted(giving)
    sock.sendall(request_bytes)
    assert hangs_up(sock)
    assert "is disconnected: it asks for" in caplog.text
    assert still_gives(giving, here)


def test_noise_is_dropped_and_told(giving, here, caplog):
    source = random.Random(1)
    _, address = place(giving)
    for i in range(150):
        sock = admitted(giving) if i % 3 else socket.create_connection(address, LONG)
        try:
            sock.sendall(source.randbytes(source.choice([1, 11, 12, 60, 1000])))
            sock.shutdown(socket.SHUT_WR)
        except OSError:  # it has hung up already
            pass
        assert hangs_up(sock)
    assert caplog.text.count("is disconnected") > 30
    assert still_gives(giving, here)


def test_noise_instead_of_an_answer_is_an_error(here):
    memory, transport = here(None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        description, _ = place(transport)
        there = msgspec.msgpack.encode(("127.0.0.1", server.getsockname()[1]))
        descriptor = base.pack(msgspec.structs.replace(description, place=there))
        for noise in (os.urandom(tcp_serving.GREETING_BYTES), tcp_serving.MAGIC + os.urandom(17)):
            server.settimeout(LONG)
            _answer_next(server, noise)
            with pytest.raises(TransportError):
                transport.connect(descriptor)
        _answer_next(server, tcp_serving.MAGIC + bytes(16) + tcp_serving.WELCOME + os.urandom(500))
        reading = transport.connect(descriptor).read([0], [0])
        with pytest.raises(TransportError, match="something else than was asked"):
            reading.wait(LONG)
    assert not memory.any()


def _answer_next(server, data):
    def answer():
        sock, _ = server.accept()
        with sock, contextlib.suppress(ConnectionError):
            sock.sendall(data)
            while sock.recv(1000):
                pass

    threading.Thread(target=answer, daemon=True).start()


def test_those_who_say_or_take_nothing_are_let_go(giving, here, monkeypatch, caplog):
    monkeypatch.setattr(tcp_serving, "STALL_S", 0.2)
    monkeypatch.setattr(tcp_serving, "UNSENT_S", 0.2)
    _, address = place(giving)
    silent = socket.create_connection(address, LONG)
    greedy = admitted(giving)
    ask = tcp_serving.REQUEST.pack(1, 8) + struct.pack(">8I", *range(8))
    greedy.setblocking(False)
    with contextlib.suppress(BlockingIOError):  # when nothing more fits on the way
        while True:
            greedy.send(ask * 1000)
    assert hangs_up(silent)
    deadline = time.monotonic() + LONG
    while caplog.text.count("is disconnected") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    greedy.close()
    assert still_gives(giving, here)


def test_nothing_is_left_of_those_who_came_and_went():
    def come_and_go():
        giving = open_transport("tcp", contents(8, 100, 1), token="secret")
        reader = open_transport("tcp", torch.zeros(8, 100, dtype=torch.uint8), token="secret")
        assert reader.connect(giving.descriptor()).read([1], [1]).wait(LONG)
        reader.close()
        giving.close()

    come_and_go()
    process = psutil.Process()
    before = process.num_fds(), threading.active_count()
    for _ in range(20):
        come_and_go()
    assert (process.num_fds(), threading.active_count()) == before
