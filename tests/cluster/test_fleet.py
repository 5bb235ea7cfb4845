import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.cluster.fleet import REPORT_LAG_S, Fleet
from xllm.cluster.view import Ask, Capacity, Choice, InstanceView, Load
from xllm.core.stats import ExecutorStats, SchedulerStats

CAPACITY = Capacity(max_num_seqs=4, num_blocks=100, block_size=16, max_model_len=1000, step_budget=256)


@pytest.fixture
def fleet() -> Fleet:
    fleet = Fleet()
    assert fleet.joined("a", 1, CAPACITY)
    return fleet


def send(fleet: Fleet, request_id: str, tokens: int = 100, cached: int = 0, now: float = 0.0) -> InstanceView:
    fleet.sent(Choice("a", "test", {}, cached), Ask(request_id, tokens), now)
    return fleet.views["a"]


def test_what_was_sent_counts_until_a_report_does(fleet):
    view = send(fleet, "1", cached=40)
    send(fleet, "2", now=1.0)
    assert (view.active, view.queued_tokens, view.free_blocks) == (2, 160, 100 - 2 * 7)
    fleet.told("a", Load(running=1, waiting=0, kv_usage=0.07), 1.0 + REPORT_LAG_S / 2)
    assert (view.active, view.queued_tokens) == (2, 160)  # the second may be on its way
    assert view.free_blocks == pytest.approx(100 - 2 * 7)
    fleet.told("a", Load(running=2, waiting=0, kv_usage=0.14), 2.0)
    assert (view.active, view.ours.uncounted, view.free_blocks) == (2, 0, 86)


def test_answers_are_seen_before_the_next_report(fleet):
    view = send(fleet, "1")
    send(fleet, "2")
    fleet.told("a", Load(running=2, kv_usage=0.14), 1.0)
    fleet.first_token("a", "1", 1.1)
    fleet.first_token("a", "1", 1.2)
    assert (view.active, view.queued_tokens) == (2, 100)
    fleet.ended("a", "1", 2.0, output_tokens=5)
    fleet.ended("a", "1", 2.0, output_tokens=5)
    assert view.active == 1 and view.free_blocks == pytest.approx(93)
    fleet.ended("a", "2", 2.0)
    assert (view.active, view.queued_tokens, view.ours.unanswered, view.ours.unanswered_counted) == (
        0,
        0,
        0,
        0,
    )
    fleet.told("a", Load(running=3, kv_usage=0.5), 3.0)  # another router's; what ended is not taken off twice
    assert (view.active, view.free_blocks) == (3, 50)


def test_what_other_routers_have_waiting_is_taken_to_be_like_ours(fleet):
    view = send(fleet, "1", tokens=60)
    fleet.told("a", Load(running=1, waiting=5), 1.0)
    assert view.queued_tokens == 60 + 4 * 60
    fleet.first_token("a", "1", 1.0)
    assert view.queued_tokens == 5 * 60


def test_a_request_sent_again_counts_once(fleet):
    send(fleet, "1")
    view = send(fleet, "1")
    assert (view.active, view.queued_tokens, view.ours.uncounted) == (1, 100, 1)


def test_a_later_epoch_begins_anew_and_an_earlier_one_is_refused(fleet):
    send(fleet, "1")
    assert fleet.joined("a", 1, CAPACITY) and fleet.views["a"].active == 1
    assert fleet.joined("a", 2, CAPACITY) and fleet.views["a"].active == 0
    assert not fleet.joined("a", 1, CAPACITY)
    fleet.ended("a", "1", 1.0)  # of the process before
    assert fleet.views["a"].active == 0
    fleet.left("a")
    fleet.left("a")
    assert not fleet.views


def test_news_of_unknown_instances_is_passed_over(fleet):
    fleet.told("b", Load(running=3), 0.0)
    fleet.sent(Choice("b", "test", {}), Ask("1", 5), 0.0)
    fleet.first_token("b", "1", 0.0)
    fleet.ended("b", "1", 0.0)
    fleet.serves("b", False)
    assert set(fleet.views) == {"a"}


def test_who_takes_what(fleet):
    view = fleet.views["a"]
    assert view.takes(Ask("1", 999))
    assert not view.takes(Ask("1", 1000))  # no room for an answer
    assert not view.takes(Ask("1", 9, avoid=frozenset({"a"})))
    fleet.serves("a", False)
    assert not view.takes(Ask("1", 9))
    fleet.serves("a", True)
    fleet.joined("a", 1, CAPACITY, role="prefill")
    assert not view.takes(Ask("1", 9))
    fleet.joined("a", 1, Capacity(4, 10, 16))
    assert view.takes(Ask("1", 159)) and not view.takes(Ask("1", 160))  # more blocks than there are


def test_a_full_queue_takes_nothing_and_the_less_urgent_notice_first(fleet):
    fleet.joined("a", 1, Capacity(4, 100, 16, max_num_queued=8))
    taken = []
    for active in range(14):
        fleet.told("a", Load(running=min(active, 4), waiting=max(0, active - 4)), 0.0)
        taken.append((fleet.views["a"].takes(Ask("1", 9)), fleet.views["a"].takes(Ask("1", 9, priority=1))))
    assert taken == [(True, True)] * 10 + [(True, False)] * 2 + [(False, False)] * 2


def test_load_is_the_difference_of_two_reports():
    before = SchedulerStats(1, 0, 0, 0.5, 0, 0, 0, 0, 100, 50, 0, ExecutorStats(steps=10, device_s=1.0))
    now = SchedulerStats(2, 3, 0, 0.6, 0, 0, 0, 0, 300, 70, 0, ExecutorStats(steps=20, device_s=1.5))
    assert Load.between(before, now) == Load(2, 3, 0.6, 22.0, 0.05)
    assert Load.between(None, now) == Load.between(now, now) == Load(2, 3, 0.6)
    assert Load.between(now, before) == Load(1, 0, 0.5)  # it restarted


def test_predictions_are_learnt_and_corrected(fleet):
    view = fleet.views["a"]
    assert view.predict_ttft_s(1000) == view.predict_tpot_s() == 0
    for tokens in (4, 256, 100):
        fleet.told("a", Load(step_tokens=tokens, step_s=0.01 + tokens * 1e-4), 0.0)
    assert view.predict_tpot_s() == pytest.approx(0.01 + 1e-4)
    assert view.predict_ttft_s(512) == pytest.approx(2 * 0.01 + 0.0512)
    for n in range(30):
        predicted, tpot_s = view.predict_ttft_s(100), view.predict_tpot_s()
        send(fleet, str(n), now=float(n))
        fleet.first_token("a", str(n), n + 2 * predicted)
        fleet.ended("a", str(n), n + 2 * predicted + 9 * tpot_s / 2, output_tokens=10)
    assert view.ttft.factor == pytest.approx(2, rel=0.01)
    assert view.tpot.factor == pytest.approx(0.5, rel=0.01)


def test_without_a_free_place_somebody_has_to_end_first(fleet):
    for tokens in (4, 256):
        fleet.told("a", Load(step_tokens=tokens, step_s=0.01 + tokens * 1e-4), 0.0)
    send(fleet, "1")
    fleet.first_token("a", "1", 0.1)
    fleet.ended("a", "1", 1.0, output_tokens=100)
    view = fleet.views["a"]
    fleet.told("a", Load(running=3), 1.0)
    free = view.predict_ttft_s(100)
    fleet.told("a", Load(running=4), 2.0)
    assert view.predict_ttft_s(100) == pytest.approx(free + 1e-4 + 25 * view.predict_tpot_s(), rel=0.01)


happenings = st.lists(
    st.tuples(
        st.sampled_from(["sent", "first_token", "ended", "told"]), st.integers(0, 5), st.floats(0.0, 0.1)
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(happenings)
def test_the_sums_are_those_of_what_is_outstanding(happenings):
    fleet, now = Fleet(), 0.0
    fleet.joined("a", 1, CAPACITY)
    view = fleet.views["a"]
    for what, n, passed in happenings:
        now += passed
        if what == "sent":
            send(fleet, str(n), tokens=50 + n, now=now)
        elif what == "first_token":
            fleet.first_token("a", str(n), now)
        elif what == "ended":
            fleet.ended("a", str(n), now, output_tokens=n)
        else:
            fleet.told("a", Load(running=n, waiting=n), now)
        ours = view.ours
        there = ours.outstanding.values()
        silent = [sent for sent in there if sent.first is None]
        assert ours.uncounted == sum(not sent.counted for sent in there)
        assert ours.uncounted_blocks == sum(sent.blocks for sent in there if not sent.counted)
        assert ours.unanswered == len(silent)
        assert ours.unanswered_tokens == sum(sent.tokens for sent in silent)
        assert ours.unanswered_counted == sum(sent.counted for sent in silent)
        assert view.active >= len(there) and view.queued_tokens >= 0
