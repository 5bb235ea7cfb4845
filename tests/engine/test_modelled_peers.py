"""Modelled instances give KV to each other as others do; it only takes time."""

import threading
import time

import pytest

from tests.engine.dialling import dialled, ended, listen, until
from tests.engine.test_modelled import QUICK
from xllm.core.peers import KvFrom
from xllm.core.sampling import SamplingParams
from xllm.engine.modelled import ModelledInstance, Shape
from xllm.engine.modelled_peers import ModelledTransport
from xllm.engine.modelled_runner import Speed, answer
from xllm.executor.transports.base import TransportError
from xllm.wire.messages import Submit

PROMPT = list(range(100, 900))
BLOCKS = (len(PROMPT) - 1) // 16


@pytest.fixture
def prefill():
    slow = Speed(base_s=0.001, token_s=0.0002)
    with ModelledInstance("p", slow, Shape(max_num_batched_tokens=128), role="prefill", fetch_s=0.0) as made:
        yield made


def asked(id, peer, prompt=PROMPT):
    kv_from = KvFrom(peer.address, peer.id, peer.epoch)
    params = SamplingParams(max_tokens=8, temperature=0.0)
    return Submit(request_id=id, prompt_token_ids=prompt, params=params, kv_from=kv_from)


def run(instance, submit):
    """-> its tokens."""
    dial = dialled(instance.address)
    dial.send(submit)
    tokens, _, _ = listen(dial, ended(submit.request_id))
    dial.close()
    return tokens[submit.request_id]


def decode(fetch_s=0.0):
    return ModelledInstance("d", QUICK, role="decode", fetch_s=fetch_s)


def peers_of(instance):
    """What it has counted, once nothing is under way there."""
    until(
        lambda: instance.core._peers is not None and not instance.core._peers.busy, "the end of all fetches"
    )
    return instance.core.scheduler.stats().peers


def test_prompts_are_computed_by_another(prefill):
    with decode() as made:
        assert run(made, asked("x", prefill)) == answer(PROMPT, 8)
        whole = len(PROMPT) // 16
        assert peers_of(made).fetched_blocks == peers_of(prefill).provided_blocks == whole
        # it computed what is no whole block, and the answer but for its first token
        assert made.core.scheduler.stats().prompt_tokens == len(PROMPT) + 1 - 16 * whole
        assert made.core.scheduler.pool.usage == prefill.core.scheduler.pool.usage == 0
    assert (prefill.info.role, prefill.info.transport) == ("prefill", "modelled")


def test_kv_takes_its_time(prefill):
    run(prefill, Submit(request_id="before", prompt_token_ids=PROMPT, params=SamplingParams(max_tokens=1)))
    with decode(fetch_s=0.0005) as made:
        begin = time.perf_counter()
        assert run(made, asked("x", prefill)) == answer(PROMPT, 8)
        assert time.perf_counter() - begin >= BLOCKS * 16 * 0.0005
        assert peers_of(made).fetch_s >= BLOCKS * 16 * 0.0005


def test_where_the_other_dies_the_answer_is_the_same(prefill):
    with decode(fetch_s=0.0005) as made:
        threading.Timer(0.05, prefill.kill).start()
        assert run(made, asked("x", prefill)) == answer(PROMPT, 8)
        assert peers_of(made).fetched_blocks < BLOCKS


def test_of_another_model_nothing_is_taken(prefill):
    with ModelledInstance("d", QUICK, model="other", fetch_s=0.0) as made:
        assert run(made, asked("x", prefill)) == answer(PROMPT, 8)
        assert peers_of(made).failures == {"refused": 1}


def test_readings_come_one_after_the_other():
    ours = ModelledTransport(0.02)
    peer = ours.connect(ModelledTransport(0.0).descriptor())
    begin = time.perf_counter()
    first, second = peer.read([0], [1]), peer.read([1, 2], [2, 3])
    assert not second.wait(0.0)
    assert first.wait(1.0)
    assert time.perf_counter() - begin >= 0.02
    assert second.wait(1.0)
    assert time.perf_counter() - begin >= 0.06
    late = peer.read([3], [4])
    peer.close()
    with pytest.raises(TransportError):
        late.wait(1.0)
    with pytest.raises(TransportError):
        peer.read([3], [4])
    with pytest.raises(TransportError):
        ours.connect(b"tcp")
