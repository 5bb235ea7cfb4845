"""A modelled instance is an instance to whoever dials it; only its answers are known beforehand."""

import time

import pytest

from tests.engine.dialling import TIMEOUT_S, ask, dialled, ended, have, listen, until
from xllm.core.errors import ConfigError
from xllm.core.output import Finish
from xllm.engine.modelled import ModelledInstance, Shape
from xllm.engine.modelled_runner import EOS, Speed, Words, answer
from xllm.wire.dial import Dial, State
from xllm.wire.messages import FollowKv, Heartbeat, KvChanges, Ready, Reply

QUICK = Speed(base_s=0.0005, token_s=0.0)


@pytest.fixture
def instance():
    with ModelledInstance("a", QUICK) as made:
        yield made


def test_answers_are_known_beforehand_whatever_shares_the_engine(instance):
    prompts = {str(n): [n + 20, *range(100, 100 + 7 * n)] for n in range(12)}
    dial = dialled(instance.address)
    for id, prompt in prompts.items():
        dial.send(ask(id, prompt, 20))
    tokens, ends, _ = listen(dial, ended(*prompts))
    dial.close()
    assert tokens == {id: answer(prompt, 20) for id, prompt in prompts.items()}
    assert {output.finish for output in ends.values()} == {Finish.LENGTH}
    assert not any(EOS in some for some in tokens.values())


def test_a_request_goes_on_elsewhere_with_the_same_answer(instance):
    prompt = list(range(50, 150))
    whole = answer(prompt, 30)
    with ModelledInstance("b", QUICK) as other:
        dial = dialled(other.address)
        dial.send(ask("x", prompt, 30, given=whole[:13]))
        tokens, _, _ = listen(dial, ended("x"))
        dial.close()
    assert whole[:13] + tokens["x"] == whole


def test_the_seed_counts_where_there_is_a_temperature(instance):
    dial = dialled(instance.address)
    for id, seed in ("a", 1), ("b", 2), ("c", 1):
        dial.send(ask(id, [30, 31], seed=seed, temperature=1.0))
    dial.send(ask("cold", [30, 31], seed=1))
    tokens, _, _ = listen(dial, ended("a", "b", "c", "cold"))
    dial.close()
    assert tokens["a"] == tokens["c"] == answer([30, 31], 8, seed=1)
    assert tokens["b"] == answer([30, 31], 8, seed=2) != tokens["a"]
    assert tokens["cold"] == answer([30, 31], 8)


def test_answers_end_where_that_is_wanted():
    words = Words(ends_every=5)
    with ModelledInstance("a", QUICK, words=words) as made:
        dial = dialled(made.address)
        for n in range(20):
            dial.send(ask(str(n), [n + 20], 100))
        dial.send(ask("long", [20], 40, min_tokens=30))
        dial.send(ask("on", [20], 40, ignore_eos=True))
        tokens, ends, _ = listen(dial, ended("long", "on", *map(str, range(20))))
        dial.close()
    for n in range(20):
        assert tokens[str(n)] == answer([n + 20], 100, words)
        assert ends[str(n)].finish is Finish.STOP
    assert tokens["long"] == answer([20], 40, words, min_tokens=30)
    assert len(tokens["on"]) == 40


def test_it_tells_what_it_is_and_how_it_is(instance):
    dial = dialled(instance.address)
    _, _, others = listen(
        dial, lambda tokens, ends, others: sum(isinstance(m, Heartbeat) for m in others) >= 2
    )
    dial.close()
    ready = next(m for m in others if isinstance(m, Ready))
    assert list(ready.addresses) == [instance.address]
    assert ready.config.cache.num_blocks == instance.info.kv.num_blocks
    assert instance.info.address.startswith("tcp://127.0.0.1:")


def test_a_prefix_is_computed_once():
    slow = Speed(base_s=0.001, token_s=0.0005)
    with ModelledInstance("a", slow) as made:
        dial = dialled(made.address)
        prompt = list(range(100, 500))
        for id in "first", "second":
            dial.send(ask(id, prompt, 1))
            _, ends, _ = listen(dial, ended(id))
        dial.close()
        assert ends["second"].num_cached_tokens >= 384
        assert made.core.scheduler.stats().prompt_tokens < 420


def test_steps_take_the_time_of_the_model():
    with ModelledInstance("a", Speed(base_s=0.02, token_s=0.0001), Shape(max_num_batched_tokens=512)) as made:
        dial = dialled(made.address)
        begin = time.perf_counter()
        dial.send(ask("x", list(range(100, 1124)), 11))
        listen(dial, ended("x"))
        took = time.perf_counter() - begin
        dial.close()
        late = made.lateness
    # two steps of 512 tokens, ten of one
    assert took >= 2 * (0.02 + 0.0512) + 10 * 0.0201 - 0.001
    assert late.steps >= 12
    assert late.worst_s >= late.late_s / late.steps >= 0
    assert sum(late.buckets) == late.steps


def test_killed_its_clients_hear_of_it_at_once_and_it_comes_again(instance):
    dial = dialled(instance.address)
    dial.send(ask("x", [20], 10_000))
    listen(dial, have("x", 3))
    before = instance.info
    instance.kill()
    until(lambda: dial.state is State.LOST, "the client is lost")
    assert "goodbye" not in dial.reason
    dial.close()
    instance.start()
    assert instance.info.epoch > before.epoch
    dial = dialled(instance.address)
    dial.send(ask("x", [20], 4))
    tokens, _, _ = listen(dial, ended("x"))
    dial.close()
    assert tokens["x"] == answer([20], 4)


def test_hung_it_says_nothing_and_can_go_on(instance):
    dial = dialled(instance.address, silence_s=30.0)
    dial.send(ask("x", [20], 400))
    tokens, _, _ = listen(dial, have("x", 3))
    instance.hang()
    until(lambda: dial.silent_s > 1.0, "silence")  # a live one is heard four times a second
    assert dial.state is State.READY
    instance.resume()
    rest, _, _ = listen(dial, ended("x"))
    dial.close()
    assert tokens["x"] + rest["x"] == answer([20], 400)


def test_hung_it_can_be_stopped_and_killed():
    for end in "stop", "kill":
        made = ModelledInstance("a", QUICK).start()
        dial = dialled(made.address, silence_s=1.0)
        made.hang()
        until(lambda dial=dial: dial.state is State.LOST, "the client gives up")
        dial.close()
        getattr(made, end)()


def test_stopped_it_says_goodbye(instance):
    dial = dialled(instance.address)
    instance.stop()
    until(lambda: dial.state is State.LOST, "the client is lost")
    assert "goodbye" in dial.reason
    dial.close()


def test_with_a_token_strangers_are_refused():
    with ModelledInstance("a", QUICK, token="open") as made:
        stranger = Dial(made.address, token="shut")
        assert not stranger.wait_ready(TIMEOUT_S)
        dialled(made.address, token="open").close()
        stranger.close()


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match="no time"):
        Speed(base_s=-1)
    with pytest.raises(ConfigError, match="vocabulary"):
        Words(vocab_size=4, first=9)


def test_it_tells_what_it_caches(instance):
    dial = dialled(instance.address)
    dial.send(ask("x", list(range(100, 200))))
    listen(dial, ended("x"))
    dial.send(FollowKv(call_id=1))
    _, _, others = listen(dial, lambda tokens, ends, others: any(isinstance(m, Reply) for m in others))
    told = next(m for m in others if isinstance(m, Reply)).value
    held = {medium: set(hashes) for medium, hashes in told["blocks"].items()}
    assert len(held["GPU"]) == 6  # 107 tokens have KV
    dial.send(ask("y", list(range(300, 400))))
    _, _, others = listen(
        dial,
        lambda tokens, ends, others: (
            sum(len(c.hashes) for m in others if isinstance(m, KvChanges) for c in m.changes) == 6
        ),
    )
    dial.close()
    changes = [m for m in others if isinstance(m, KvChanges)]
    assert [m.number for m in changes] == list(range(told["number"], told["number"] + len(changes)))
    stored = {h for m in changes for c in m.changes for h in c.hashes if c.kind == "stored"}
    assert len(stored) == 6
    assert not stored & held["GPU"]
