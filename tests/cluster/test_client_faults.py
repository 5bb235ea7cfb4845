"""Instances die, hang, stall, leave and come back while they stream: readers get every token once."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from tests.cluster.front import NOTICED_S, Front, modelled
from tests.cluster.real import instance
from tests.cluster.test_client import kept_nothing
from xllm.engine.modelled import ModelledInstance

STREAMS, TOKENS = 12, 400


@pytest.fixture
def three() -> Iterator[list[ModelledInstance]]:
    instances = [modelled(id) for id in "abc"]
    yield instances
    for one in instances:
        one.stop()


@pytest.fixture
def front(three) -> Iterator[Front]:
    made = Front(*three)
    yield made
    made.close()


@pytest.fixture
def streams(front) -> list[str]:
    """Four on each, and all in their middle."""
    ids = front.ask_many(STREAMS, TOKENS)
    front.until_flowing(*ids)
    return ids


def all_right(front: Front, streams: list[str], moved_from: str) -> None:
    """They have ended as if nothing had been; those of the one instance have moved once."""
    front.until_ended(*streams)
    front.check(*streams)
    moved = [id for id in streams if len(front.been(id)) > 1]
    assert len(moved) == STREAMS // 3 == front.client.counts.moves
    assert {front.been(id)[0] for id in moved} == {moved_from}
    assert front.client.counts.failed == 0
    kept_nothing(front)


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_streams_go_on_elsewhere(front, streams, three, how):
    begin = time.monotonic()
    getattr(three[0], how)()
    front.until(lambda: front.client.counts.moves, "they move")
    assert time.monotonic() - begin < NOTICED_S
    all_right(front, streams, "a")
    assert front.state("a") == "away"


def test_a_hung_instance_is_left_and_what_it_says_late_is_nobodys(front, streams, three):
    three[0].hang()
    assert front.until(lambda: front.client.counts.moves == STREAMS // 3, "they move") < NOTICED_S
    three[0].resume()
    all_right(front, streams, "a")
    front.until(lambda: front.state("a") == "serving", "it serves again")
    front.until(lambda: three[0].outstanding == 0, "it has stopped what others do")
    more = front.ask_many(6, 20, "more")
    front.until_ended(*more)
    front.check(*more)
    assert {front.been(id)[0] for id in more} == {"a", "b", "c"}


@pytest.mark.parametrize("late", [False, True], ids=["mid-stream", "before its first token"])
def test_an_engine_that_stands_still_while_its_heart_beats_is_left(front, three, late):
    go_on = threading.Event()
    runner = three[0]._incarnation.runner
    if late:
        runner._pause = go_on.wait
    ids = front.ask_many(STREAMS, TOKENS)
    front.until_flowing(*(id for id in ids if not late or front.been(id) != ["a"]))
    runner._pause = go_on.wait
    took_s = front.until(lambda: front.state("a") == "stalled", "it is left", 10)
    assert took_s < NOTICED_S + 0.5  # heartbeats come four times a second
    all_right(front, ids, "a")
    assert three[0].clients == 1, "the session stays"
    go_on.set()
    front.until(lambda: front.state("a") == "serving", "it serves again")
    front.until(lambda: three[0].outstanding == 0, "it has stopped what others do")
    kept_nothing(front)


def test_nobody_is_silent_while_nobody_listens(front, streams):
    time.sleep(3.5)  # what is tested is that time passes: longer than a silence, or a standstill, may last
    front.until_ended(*streams)
    front.check(*streams)
    assert front.client.counts.moves == 0
    assert {status.state for status in front.client.instances()} == {"serving"}


@pytest.mark.parametrize("order", ["left first", "joined first"])
def test_a_restarted_instance_takes_requests_again(front, streams, three, order):
    a, before = three[0], three[0].info
    a.kill()
    a.start()
    if order == "left first":
        front.client.left("a", before.epoch)
        front.client.joined(a.info)
    else:
        front.client.joined(a.info)
        front.client.left("a", before.epoch)
    front.until(lambda: front.state("a") == "serving", "it serves")
    assert front.status("a").epoch == a.epoch > before.epoch
    more = front.ask_many(6, 20, "more")
    front.until_ended(*streams, *more)
    front.check(*streams, *more)
    assert a.epoch in {
        one["epoch"] for id in more
        for one in front.client.decision(id[:-2])["completions"][0]["stages"]
    }  # fmt: skip
    front.until(lambda: len(front.client.instances()) == 3, "nothing is left of the one before")
    kept_nothing(front)


def test_one_after_the_other_is_restarted_while_streams_run(front, three):
    ids = front.ask_many(STREAMS, 1500)
    front.until_flowing(*ids)
    for one in three:
        front.client.changed(replace(one.info, draining=True))
        front.until(lambda one=one: front.state(one.id) == "draining", "it drains")
        before = one.epoch
        one.stop()
        front.client.left(one.id, before)
        one.start()
        front.client.joined(one.info)
        front.until(lambda one=one: front.state(one.id) == "serving", "it serves again")
    front.until_ended(*ids)
    front.check(*ids)
    assert front.client.counts.failed == 0
    kept_nothing(front)


def test_with_nobody_left_streams_wait_for_who_comes_back(front, streams, three):
    infos = [one.info for one in three]
    for one in three:
        one.kill()
    front.until(lambda: front.client._dispatcher.homeless == STREAMS, "nobody has them")
    assert not front.ends and front.client.missing()
    for info in infos:
        front.client.left(info.id, info.epoch)
    three[1].start()
    front.client.joined(three[1].info)
    front.until_ended(*streams)
    front.check(*streams)
    kept_nothing(front)


def test_a_session_that_does_not_begin_is_tried_again():
    """The port takes connections, and what was said into it is lost."""
    front, connections = Front(), list[socket.socket]()

    def again() -> bool:
        with contextlib.suppress(BlockingIOError):
            connections.append(silent.accept()[0])
        return len(connections) == 2

    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.setblocking(False)
        front.client.joined(instance("a", address=f"tcp://127.0.0.1:{silent.getsockname()[1]}"))
        front.until(again, "it is tried again", 10)
        front.close()
    for one in connections:
        one.close()
