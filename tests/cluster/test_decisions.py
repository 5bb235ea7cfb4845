"""What is kept of requests that have ended: their story, not their tokens."""

from tests.cluster.test_dispatch import made, news, submit
from xllm.cluster.decisions import Decisions
from xllm.cluster.journey import CANDIDATES
from xllm.core.output import Finish


def test_the_story_of_a_request_that_has_ended_needs_no_tokens():
    dispatcher, watch = made(*(f"i{n:02}" for n in range(CANDIDATES + 3)), policy="prefix_aware")
    decisions = Decisions(clock=watch)
    journey, sending = dispatcher.submit(submit("r/0", prompt=20), watch.now)
    decisions.add(journey)
    dispatcher.heard(sending.to, [news(sending, 7, 8)], watch.now)
    running = decisions.of("r")
    dispatcher.heard(sending.to, [news(sending, 9, finish=Finish.LENGTH)], watch.now)
    assert not journey.tokens and not journey.submit.prompt_token_ids
    assert len(journey.stages[0].choice.reasons) == CANDIDATES
    ended = decisions.of("r")
    assert running is not None and ended is not None
    before, after = running["completions"][0], ended["completions"][0]
    assert (before["prompt_tokens"], before["output_tokens"], before["ended"]) == (20, 2, False)
    assert (after["prompt_tokens"], after["output_tokens"], after["ended"]) == (20, 3, True)
    assert after["stages"][0]["candidates"] == before["stages"][0]["candidates"]
    assert len(after["stages"][0]["candidates"]) == CANDIDATES


def test_nor_does_that_of_one_that_was_aborted_or_given_up():
    dispatcher, watch = made("a")
    aborted, _ = dispatcher.submit(submit("r/0"), watch.now)
    dispatcher.abort(["r/0"], watch.now)
    lost, sending = dispatcher.submit(submit("s/0"), watch.now)
    dispatcher.lost(sending.to, "it died", watch.now)
    dispatcher.left(sending.to)
    watch.now += 1000.0
    _, ends = dispatcher.retry(watch.now)
    assert [end.finish for end in ends] == [Finish.ERROR]
    assert not aborted.submit.prompt_token_ids and not lost.submit.prompt_token_ids
    assert (aborted.prompt_tokens, lost.prompt_tokens) == (20, 20)
