"""What goes wrong between engines that exchange KV costs time: never a token, never a block."""

import contextlib
import os
import random
import signal
import threading
import time
from typing import Any

import pytest

from tests import checkpoints
from tests.engine.bare import options_for
from tests.engine.dialling import dialled, ended, listen, until
from tests.engine.kv_in_process import Network
from tests.engine.pd_pair import QUICK, asked, member
from tests.engine.test_pd import OUTPUT, run_all
from xllm.core.output import Finish
from xllm.core.peers import Failure, KvFrom
from xllm.engine.build import decide
from xllm.engine.client import ProcessClient
from xllm.engine.fetches import Patience
from xllm.executor.fingerprint import fingerprint
from xllm.wire.doors import Listening
from xllm.wire.messages import Abort, Offer, Provide, Provided, Taken

SHORT = Patience(progress_s=0.3, connect_s=0.5, pause_s=0.0)
BROKEN = {"drop": Failure.TIMEOUT, "corrupt": Failure.CHECKSUM, "reorder": Failure.CHECKSUM,
          "break": Failure.TRANSPORT, "refuse": Failure.TRANSPORT, "delay": None, "double": None}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.save_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(12)
    return [[rng.randrange(3, checkpoints.VOCAB) for _ in range(20 + 4 * i)] for i in range(7)]


@pytest.fixture(scope="module")
def truth(model, prompts):
    return checkpoints.greedy(model, prompts, OUTPUT)


@pytest.mark.parametrize("which", ["first", "second", "every"])
@pytest.mark.parametrize("fault", BROKEN)
def test_a_transport_that_fails_costs_no_token(model, prompts, truth, fault, which):
    hit = {"first": lambda number: number == 0, "second": lambda number: number == 1, "every": lambda _: True}
    network = Network(lambda number: fault if hit[which](number) else "")
    chunk = 64 if fault == "reorder" else 8  # of one block nothing can be in another order
    with (
        member(model, network, "p", long_prefill_token_threshold=chunk) as p,
        member(model, network, "d", patience=SHORT) as d,
    ):
        if fault == "delay":
            threading.Timer(0.1, network.released.set).start()
        assert run_all(d, prompts, p.kv_from()) == truth
        until(lambda: d.at_rest() and p.at_rest(), "both rest")
        expected = BROKEN[fault]
        assert (expected in d.stats.failures) == (expected is not None), d.stats
        network.fault = lambda number: ""
        d.core.scheduler.pool.reset_cache()
        before = d.stats.fetched_blocks
        assert run_all(d, prompts, p.kv_from(), "again") == truth
        assert d.stats.fetched_blocks > before, "the next ones are fetched again"


@pytest.mark.parametrize("seed", range(3))
def test_random_faults_over_tcp(model, prompts, truth, seed):
    rates = "&".join(
        f"{kind}=0.06" for kind in ("drop", "delay", "corrupt", "swap", "reorder", "double", "break")
    )
    with (
        member(model, "tcp", "p", long_prefill_token_threshold=8) as p,
        member(model, f"faulty:tcp?{rates}&seed={seed}", "d", patience=SHORT) as d,
    ):
        for turn in range(4):
            assert run_all(d, prompts, p.kv_from(), f"t{turn}-") == truth
            for one in (p, d):
                until(one.at_rest, "rest")
                one.core.scheduler.pool.reset_cache()
        assert d.stats.fetched_blocks > 0


def test_others_go_on_while_a_peer_stalls(model, prompts, truth):
    network = Network(lambda number: "drop")
    with member(model, network, "p") as p, member(model, network, "d", patience=Patience(2.0, 1.0)) as d:
        begun = time.monotonic()
        d.dial.send(asked("stalls", prompts[0], p.kv_from(), OUTPUT))
        assert run_all(d, prompts[1:3], None) == truth[1:3]
        assert time.monotonic() - begun < 1.5
        tokens, _, _ = listen(d.dial, ended("stalls"))
        assert tokens["stalls"] == truth[0]
        assert time.monotonic() - begun < 6.0


def test_to_wait_for_a_peer_is_no_standstill(model, prompts, truth):
    """Else routers would take the one who waits for the one who is stuck."""
    network = Network(lambda number: "drop")
    with member(model, network, "p") as p, member(model, network, "d", patience=Patience(1.0, 1.0)) as d:
        d.dial.send(asked("stalls", prompts[0], p.kv_from(), OUTPUT))
        until(lambda: network.readings, "it reads")
        computed, before = d.core.executor.progress, d.core.progress
        until(lambda: d.core.progress > before + 3, "it advances")
        assert d.core.executor.progress == computed
        tokens, _, _ = listen(d.dial, ended("stalls"))
        assert tokens["stalls"] == truth[0]


def test_a_provider_gives_up_on_whoever_takes_nothing(model, prompts, truth):
    network = Network(lambda number: "drop")
    with member(model, network, "p", give_up_s=0.3) as p, member(model, network, "d") as d:
        d.dial.send(asked("stalls", prompts[0], p.kv_from(), OUTPUT))
        until(lambda: p.stats.provision_failures == 1, "it gives up")
        until(p.at_rest, "p")
        tokens, _, _ = listen(d.dial, ended("stalls"))
        assert tokens["stalls"] == truth[0]


@pytest.mark.parametrize("fault", ["", "drop", "delay"])
def test_aborts_at_any_moment_leave_nothing(model, prompts, truth, fault):
    """The engines' own books are looked at as they come to rest."""
    network = Network(lambda number: fault)
    rng = random.Random(3)
    with (
        member(model, network, "p", long_prefill_token_threshold=4) as p,
        member(model, network, "d", patience=SHORT) as d,
    ):
        for i in range(25):
            d.dial.send(asked(f"r{i}", rng.choice(prompts), p.kv_from(), OUTPUT))
            if rng.random() < 0.7:
                time.sleep(rng.choice([0.0, 0.001, 0.004, 0.01]))
                d.dial.send(Abort([f"r{i}"]))
        network.released.set()
        _, ends, _ = listen(d.dial, ended(*(f"r{i}" for i in range(25))))
        assert {end.finish for end in ends.values()} <= {Finish.ABORT, Finish.LENGTH}
        until(lambda: d.at_rest() and p.at_rest(), "both rest")
        network.fault = lambda number: ""
        assert run_all(d, prompts, p.kv_from(), "after") == truth


def test_a_fetcher_that_goes_leaves_nothing(model, prompts):
    network = Network(lambda number: "drop")
    with member(model, network, "p", give_up_s=60.0) as p:
        with member(model, network, "d") as d:
            d.dial.send(asked("r", prompts[6], p.kv_from(), OUTPUT))
            until(lambda: network.readings, "it reads")
            assert p.core.scheduler.pool.usage > 0
            d.stop()
        until(p.at_rest, "p")
        assert p.core.scheduler.pool.usage == 0


def test_a_provider_that_goes_is_done_without(model, prompts, truth):
    network = Network(lambda number: "drop" if number else "")
    with (
        member(model, network, "d", patience=Patience(10.0, 1.0)) as d,
        member(model, network, "p", long_prefill_token_threshold=8) as p,
    ):
        d.dial.send(asked("r", prompts[6], p.kv_from(), OUTPUT))
        until(lambda: len(network.readings) > 1, "it reads")
        p.stop()
        tokens, _, _ = listen(d.dial, ended("r"))
        assert tokens["r"] == truth[6]
        assert d.stats.failures == {Failure.LOST: 1}
        assert d.stats.fetched_blocks == 1, "what had come counts"


@pytest.mark.parametrize("wrong", ["block size", "model", "address", "name", "hub without"])
def test_whom_nothing_can_be_taken_from(model, prompts, truth, wrong, tmp_path):
    network = Network()
    other = checkpoints.save_qwen3(tmp_path / "other", intermediate_size=96) if wrong == "model" else model
    changes: dict[str, Any] = {"block_size": 16} if wrong == "block size" else {}
    with member(other, network, "p", **changes) as p, member(model, network, "d", patience=SHORT) as d:
        kv_from = p.kv_from()
        if wrong == "address":
            kv_from = KvFrom("tcp://127.0.0.1:9")
        elif wrong == "name":
            kv_from = KvFrom(kv_from.address, "somebody else")
        elif wrong == "hub without":
            p.core._peers, peers = None, p.core._peers
        assert run_all(d, prompts[:2], kv_from) == truth[:2]
        (why,) = d.stats.failures
        assert why == (Failure.UNREACHABLE if wrong in ("address", "name") else Failure.REFUSED)
        assert d.stats.fetched_blocks == 0
        if wrong == "hub without":
            p.core._peers = peers


def test_what_a_session_asked_for_goes_with_it(model, prompts):
    """Spoken to by hand, with sense and without."""
    with member(model, Network(), "p", give_up_s=60.0) as p:
        size, mark = p.core.scheduler.pool.block_size, fingerprint(decide(options_for(model, "cpu"))).hex()
        session = dialled(p.hub.addresses[0])
        whole = prompts[6][: len(prompts[6]) // size * size]

        def send(id: str, **changes: Any) -> None:
            fields = {"prompt_token_ids": whole, "first_block": 1, "block_size": size, "fingerprint": mark}
            session.send(Provide(request_id=id, **(fields | changes)))

        wrong: list[dict[str, Any]] = [
            {"prompt_token_ids": whole[:-1]}, {"prompt_token_ids": []}, {"first_block": -1}, {"block_size": 4},
            {"first_block": len(whole) // size}, {"fingerprint": "00"}, {"prompt_token_ids": [-1] * size, "first_block": 0},
            {"prompt_token_ids": [3] * 64 * size},
        ]  # fmt: skip
        for i, changes in enumerate(wrong):
            send(f"wrong {i}", **changes)
        send("right")
        send("right")
        *_, others = listen(session, lambda _, __, others: any(isinstance(m, Offer) for m in others))
        refused = [m.request_id for m in others if isinstance(m, Provided) and m.error]
        assert sorted(refused) == ["right", *(f"wrong {i}" for i in range(len(wrong)))]
        (offer,) = [m for m in others if isinstance(m, Offer)]
        assert (offer.first, offer.total) == (0, len(whole) // size - 1)
        session.send(Taken("right", 1))
        session.send(Taken("nothing", 1))
        until(lambda: p.stats.provided_blocks == 1, "one is taken")
        assert p.core.scheduler.pool.usage > 0
        session.close()
        until(p.at_rest, "p")


# real processes


@contextlib.contextmanager
def process(model, token=None):
    config = decide(options_for(model, "cpu", long_prefill_token_threshold=8))
    listening = Listening(("tcp://127.0.0.1:*",), token, name="p", kv_transport="tcp")
    client = ProcessClient(config, listening=listening)
    try:
        yield client
    finally:
        client.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_dies_or_stops_midway(model, prompts, truth, how):
    with member(model, "tcp", "d", patience=QUICK) as d:
        with process(model) as p:
            kv_from = KvFrom(p.addresses[0], "p", 1)
            assert p.kv_transport == "tcp"
            assert run_all(d, prompts[:3], kv_from, "well") == truth[:3]
            assert d.stats.failures == {}
            for i, prompt in enumerate(prompts):
                d.dial.send(asked(f"r{i}", prompt, kv_from, OUTPUT))
            os.kill(p.pid, how)
            tokens, _, _ = listen(d.dial, ended(*(f"r{i}" for i in range(len(prompts)))))
            assert [tokens[f"r{i}"] for i in range(len(prompts))] == truth
            until(d.at_rest, "d")
            if how == signal.SIGSTOP:
                os.kill(p.pid, signal.SIGCONT)
        d.core.scheduler.pool.reset_cache()
        with process(model) as p:  # restarted
            before = d.stats.fetched_blocks
            assert run_all(d, prompts, KvFrom(p.addresses[0], "p", 2), "restarted") == truth
            assert d.stats.fetched_blocks > before
