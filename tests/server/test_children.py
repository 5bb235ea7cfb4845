"""One child kept running: lines, readiness, deaths, pauses, ends. Real processes, small ones."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from functools import partial

import pytest

from tests.cluster.real import until
from xllm.core.errors import ConfigError
from xllm.server.children import Child, Deaths, GaveUp, Patience, Spec, ending
from xllm.server.log_lines import Line, LogLines

QUICK = Patience(pause_s=0.02)


def child(code: str, patience: Patience = QUICK, on_change: Callable[[], None] = lambda: None, **env: str):
    said: list[Line] = []
    spec = Spec("one", (sys.executable, "-c", code), env)
    return Child(spec, LogLines(said.append), patience, on_change), said


SERVES = "import time; print('Ready: http://127.0.0.1:7/v1  model=x'); time.sleep(600)"


async def test_it_is_ready_when_it_says_so_and_ends_when_asked():
    states: list[str] = []
    one, said = child(SERVES, on_change=lambda: states.append(one.state))
    running = asyncio.create_task(one.run())
    await until(lambda: one.state == "ready")
    assert one.url == "http://127.0.0.1:7"
    one.stop()
    await asyncio.wait_for(running, 20)
    assert states == ["ready", "stopped"] and one.restarts == 0 and one.pid is None
    assert said == [("one", "Ready: http://127.0.0.1:7/v1  model=x")]


async def test_a_child_of_several_processes_is_ready_when_all_of_them_are(tmp_path):
    code = (
        "import time; print('router-1 | Ready: http://127.0.0.1:7/v1'); print('half'); open({!r}).read();"
        "print('router-2 | Ready: http://127.0.0.1:7/v1'); time.sleep(600)"
    )
    go = tmp_path / "go"
    os.mkfifo(go)
    said: list[Line] = []
    spec = Spec("one", (sys.executable, "-c", code.format(str(go))), processes=2)
    one = Child(spec, LogLines(said.append))
    running = asyncio.create_task(one.run())
    await until(lambda: ("one", "half") in said)
    assert one.state == "starting"
    await asyncio.to_thread(go.write_text, "")
    await until(lambda: one.state == "ready")
    one.stop()
    await asyncio.wait_for(running, 20)


async def test_a_death_is_told_and_another_one_started():
    one, said = child(SERVES)
    running = asyncio.create_task(one.run())
    for times in (1, 2):
        await until(lambda: one.state == "ready")
        assert one.pid is not None
        os.kill(one.pid, signal.SIGKILL)
        await until(partial(lambda wanted: one.restarts == wanted, times))
    await until(lambda: one.state == "ready")
    one.stop()
    await asyncio.wait_for(running, 20)
    assert ("one", "** ended unasked: signal SIGKILL") in said
    assert ("one", "** is started again in 0.04 s") in said  # longer after the second


async def test_deaths_one_after_another_are_the_end_with_the_last_lines():
    one, said = child("import sys; print('why'); sys.exit(9)", Patience(deaths=3, pause_s=0.01))
    with pytest.raises(GaveUp, match=r"(?s)one has died 3 times within 60 s.*\n  why"):
        await asyncio.wait_for(one.run(), 30)
    assert said.count(("one", "** ended unasked: exit code 9")) == 3


async def test_a_refusal_is_the_end_at_once():
    one, said = child("import sys; sys.exit(2)")
    with pytest.raises(ConfigError, match=r"one cannot run:\n  \(it said nothing\)"):
        await asyncio.wait_for(one.run(), 30)
    assert len(said) == 1


async def test_without_restart_the_first_death_is_the_last():
    one, _ = child("pass", Patience(restart=False))
    await asyncio.wait_for(one.run(), 30)
    assert one.state == "down" and one.restarts == 0


async def test_stopped_while_it_waits_to_start_again():
    one, _ = child("pass", Patience(pause_s=600))
    running = asyncio.create_task(one.run())
    await until(lambda: one.state == "down")
    one.stop()
    await asyncio.wait_for(running, 5)
    assert one.state == "stopped"


async def test_one_that_does_not_hear_is_killed():
    one, _ = child(f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SERVES}")
    running = asyncio.create_task(one.run())
    await until(lambda: one.state == "ready")
    one.stop()
    one.kill()
    await asyncio.wait_for(running, 20)
    assert one.state == "stopped"


async def test_who_is_cancelled_leaves_no_process():
    one, _ = child(SERVES)
    running = asyncio.create_task(one.run())
    await until(lambda: one.state == "ready")
    pid = one.pid
    assert pid is not None
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_its_environment_is_ours_and_its_own(monkeypatch):
    monkeypatch.setenv("XLLM_OURS", "a")
    one, said = child(
        "import os; print(os.environ['XLLM_OURS'], os.environ['ITS'])", Patience(restart=False), ITS="b"
    )
    await asyncio.wait_for(one.run(), 30)
    assert said[0] == ("one", "a b")


def test_deaths_are_forgotten_after_the_window(monkeypatch):
    times = iter((0.0, 20.0, 40.0, 70.0, 200.0))
    monkeypatch.setattr("xllm.server.children.time.monotonic", lambda: next(times))
    deaths = Deaths(Patience(window_s=60))
    assert [deaths.another() for _ in range(5)] == [1, 2, 3, 3, 1]


def test_pauses_grow_and_have_an_end():
    assert [Patience().pause(n) for n in (1, 2, 3, 10)] == [0.5, 1.0, 2.0, 10.0]


def test_endings_in_words():
    assert (ending(3), ending(-9), ending(-64)) == ("exit code 3", "signal SIGKILL", "signal SIGRTMAX")
