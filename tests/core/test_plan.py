import msgspec
import pytest

from xllm.core.plan import NewSequence, StepPlan, StepResult, TokenLogprobs
from xllm.core.sampling import SamplingParams

NEW = NewSequence(0, "a", [1, 2, 3], 3, SamplingParams(temperature=0.0), 2**64 - 1, [9], [4])
PLAN = StepPlan(1, [NEW], [0, 1], [0, 7], [3, 1], [True, True], [(1, [5, 6])])


def test_tokens_are_counted():
    assert PLAN.num_tokens == 4
    assert StepPlan(1, [], [], [], [], [], []).num_tokens == 0


def test_a_plan_is_immutable():
    with pytest.raises(AttributeError):
        PLAN.step = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    "message",
    [
        PLAN,
        StepResult(
            1,
            [[5], []],
            {0: TokenLogprobs([5, 6], [-0.1, -2.5], 1)},
            {0: [TokenLogprobs([2], [-1.0], 3)]},
            {1: "why"},
        ),
    ],
)
def test_both_ways_survive_the_wire(message):
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type(message))
    assert msgspec.to_builtins(again) == msgspec.to_builtins(message)


def test_a_plain_result_carries_nothing_more():
    result = StepResult(3, [[1]])
    assert (result.logprobs, result.prompt_logprobs, result.errors, result.seconds) == ({}, {}, {}, 0.0)
    assert StepResult(4, []).errors is not result.errors
