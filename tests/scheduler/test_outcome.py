import pytest

from tests.scheduler.rig import request
from xllm.core.output import Finish
from xllm.core.plan import TokenLogprobs
from xllm.scheduler import outcome

STOP = frozenset({0, 9})


def running(output: list[int] | None = None, **fields):
    fields = {"max_total_tokens": 8, "stop_ids": STOP, "eos_ids": frozenset({0}), **fields}
    one = request("x", [1, 2, 3], None, arrival=1.0, **fields)
    one.output_token_ids = output or []
    one.first_scheduled = 3.0
    return one


@pytest.mark.parametrize(
    ("before", "tokens", "kept", "finish"),
    [
        ([], [5], [5], None),
        ([], [9], [9], Finish.STOP),
        ([5, 5, 5, 5], [5], [5], Finish.LENGTH),
        ([5, 5, 5, 5], [9], [9], Finish.STOP),
        ([], [5, 9, 5], [5, 9], Finish.STOP),
        ([5, 5, 5], [5, 5, 5], [5, 5], Finish.LENGTH),
        ([5], [5, 5], [5, 5], None),
    ],
)
def test_tokens_are_kept_up_to_the_end(before, tokens, kept, finish):
    one = running(list(before))
    assert outcome.accept(one, tokens) == (kept, finish)
    assert one.output_token_ids == before + kept


@pytest.mark.parametrize(("min_tokens", "kept"), [(0, [9]), (1, [9, 9]), (3, [9, 9, 9, 9])])
def test_a_stop_id_counts_after_min_tokens_others(min_tokens, kept):
    one = running(params={"min_tokens": min_tokens})
    assert outcome.accept(one, [9] * 5) == (kept, Finish.STOP)


@pytest.mark.parametrize(
    ("sampled", "brought", "computed", "message"),
    [
        (True, 1, 9, None),
        (False, 0, 9, None),
        (False, 2, 3, "was to sample nothing brought 2 tokens"),
        (True, 0, 3, "brought no token"),
        (True, 3, 3, None),
        (True, 3, 4, "brought 3 tokens at once while the next was computed already"),
    ],
)
def test_the_number_of_tokens_must_make_sense(sampled, brought, computed, message):
    one = running(max_total_tokens=50)
    one.num_computed = computed
    found = outcome.mismatch(one, sampled, brought)
    assert found == message if message is None else message in (found or "")


def test_prompt_logprobs_are_sent_once():
    one = running()
    rows = {position: TokenLogprobs([position], [0.0], 1) for position in (1, 2, 3)}
    assert outcome.unsent_prompt_logprobs(one, 0, [rows[1]]) == [rows[1]]
    assert outcome.unsent_prompt_logprobs(one, 0, [rows[1], rows[2], rows[3]]) == [rows[2]], (
        "3 is no prompt position"
    )
    assert outcome.unsent_prompt_logprobs(one, 1, [rows[2]]) == []
    assert outcome.unsent_prompt_logprobs(one, 0, ()) == ()
    assert one.num_prompt_logprobs == 2


def news(one, tokens, finish=None, now=7.0):
    return outcome.news(one, tokens, finish, None, (), now)


def test_the_first_output_tells_how_it_began():
    one = running([5])
    one.num_cached_tokens, one.num_preemptions = 2, 1
    output = news(one, [5])
    assert (output.queued_s, output.prefill_s, output.num_cached_tokens, output.num_preemptions) == (
        2.0,
        4.0,
        2,
        1,
    )
    assert output.finish is None


def test_later_outputs_are_lean():
    one = running([5, 6])
    one.num_cached_tokens = 2
    output = news(one, [6])
    assert (output.queued_s, output.prefill_s, output.num_cached_tokens) == (None, None, 0)


@pytest.mark.parametrize(("token", "reason"), [(9, 9), (0, None)])
def test_the_stop_reason_is_no_end_of_sequence_token(token, reason):
    output = news(running([5, token]), [token], Finish.STOP)
    assert (output.finish, output.stop_reason, output.queued_s) == (Finish.STOP, reason, None)


def test_length_has_no_stop_reason():
    assert news(running([5, 9]), [9], Finish.LENGTH).stop_reason is None


def test_logprobs_go_along():
    row = TokenLogprobs([5], [-0.5], 1)
    assert outcome.news(running([5]), [5], None, row, (), 7.0).logprobs == (row,)
    assert outcome.news(running([4, 5]), [5], None, row, (), 7.0).logprobs == (row,)


def test_an_end_without_tokens():
    fresh = running()
    fresh.first_scheduled = None
    output = outcome.terminal(fresh, Finish.ABORT)
    assert (output.finish, output.token_ids, output.queued_s, output.error) == (Finish.ABORT, (), None, None)
    assert outcome.terminal(running(), Finish.ERROR, "why").queued_s == 2.0
    late = outcome.terminal(running([5]), Finish.ERROR, "why")
    assert (late.queued_s, late.error) == (None, "why")
