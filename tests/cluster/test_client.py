"""Instances behind the face of one engine: where requests go, what is known of caches, who is turned away, what is kept."""

import time
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from tests.cluster.front import Front, modelled
from xllm.cluster.decisions import KEPT
from xllm.core.errors import Overloaded, Unavailable
from xllm.engine.modelled import ModelledInstance
from xllm.engine.modelled_runner import Speed
from xllm.wire.messages import ResetPrefixCache, Sleep

PREFIX = range(1000, 1096)  # six blocks


@pytest.fixture
def pair() -> Iterator[list[ModelledInstance]]:
    instances = [modelled("a"), modelled("b")]
    yield instances
    for one in instances:
        one.stop()


@pytest.fixture
def front(pair) -> Iterator[Front]:
    made = Front(*pair)
    yield made
    made.close()


def test_nobody_is_there():
    front = Front()
    assert front.client.missing() == "no instance is registered"
    assert not front.client.wait_ready(0.05)
    with pytest.raises(Unavailable) as refused:
        front.ask("r/0", [20])
    assert refused.value.retry_after_s >= 1 and front.client.counts.refused == 1
    front.client.send(ResetPrefixCache(call_id=3))
    front.until(lambda: front.replies, "nothing is to be emptied")
    front.close()


def test_an_instance_that_does_not_answer_yet_is_waited_for():
    front, late = Front(), modelled("late")
    address = late.info
    late.kill()
    front.client.joined(address)
    assert not front.client.wait_ready(0.3) and "late" in (front.client.missing() or "")
    late.start()
    front.client.left("late", address.epoch)
    front.client.joined(late.info)
    assert front.client.wait_ready(10) and front.client.config.model.directory == "modelled"
    front.until_ended(front.ask("r/0", [20], 5))
    front.check("r/0")
    front.close()
    late.stop()


def test_completions_of_one_request_are_spread(front, pair):
    ids = [front.ask(f"r/{n}", [20, n], 30) for n in range(4)]
    front.until_ended(*ids)
    front.check(*ids)
    decision = front.client.decision("r")
    assert decision is not None
    assert [one["stages"][0]["instance"] for one in decision["completions"]] == ["a", "b", "a", "b"]
    assert all(one["ended"] and one["output_tokens"] == 30 for one in decision["completions"])
    assert front.client.instances_of("r") == ["a", "b"] and front.client.decision("s") is None


def test_who_is_full_turns_away_and_takes_again():
    tight = modelled("tight", max_num_seqs=2, max_num_queued=1)
    front = Front(tight)
    ids = front.ask_many(3, 200)
    with pytest.raises(Overloaded) as refused:
        front.ask("more/0", [20])
    assert refused.value.retry_after_s >= 1
    front.until_ended(ids[0])
    again = front.ask("again/0", [20], 5)
    front.until_ended(*ids, again)
    front.check(*ids, again)
    front.close()
    tight.stop()


def test_what_only_an_instance_can_do_is_refused(front):
    with pytest.raises(Unavailable):
        front.client.send(Sleep(call_id=1))


def test_an_aborted_request_is_stopped_where_it_runs(front, pair):
    ids = front.ask_many(4, 10_000)
    front.until_flowing(*ids)
    front.abort(*ids[:2])
    front.until(lambda: sum(one.outstanding for one in pair) == 2, "two are stopped")
    assert [one.outstanding for one in pair] == [1, 1]
    front.abort(*ids[2:])
    front.until(lambda: not any(one.outstanding for one in pair), "all are stopped")
    assert not front.ends
    kept_nothing(front)


def test_an_aborted_request_is_stopped_where_it_has_gone_to(front, pair):
    ids = front.ask_many(4, 10_000)
    front.until_flowing(*ids)
    pair[0].kill()
    front.until(lambda: pair[1].outstanding == 4, "all have moved")
    front.abort(*ids)
    front.until(lambda: pair[1].outstanding == 0, "all are stopped")
    kept_nothing(front)


def test_a_request_that_waits_for_an_instance_can_be_aborted(front, pair):
    ids = front.ask_many(2, 10_000)
    front.until_flowing(*ids)
    for one in pair:
        one.kill()
    front.until(lambda: front.client._dispatcher.homeless == 2, "nobody has them")
    front.abort(*ids)
    kept_nothing(front)


def test_draining_gets_nothing_and_finishes_what_it_has(front, pair):
    a = pair[0]
    ids = front.ask_many(6, 300)
    front.until_flowing(*ids)
    front.client.changed(replace(a.info, draining=True))
    front.until(lambda: front.state("a") == "draining", "it drains")
    more = front.ask_many(4, 20, "more")
    assert {place for id in more for place in front.been(id)} == {"b"}
    front.until_ended(*ids, *more)
    front.check(*ids, *more)
    assert front.client.counts.moves == 0
    a.stop()
    front.client.left("a")
    front.until(lambda: front.status("a") is None, "nothing is left of it")


def test_gone_from_the_registry_it_finishes_what_it_has(front, pair):
    ids = front.ask_many(4, 200)
    front.until_flowing(*ids)
    front.client.left("a", pair[0].epoch)
    assert front.state("a") == "leaving"
    front.until_ended(*ids)
    front.check(*ids)
    front.until(lambda: front.status("a") is None, "nothing is left of it")
    assert front.client.counts.moves == 0


def test_cached_prefixes_are_known_to_who_comes_late_and_followed(front, pair):
    front.until_ended(front.ask("first/0", PREFIX, 4))
    (holder,) = front.been("first/0")
    late = Front(*pair, policy="prefix_aware")
    late.until(lambda: late.cached(holder) >= 6, "the snapshot")
    for n in range(3):
        late.until_ended(late.ask(f"late{n}/0", [*PREFIX, n + 20], 4))
        assert late.been(f"late{n}/0") == [holder]
        decision = late.client.decision(f"late{n}")
        assert decision is not None and decision["completions"][0]["stages"][0]["cached_tokens"] == 96
    before = {id: late.cached(id) for id in "ab"}
    for id in front.ask_many(2, 40):
        front.until_ended(id)
    late.until(lambda: all(late.cached(id) > before[id] for id in "ab"), "changes come")
    assert all(late.cached(one.id) == len(one.core.scheduler.pool.index) for one in pair)
    late.close()


def test_after_a_gap_the_cache_is_asked_for_again(front, pair, monkeypatch):
    dispatcher = front.client._dispatcher
    lost: list[int] = []
    whole = dispatcher.cached

    def lossy(at, number, batch):
        if at.id == "a" and not lost:
            lost.append(number)
            return True
        return whole(at, number, batch)

    monkeypatch.setattr(dispatcher, "cached", lossy)
    for n in range(4):
        front.until_ended(front.ask(f"r{n}/0", range(2000 + 100 * n, 2050 + 100 * n), 4))
    assert lost
    held = len(pair[0].core.scheduler.pool.index)
    front.until(lambda: front.cached("a") == held, "all is known again")


def test_prefix_caches_are_emptied_everywhere(front, pair):
    for n in range(2):
        front.until_ended(front.ask(f"r{n}/0", PREFIX, 4))
    front.until(lambda: front.cached("a") and front.cached("b"), "both have it")
    front.client.send(ResetPrefixCache(call_id=7))
    front.until(lambda: front.replies, "the answer")
    assert [(reply.call_id, reply.value) for reply in front.replies] == [(7, True)]
    front.until(lambda: not (front.cached("a") or front.cached("b")), "it is empty")


@pytest.mark.parametrize("leaves", [False, True])
def test_emptying_caches_does_not_wait_for_who_is_gone(front, pair, leaves):
    pair[0].hang()
    front.client.send(ResetPrefixCache(call_id=7))
    if leaves:
        front.client.left("a")
    took_s = front.until(lambda: front.replies, "the answer")
    assert took_s < 4
    pair[0].resume()


def test_nothing_is_kept_of_what_has_ended():
    quick = Speed(base_s=0.0002, token_s=0.0)
    instances = [modelled(id, quick, max_num_seqs=64) for id in "abc"]
    front = Front(*instances, policy="least_loaded")
    for batch in range(20):
        ids = front.ask_many(100, 3, f"{batch}x")
        front.abort(*ids[:5])
        front.until_ended(*ids[5:], timeout_s=30)
        front.check(*ids[5:])
    kept_nothing(front)
    assert front.client.counts.requests == 2000
    kept = front.client.decisions._journeys
    assert len(kept) == min(2000, KEPT)
    assert not any(
        one.tokens or one.submit.prompt_token_ids for journeys in kept.values() for one in journeys
    )
    told = front.client.decision(ids[-1].rpartition("/")[0])
    assert told is not None
    assert [(one["prompt_tokens"], one["output_tokens"]) for one in told["completions"]] == [(12, 3)]
    front.until(lambda: not any(one.outstanding for one in instances), "instances are idle")
    front.close()
    for one in instances:
        one.stop()


def kept_nothing(front: Front) -> None:
    dispatcher = front.client._dispatcher
    assert len(dispatcher) == 0 and dispatcher.homeless == 0
    assert not dispatcher._names and not dispatcher._at
    assert all(
        not view.ours.outstanding and view.ours.unanswered == 0 and view.ours.uncounted == 0
        for view in dispatcher.fleet
    )


def test_closing_twice_and_at_once(pair):
    front = Front()
    front.client.joined(pair[0].info)
    begin = time.monotonic()
    front.close()
    front.close()
    assert front.client.receive(0.01) is None and time.monotonic() - begin < 5
