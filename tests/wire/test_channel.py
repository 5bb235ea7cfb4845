import tempfile
import threading
import time

import pytest
import zmq

from xllm.wire.channel import MemoryChannel, ZmqChannel, ZmqSender
from xllm.wire.messages import Abort, Heartbeat, Shutdown, WireError


@pytest.fixture(params=["memory", "zmq"])
def ends(request):
    if request.param == "memory":
        yield MemoryChannel.pair()
        return
    context = zmq.Context()
    with tempfile.TemporaryDirectory() as directory:
        there, back = f"ipc://{directory}/there", f"ipc://{directory}/back"
        a = ZmqChannel(context, send_to=there, receive_from=back, bind=True)
        b = ZmqChannel(context, send_to=back, receive_from=there, bind=False)
        assert a.wait_connected(5.0)
        yield a, b
        a.close()
        b.close()
        context.term()


def test_messages_arrive_in_order_both_ways(ends):
    a, b = ends
    for i in range(100):
        a.send(Abort(request_ids=[str(i)]))
    assert [b.receive(5.0).request_ids[0] for _ in range(100)] == [str(i) for i in range(100)]
    b.send(Shutdown())
    assert a.receive(5.0) == Shutdown()


def test_receive_without_a_message_returns_none_in_time(ends):
    a, _ = ends
    begin = time.monotonic()
    assert a.receive(0.0) is None
    assert a.receive(0.05) is None
    assert time.monotonic() - begin < 5.0


def test_a_waiting_receive_is_woken(ends):
    a, b = ends
    timer = threading.Timer(0.05, lambda: a.send(Shutdown()))
    timer.start()
    assert b.receive(10.0) == Shutdown()
    timer.join()


def test_a_second_thread_sends_through_a_sender_of_its_own():
    context = zmq.Context()
    with tempfile.TemporaryDirectory() as directory:
        there, back = f"ipc://{directory}/there", f"ipc://{directory}/back"
        front = ZmqChannel(context, send_to=there, receive_from=back, bind=True)
        sender = ZmqSender(context, back)
        sender.send(Heartbeat(progress=1, busy=False))
        assert front.receive(5.0) == Heartbeat(progress=1, busy=False)
        sender.close()
        front.close()
        context.term()


def test_sending_to_nobody_raises_and_never_waits():
    """A killed engine once left the front end waiting for ever in a send."""
    context = zmq.Context()
    with tempfile.TemporaryDirectory() as directory:
        sender = ZmqSender(context, f"ipc://{directory}/there", bind=True)
        with pytest.raises(WireError, match="nobody is connected"):
            sender.send(Shutdown())
        sender.close()
        context.term()
