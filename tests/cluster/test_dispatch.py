"""Requests over instances that come, go, fail and come back: each ends once, with every token once."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.cluster.real import instance
from xllm.cluster.dispatch import HOMELESS_S, MOST_FAILURES, Dispatcher, Sending
from xllm.cluster.journey import Incarnation
from xllm.core.errors import ConfigError, Overloaded, Unavailable
from xllm.core.output import Finish, SequenceOutput
from xllm.core.plan import TokenLogprobs
from xllm.core.sampling import SamplingParams
from xllm.wire.messages import Submit


class Watch:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def submit(id: str = "r/0", prompt: int = 20, longest: int = 6, **more: Any) -> Submit:
    return Submit(
        request_id=id, prompt_token_ids=list(range(1, prompt + 1)), params=SamplingParams(max_tokens=longest), **more
    )  # fmt: skip


def made(*ids: str, policy: str = "round_robin", **changes: Any) -> tuple[Dispatcher, Watch]:
    watch = Watch()
    dispatcher = Dispatcher(policy, clock=watch)
    for id in ids:
        dispatcher.serves(dispatcher.joined(instance(id, **changes)), True)
    return dispatcher, watch


def news(sending: Sending, *tokens: int, finish: Finish | None = None, **more: Any) -> SequenceOutput:
    return SequenceOutput(request_id=sending.submit.request_id, token_ids=list(tokens), finish=finish, **more)


def test_it_goes_on_elsewhere_from_the_tokens_that_came():
    dispatcher, watch = made("a", "b")
    _, first = dispatcher.submit(submit(deadline_s=9.0, seed=5, priority=3), watch.now)
    assert first.submit.output_token_ids == () and first.submit.request_id == "r/0"
    assert dispatcher.heard(first.to, [news(first, 7, 8)], watch.now) == [
        SequenceOutput(request_id="r/0", token_ids=[7, 8])
    ]
    watch.now += 2.0
    assert dispatcher.lost(first.to, "it died", watch.now) == 1
    dispatcher.left(first.to)
    (again,), ends = dispatcher.retry(watch.now)
    assert not ends and again.to != first.to
    moved = again.submit
    assert (moved.output_token_ids, moved.seed, moved.priority, moved.deadline_s, moved.waited_s) == (
        [7, 8], 5, 3, 7.0, 2.0,
    )  # fmt: skip
    late = dispatcher.heard(first.to, [news(first, 9)], watch.now)
    assert late == []
    (out,) = dispatcher.heard(again.to, [news(again, 9, finish=Finish.LENGTH)], watch.now)
    assert (out.request_id, out.token_ids, out.finish) == ("r/0", [9], Finish.LENGTH)
    assert len(dispatcher) == 0 and dispatcher.counts.moves == 1


def test_it_may_come_back_to_where_it_was_and_late_news_are_not_taken_for_new_ones():
    dispatcher, watch = made("a")
    _, first = dispatcher.submit(submit(), watch.now)
    dispatcher.lost(first.to, "it stalled", watch.now)
    (again,), _ = dispatcher.retry(watch.now)
    assert again.to == first.to and again.submit.request_id != first.submit.request_id
    assert dispatcher.heard(first.to, [news(first, 1)], watch.now) == []
    assert dispatcher.heard(again.to, [news(again, 2)], watch.now)[0].token_ids == [2]


def test_prompt_logprobs_that_have_come_are_not_asked_for_again():
    dispatcher, watch = made("a", "b")
    _, first = dispatcher.submit(submit(), watch.now)
    some = [TokenLogprobs([1], [-0.5], 1)] * 3
    dispatcher.heard(first.to, [news(first, prompt_logprobs=some)], watch.now)
    dispatcher.lost(first.to, "", watch.now)
    (again,), _ = dispatcher.retry(watch.now)
    assert again.submit.num_prompt_logprobs == 3 and again.submit.output_token_ids == []


def test_who_is_turned_away_is_told_whether_to_wait_for_room_or_for_an_instance():
    dispatcher, watch = made("a", max_num_seqs=1, max_num_queued=0)
    dispatcher.submit(submit("x/0"), watch.now)
    with pytest.raises(Overloaded):
        dispatcher.submit(submit("y/0"), watch.now)
    dispatcher.serves(Incarnation("a", 1), False)
    with pytest.raises(Unavailable):
        dispatcher.submit(submit("z/0"), watch.now)
    assert dispatcher.counts.refused == 2 and len(dispatcher) == 1


def test_what_nobody_can_go_on_with_waits_and_in_the_end_fails_with_the_reason():
    dispatcher, watch = made("a")
    _, first = dispatcher.submit(submit(), watch.now)
    dispatcher.serves(first.to, False)
    dispatcher.lost(first.to, "its connection has ended", watch.now)
    watch.now += HOMELESS_S
    assert dispatcher.retry(watch.now) == ([], [])
    watch.now += 1
    _, (end,) = dispatcher.retry(watch.now)
    assert end.finish is Finish.ERROR and end.error and "its connection has ended" in end.error
    assert len(dispatcher) == 0


def test_a_request_that_ends_every_instance_ends_itself():
    dispatcher, watch = made("a", "b", "c")
    _, sending = dispatcher.submit(submit(), watch.now)
    for attempt in range(MOST_FAILURES):
        dispatcher.lost(sending.to, "it died", watch.now)
        sendings, ends = dispatcher.retry(watch.now)
        if attempt < MOST_FAILURES - 1:
            (sending,) = sendings
    assert not sendings and ends[0].finish is Finish.ERROR


def test_instances_that_leave_in_good_order_are_not_held_against_it():
    dispatcher, watch = made("a", "b")
    _, sending = dispatcher.submit(submit(), watch.now)
    for _ in range(3 * MOST_FAILURES):
        dispatcher.lost(sending.to, "it shuts down", watch.now, failed=False)
        (sending,), ends = dispatcher.retry(watch.now)
        assert not ends


def test_an_error_is_tried_once_elsewhere_and_then_told():
    dispatcher, watch = made("a", "b")
    _, first = dispatcher.submit(submit(), watch.now)
    broken = news(first, finish=Finish.ERROR, error="a step failed")
    assert dispatcher.heard(first.to, [broken], watch.now) == []
    (again,), _ = dispatcher.retry(watch.now)
    assert again.to != first.to
    (end,) = dispatcher.heard(again.to, [news(again, finish=Finish.ERROR, error="a step failed")], watch.now)
    assert end.error == "a step failed" and end.request_id == "r/0"


def test_a_restarted_instance_is_another_one():
    dispatcher, watch = made("a")
    _, first = dispatcher.submit(submit(), watch.now)
    later = dispatcher.joined(instance("a", epoch=2))
    dispatcher.serves(later, True)
    dispatcher.serves(first.to, False)  # says nothing about the new one
    dispatcher.left(first.to)
    assert dispatcher.heard(first.to, [news(first, 4)], watch.now), "what the old one still has goes on"
    _, second = dispatcher.submit(submit("s/0"), watch.now)
    assert second.to == later


def test_unknown_policy():
    with pytest.raises(ConfigError, match="prefix_aware"):
        Dispatcher("fastest")


def answer(prompt: int, position: int) -> int:
    return prompt * 31 + position


class Cluster(RuleBasedStateMachine):
    """Instances answer token by token; whatever happens to them, readers get 0, 1, 2, ... of their answer, once."""

    def __init__(self) -> None:
        super().__init__()
        self.dispatcher, self.watch = made()
        self.epochs: dict[str, int] = {}
        self.there: dict[Incarnation, dict[str, Submit]] = {}  # what instances run
        self.got: dict[str, list[int]] = {}
        self.wanted: dict[str, int] = {}
        self.ended: set[str] = set()
        self.count = 0

    def carry_out(self, sendings: list[Sending]) -> None:
        for one in sendings:
            running = self.there[one.to]
            assert one.submit.request_id not in running
            running[one.submit.request_id] = one.submit

    def deliver(self, outputs: list[SequenceOutput]) -> None:
        for out in outputs:
            assert out.request_id not in self.ended, "news after the end"
            self.got[out.request_id] += out.token_ids
            if out.finish is not None:
                assert out.finish is not Finish.ERROR
                self.ended.add(out.request_id)
                assert len(self.got[out.request_id]) == self.wanted[out.request_id]

    @rule(id=st.sampled_from("abc"))
    def join(self, id: str) -> None:
        self.epochs[id] = self.epochs.get(id, 0) + 1
        for at in [at for at in self.there if at.id == id]:
            self.gone(at)
        at = self.dispatcher.joined(instance(id, self.epochs[id]))
        self.dispatcher.serves(at, True)
        self.there[at] = {}

    def gone(self, at: Incarnation) -> None:
        self.dispatcher.serves(at, False)
        self.dispatcher.lost(at, "it is gone", self.watch.now, failed=False)
        self.dispatcher.left(at)
        del self.there[at]

    @precondition(lambda self: self.there)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        self.gone(data.draw(st.sampled_from(sorted(self.there))))

    @precondition(lambda self: self.there)
    @rule(data=st.data())
    def stall(self, data: st.DataObject) -> None:
        """It is given up and goes on all the same: what it says late is nobody's."""
        self.dispatcher.lost(
            data.draw(st.sampled_from(sorted(self.there))), "stalled", self.watch.now, failed=False
        )

    @rule(longest=st.integers(1, 5))
    def ask(self, longest: int) -> None:
        self.count += 1
        id = f"{self.count}/0"
        try:
            _, sending = self.dispatcher.submit(submit(id, longest=longest), self.watch.now)
        except Unavailable:
            assert not self.there
            return
        self.got[id], self.wanted[id] = [], longest
        self.carry_out([sending])

    @precondition(lambda self: any(self.there.values()))
    @rule(data=st.data(), steps=st.integers(1, 3))
    def step(self, data: st.DataObject, steps: int) -> None:
        at = data.draw(st.sampled_from(sorted(at for at, running in self.there.items() if running)))
        outputs = []
        for name, one in list(self.there[at].items()):
            have = list(one.output_token_ids)
            left = (one.params.max_tokens or 0) - len(have)
            new = [answer(len(one.prompt_token_ids), len(have) + i) for i in range(min(steps, left))]
            finish = Finish.LENGTH if len(new) == left else None
            outputs.append(SequenceOutput(request_id=name, token_ids=new, finish=finish))
            if finish:
                del self.there[at][name]
            else:
                self.there[at][name] = submit(
                    name, longest=one.params.max_tokens or 0, output_token_ids=have + new
                )
        self.deliver(self.dispatcher.heard(at, outputs, self.watch.now))

    @rule()
    def retry(self) -> None:
        sendings, ends = self.dispatcher.retry(self.watch.now)
        assert not ends
        self.carry_out(sendings)

    @precondition(lambda self: self.got)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.got)))
        for at, names in self.dispatcher.abort([id], self.watch.now).items():
            for name in names:
                self.there[at].pop(name, None)
        self.ended.add(id)

    @invariant()
    def every_token_once_and_in_order(self) -> None:
        for tokens in self.got.values():
            assert tokens == [answer(20, i) for i in range(len(tokens))]

    @invariant()
    def nothing_is_kept_of_what_has_ended(self) -> None:
        open_ones = set(self.got) - self.ended
        assert len(self.dispatcher) == len(open_ones)
        outstanding = sum(len(view.ours.outstanding) for view in self.dispatcher.fleet)
        assert outstanding + self.dispatcher.homeless <= len(open_ones)


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
