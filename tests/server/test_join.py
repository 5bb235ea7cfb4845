"""`xllm serve --etcd URL` as real processes with a real etcd: an instance comes, serves, drains and goes."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
import pytest

from tests.server.command import Command, command, url_of
from xllm.cluster.etcd import Etcd
from xllm.cluster.etcd_child import EtcdChild
from xllm.cluster.instance import InstanceInfo, Keys, LoadSummary, decode
from xllm.core.output import Finish
from xllm.core.sampling import SamplingParams
from xllm.core.stats import SchedulerStats
from xllm.server.cluster_options import TOKEN_VARIABLE
from xllm.server.join import default_id, own_address, summary
from xllm.wire.dial import Dial
from xllm.wire.messages import Outputs, Submit

SERVE = ("-m", "xllm.cli", "serve", "demo", "--port", "0", "--disable-log-stats")
WAIT_S = 30.0
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def child():
    with EtcdChild() as child:
        yield child


def until(condition: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)
    return found


class Registry:
    """What stands in etcd about one id, read anew at each call."""

    def __init__(self, url: str, cluster: str, id: str):
        self._url, self._keys, self._id = url, Keys(cluster), id

    @property
    def entry(self) -> InstanceInfo | None:
        value = asyncio.run(self._read(self._keys.instance(self._id)))
        return None if value is None else decode(value, InstanceInfo)

    @property
    def load(self) -> LoadSummary | None:
        value = asyncio.run(self._read(self._keys.load(self._id)))
        return None if value is None else decode(value, LoadSummary)

    async def _read(self, key: bytes) -> bytes | None:
        etcd = Etcd(self._url)
        try:
            found = (await etcd.range(key)).kvs
            return found[0].value if found else None
        finally:
            await etcd.aclose()


@contextmanager
def instance(etcd: str, cluster: str, *more: str, token: str = "") -> Iterator[Command]:
    flags = ("--etcd", etcd, "--cluster", cluster, "--instance-id", "one")
    with command(*SERVE, *flags, *more, env={TOKEN_VARIABLE: token}) as server:
        yield server


def joined(server: Command, registry: Registry) -> InstanceInfo:
    server.wait_for("^joined cluster ")
    assert registry.entry is not None
    return registry.entry


@contextmanager
def dialled(info: InstanceInfo) -> Iterator[Dial]:
    with contextlib.closing(Dial(info.address)) as dial:
        assert dial.wait_ready(WAIT_S), dial.reason
        assert dial.peer == info.id
        yield dial


def ask(id: str, prompt: list[int], tokens: int) -> Submit:
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return Submit(request_id=id, prompt_token_ids=prompt, params=params)


class Answer:
    def __init__(self, dial: Dial):
        self._dial = dial
        self.tokens: list[int] = []
        self.finish: Finish | None = None

    def hear(self) -> bool:
        """-> whether it has ended."""
        while (message := self._dial.receive(0.0)) is not None:
            for output in message.outputs if isinstance(message, Outputs) else ():
                self.tokens += output.token_ids
                self.finish = output.finish or self.finish
        return self.finish is not None


def test_an_instance_registers_and_answers_over_the_wire_as_over_http(child):
    registry = Registry(child.url, "answers", "one")
    with instance(child.url, "answers") as server:
        url = url_of(server)
        info = joined(server, registry)
        assert (info.http, info.model, info.role, info.draining) == (url, "demo", "both", False)
        assert info.address.startswith("tcp://127.0.0.1:")
        assert info.kv.block_size == 16
        assert len(bytes.fromhex(info.kv.fingerprint)) == 16
        with httpx.Client(base_url=url, timeout=WAIT_S) as http, dialled(info) as dial:
            body = {
                "prompt": PROMPT,
                "max_tokens": 40,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            choice = http.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]
            dial.send(ask("r", choice["prompt_token_ids"], 40))
            answer = Answer(dial)
            until(answer.hear, "the answer")
            assert answer.tokens == choice["token_ids"]
        load = until(lambda: (load := registry.load) and load.sequence and load, "a load summary")
        assert load.cached_blocks["GPU"] > 0
        assert load.running == load.waiting == 0


def test_what_is_advertised_can_be_reached_with_the_token(child):
    registry = Registry(child.url, "shown", "one")
    listen = ("--listen", "tcp://0.0.0.0:*", "--advertise", "localhost")
    with instance(child.url, "shown", *listen, token="secret") as server:
        address = joined(server, registry).address
        assert address.startswith("tcp://localhost:")
        with contextlib.closing(Dial(address)) as stranger:
            assert not stranger.wait_ready(WAIT_S)
            assert stranger.reason == "refused: the token is not the right one"
        with contextlib.closing(Dial(address, token="secret")) as dial:
            assert dial.wait_ready(WAIT_S)
        assert "note:" not in server.text


def test_sigterm_lets_what_others_asked_for_finish_and_takes_the_entry_away(child):
    registry = Registry(child.url, "drains", "one")
    with instance(child.url, "drains") as server:
        info = joined(server, registry)
        with dialled(info) as dial:
            answer = Answer(dial)
            dial.send(ask("r", [5] * 30, 1900))
            until(lambda: answer.hear() or answer.tokens, "the first token")
            server.terminate()
            until(lambda: (entry := registry.entry) is not None and entry.draining, "draining to stand there")
            assert answer.finish is None
            assert server.process.poll() is None
            until(answer.hear, "the answer")
            assert answer.finish is Finish.LENGTH
            assert len(answer.tokens) == 1900
            assert server.end() == 0
            until(lambda: dial.receive(0.05) is None and dial.reason, "the goodbye")
            assert dial.reason == "the engine has said goodbye"
        assert registry.entry is None
        assert server.lines[-1] == "stopped"
        assert "Traceback" not in server.text


def test_what_others_asked_for_holds_the_end_up_no_longer_than_the_time_out(child):
    registry = Registry(child.url, "hurries", "one")
    with instance(child.url, "hurries", "--shutdown-timeout", "1") as server:
        info = joined(server, registry)
        with dialled(info) as dial:
            for k in range(40):
                dial.send(ask(f"r{k}", [k + 5] * 30, 1900))
            until(lambda: isinstance(dial.receive(0.05), Outputs), "the first token")
            begin = time.monotonic()
            server.terminate()
            assert server.end() == 0
            assert 0.9 < time.monotonic() - begin < 10.0
            until(lambda: dial.receive(0.0) is None and dial.reason, "the end of the session")
        assert registry.entry is None


def test_an_instance_whose_engine_is_killed_leaves(child):
    registry = Registry(child.url, "dies", "one")
    with instance(child.url, "dies") as server:
        joined(server, registry)
        (engine,) = (c for c in server.children() if "xllm.engine.process" in " ".join(c.cmdline()))
        begin = time.monotonic()
        engine.kill()
        assert server.end() == 1
        assert registry.entry is None
        assert time.monotonic() - begin < 8.0  # its lease alone would have lasted longer
        assert "the engine is gone" in server.text


def test_a_killed_instance_leaves_no_engine_behind(child):
    registry = Registry(child.url, "killed", "one")
    with instance(child.url, "killed") as server:
        joined(server, registry)
        children = server.children()
        os.kill(server.process.pid, signal.SIGKILL)
        assert not psutil.wait_procs(children, timeout=15.0)[1]
        server.end()


def test_the_younger_of_two_with_one_id_stays(child):
    registry = Registry(child.url, "twice", "one")
    with instance(child.url, "twice") as older:
        first = joined(older, registry)
        with instance(child.url, "twice") as younger:
            second = joined(younger, registry)
            assert second.epoch > first.epoch
            assert older.end() == 0
            assert "stopping: a newer process is instance one" in older.text
            assert registry.entry == second
            with dialled(second) as dial:
                dial.send(ask("r", [5] * 5, 3))
                until(Answer(dial).hear, "an answer of the younger one")


def test_an_etcd_that_is_not_there_is_waited_for():
    with EtcdChild() as child:
        child.stop()
        registry = Registry(child.url, "later", "one")
        with instance(child.url, "later") as server:
            url = url_of(server)
            server.wait_for("^etcd does not answer: joins cluster later as one, at tcp://.* when it does$")
            assert httpx.get(f"{url}/ready", timeout=WAIT_S).status_code == 200
            child.start()
            joined(server, registry)
            child.stop()
            server.terminate()
            assert server.end() == 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--instance-id", "a"), "--instance-id is for an instance of a cluster: give --etcd URL too"),
        (
            ("--etcd", "http://127.0.0.1:1", "--enable-sleep-mode"),
            "--enable-sleep-mode: other instances may be reading the KV memory that sleep gives back; add --kv-transport none",
        ),
        (("--listen", "tcp://127.0.0.1:*"), "--listen is for an instance"),
        (("--advertise", "here"), "--advertise is for an instance"),
        (("--etcd", "127.0.0.1:2379"), "etcd"),
        (("--etcd", "http://127.0.0.1:1", "--listen", "ipc://x"), "--listen is tcp://HOST:PORT"),
        (("--etcd", "http://127.0.0.1:1", "--instance-id", "a/b"), "--instance-id consists of"),
        (
            ("--etcd", "http://127.0.0.1:1", "--kv-transport", "pigeon"),
            "--kv-transport is one of auto, nixl, tcp, mooncake, none",
        ),
    ],
)
def test_what_cannot_work_is_one_sentence(flags, sentence):
    done = subprocess.run([sys.executable, *SERVE, *flags], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_names_and_addresses_that_nobody_gave():
    assert default_id(8000).endswith("-8000")
    assert own_address("http://127.0.0.1:2379") == "127.0.0.1"
    assert own_address("http://nowhere.invalid:2379")


def test_a_summary_before_the_first_sign_of_life_is_empty():
    assert summary(None) == LoadSummary(sequence=0)
    stats = SchedulerStats(1, 2, 1, 0.5, 100, 50, 0, 3, 200, 30, 17, cached_blocks=4)
    assert summary(stats) == LoadSummary(0, 1, 2, 0.5, {"GPU": 4})
