"""Who computes or gives KV for whom, and when an instance does better alone."""

from typing import Any

import pytest

from tests.cluster.real import instance
from tests.cluster.test_dispatch import Watch, news, submit
from xllm.cluster.dispatch import Dispatcher
from xllm.cluster.pairing import SHUNNED_S
from xllm.cluster.view import Ask, Load
from xllm.core.output import Finish

SLOW = 1e-3  # seconds a token


def made(*instances: tuple[str, str], **changes: Any) -> tuple[Dispatcher, Watch]:
    """(id, role) each; all can read each other's KV, and have been seen to compute a token in `SLOW`."""
    watch = Watch()
    dispatcher = Dispatcher("least_loaded", clock=watch)
    for id, role in instances:
        info = instance(id, role=role, transport="tcp", max_model_len=4096, **changes)
        at = dispatcher.joined(info)
        dispatcher.serves(at, True)
        for tokens in (10, 500):
            dispatcher.told(at, Load(step_tokens=tokens, step_s=0.002 + SLOW * tokens), watch.now)
    return dispatcher, watch


def decoding(dispatcher: Dispatcher, id: str, sequences: int) -> None:
    dispatcher.fleet.views[id].load = Load(running=sequences)


def holds(dispatcher: Dispatcher, id: str, prompt: int) -> None:
    at = next(at for at in [dispatcher.joined(instance(id, role="both", transport="tcp"))] if at.id == id)
    dispatcher.cached_from(at, 0, {"GPU": Ask.of("", list(range(1, prompt + 1)), 16).hashes})


def test_a_long_prompt_is_computed_elsewhere_where_others_decode():
    dispatcher, watch = made(("d", "decode"), ("p", "prefill"))
    decoding(dispatcher, "d", 6)
    journey, sending = dispatcher.submit(submit(prompt=1000), watch.now)
    assert sending.to.id == "d"
    kv_from = sending.submit.kv_from
    assert kv_from is not None and (kv_from.instance, kv_from.compute) == ("p", True)
    pairing = journey.stages[0].pairing
    assert pairing is not None and pairing.reasons["paired_s"] < pairing.reasons["alone_s"]
    assert dispatcher.fleet.views["p"].queued_tokens == 1000
    dispatcher.heard(sending.to, [news(sending, 5, fetched_tokens=992, fetch_s=1.1)], watch.now + 1)
    assert dispatcher.fleet.views["p"].queued_tokens == 0
    assert journey.stages[0].fetched == 992 and dispatcher.counts.paired == 1


@pytest.mark.parametrize("prompt", [4, 30])
def test_a_short_prompt_stays(prompt):
    dispatcher, watch = made(("d", "decode"), ("p", "prefill"))
    decoding(dispatcher, "d", 6)
    assert dispatcher.submit(submit(prompt=prompt), watch.now)[1].submit.kv_from is None


def test_a_prompt_stays_where_nobody_is_disturbed():
    dispatcher, watch = made(("d", "both"), ("p", "prefill"))
    assert dispatcher.submit(submit("a/0", prompt=1000), watch.now)[1].submit.kv_from is None


@pytest.mark.parametrize("seconds", [0.0050, 0.0040])
def test_who_has_only_decoded_knows_nothing_of_prompts(seconds):
    """A line through steps of about as many tokens may fall or be flat: long prompts stayed, for they cost nothing."""
    dispatcher, watch = made(("d", "decode"), ("p", "prefill"))
    decoding(dispatcher, "d", 6)
    at = dispatcher.joined(instance("d", role="decode", transport="tcp", max_model_len=4096))
    dispatcher.serves(at, True)
    for tokens in range(30, 90):
        dispatcher.told(at, Load(running=6, step_tokens=30 + tokens % 8, step_s=seconds), watch.now)
    _, sending = dispatcher.submit(submit(prompt=1000), watch.now)
    assert sending.submit.kv_from is not None


def test_a_prompt_stays_where_the_other_is_busier():
    dispatcher, watch = made(("d", "decode"), ("p", "prefill"))
    decoding(dispatcher, "d", 6)
    for i in range(30):
        dispatcher.submit(submit(f"{i}/0", prompt=1000), watch.now)
    queued = dispatcher.fleet.views["p"].queued_tokens
    assert 0 < queued < 30_000, "not all of them: its queue has grown too long"


def test_who_has_a_long_prefix_gives_it_to_who_has_not():
    dispatcher, watch = made(("a", "both"), ("b", "both"))
    holds(dispatcher, "a", 800)
    decoding(dispatcher, "a", 7)
    _, sending = dispatcher.submit(submit(prompt=801), watch.now)
    assert sending.to.id == "b"
    kv_from = sending.submit.kv_from
    assert kv_from is not None and (kv_from.instance, kv_from.compute) == ("a", False)
    dispatcher.heard(sending.to, [news(sending, 5, fetched_tokens=800, fetch_s=20.0)], watch.now)
    _, again = dispatcher.submit(submit("2/0", prompt=801), watch.now)
    assert again.submit.kv_from is None, "moving it has been seen to take longer than computing it"


def test_mixed_instances_compute_for_themselves():
    dispatcher, watch = made(("a", "both"), ("b", "both"))
    decoding(dispatcher, "a", 7)
    decoding(dispatcher, "b", 7)
    assert dispatcher.submit(submit(prompt=1000), watch.now)[1].submit.kv_from is None


@pytest.mark.parametrize("transport", [None, "nixl"])
def test_only_those_who_can_read_each_other_s_kv(transport):
    dispatcher, watch = made(("d", "decode"))
    dispatcher.serves(dispatcher.joined(instance("p", role="prefill", transport=transport)), True)
    decoding(dispatcher, "d", 6)
    assert dispatcher.submit(submit(prompt=1000), watch.now)[1].submit.kv_from is None


def test_who_only_prefills_is_asked_for_nothing_else():
    dispatcher, watch = made(("p", "prefill"), ("d", "decode"))
    for i in range(8):
        assert dispatcher.submit(submit(f"{i}/0"), watch.now)[1].to.id == "d"


@pytest.mark.parametrize("end", ["finish", "abort", "lost"])
def test_nothing_is_kept_of_a_pair_that_is_over(end):
    dispatcher, watch = made(("d", "decode"), ("p", "prefill"))
    decoding(dispatcher, "d", 6)
    _, sending = dispatcher.submit(submit(prompt=1000), watch.now)
    assert sending.submit.kv_from is not None
    if end == "finish":
        dispatcher.heard(sending.to, [news(sending, finish=Finish.ERROR, error="no")], watch.now)
    elif end == "abort":
        dispatcher.abort(["r/0"], watch.now)
    else:
        dispatcher.lost(sending.to, "it died", watch.now)
    assert dispatcher.fleet.views["p"].queued_tokens == 0
    assert not dispatcher.fleet.views["p"].ours.outstanding


def test_it_is_paired_anew_where_it_goes_on():
    dispatcher, watch = made(("d", "decode"), ("e", "decode"), ("p", "prefill"))
    decoding(dispatcher, "d", 6)
    decoding(dispatcher, "e", 6)
    _, first = dispatcher.submit(submit(prompt=1000), watch.now)
    dispatcher.serves(first.to, False)
    dispatcher.lost(first.to, "it died", watch.now)
    (again,), _ = dispatcher.retry(watch.now)
    assert again.to != first.to and again.submit.kv_from is not None
    assert len(dispatcher.fleet.views["p"].ours.outstanding) == 1


def test_a_pair_of_which_nothing_comes_is_left_alone_for_longer_and_longer():
    dispatcher, watch = made(("d", "decode"), ("p", "prefill"))
    decoding(dispatcher, "d", 6)
    count = 0

    def ask(**brought: Any) -> bool:
        """Whether it was paired; `brought` is what came of that."""
        nonlocal count
        count += 1
        _, sending = dispatcher.submit(submit(f"{count}/0", prompt=1000), watch.now)
        dispatcher.heard(sending.to, [news(sending, 5, finish=Finish.LENGTH, **brought)], watch.now)
        return sending.submit.kv_from is not None

    for pause_s in (1.0, 2.0, 4.0, 8.0, 16.0, SHUNNED_S, SHUNNED_S):
        assert ask(fetch_s=2.0)
        watch.now += 0.9 * pause_s
        assert not ask()
        watch.now += 0.2 * pause_s
    assert ask(fetch_s=0.1, fetched_tokens=900), "which makes up for all that"
    assert ask(fetch_s=2.0)
    watch.now += 1.1
    assert ask(fetch_s=2.0)
    dispatcher.serves(dispatcher.joined(instance("p", 2, role="prefill", transport="tcp")), True)
    assert ask(), "another process"
