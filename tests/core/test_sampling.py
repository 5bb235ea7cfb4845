import math
from typing import Any

import msgspec
import pytest

from xllm.core.errors import InvalidRequest
from xllm.core.sampling import (
    MAX_BAD_WORDS,
    MAX_BIASES,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP,
    SamplingParams,
)

NAN, INF = math.nan, math.inf

LIMITS: dict[str, tuple[list[Any], list[Any]]] = {
    # field: (good values, bad values)
    "n": ([1, MAX_N], [0, -1, MAX_N + 1]),
    "temperature": ([0.0, 1e-9, 100.0], [-1e-9, 100.1, NAN, INF, -INF]),
    "top_p": ([1e-9, 1.0], [0.0, -0.1, 1.1, NAN]),
    "top_k": ([0, 1, -1, 2**31 - 1], [-2, 2**31]),
    "min_p": ([0.0, 1.0], [-0.1, 1.1, NAN]),
    "presence_penalty": ([-2.0, 2.0], [-2.1, 2.1, NAN]),
    "frequency_penalty": ([-2.0, 2.0], [-2.1, 2.1, NAN]),
    "repetition_penalty": ([0.1, 10.0], [0.0, -1.0, 10.1, NAN]),
    "min_tokens": ([0, 16], [-1, 2**31]),
    "max_tokens": ([1, None, 2**31 - 1], [0, -1, 2**31]),
    "seed": ([None, 0, -(2**63), 2**64 - 1], [-(2**63) - 1, 2**64]),
    "logprobs": ([None, 0, MAX_LOGPROBS], [-1, MAX_LOGPROBS + 1]),
    "prompt_logprobs": ([None, 0, MAX_LOGPROBS], [-1, MAX_LOGPROBS + 1]),
    "stop": ([None, "", "a", ["a"], ["a"] * MAX_STOP], [["a", ""], ["a"] * (MAX_STOP + 1)]),
    "stop_token_ids": ([None, [], [1] * MAX_STOP], [[1] * (MAX_STOP + 1)]),
    "bad_words": ([None, [], ["a"] * MAX_BAD_WORDS], [[""], ["a"] * (MAX_BAD_WORDS + 1)]),
    "allowed_token_ids": ([None, [0]], [[]]),
    "logit_bias": (
        [None, {}, {1: 100.0, 2: -100.0}],
        [{1: 100.1}, {1: NAN}, {1: INF}, dict.fromkeys(range(MAX_BIASES + 1), 0.0)],
    ),
}
GOOD = [(field, value) for field, (good, _) in LIMITS.items() for value in good if value != ""]
BAD = [(field, value) for field, (_, bad) in LIMITS.items() for value in bad]


@pytest.mark.parametrize(("field", "value"), GOOD)
def test_what_makes_sense_is_taken(field, value):
    SamplingParams(**{field: value})


@pytest.mark.parametrize(("field", "value"), BAD)
def test_what_makes_none_is_refused_by_name(field, value):
    with pytest.raises(InvalidRequest, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field


def test_defaults_are_the_apis():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.max_tokens) == (1, 1.0, 1.0, 16)
    assert not params.greedy
    assert params.stop_strings == ()


def test_one_stop_string_is_a_list_of_one():
    assert SamplingParams(stop="END").stop_strings == ["END"]


def test_all_tokens_has_two_spellings():
    assert SamplingParams(top_k=-1).top_k == 0


def test_greedy_copies_are_refused():
    assert SamplingParams(temperature=0.0).greedy
    with pytest.raises(InvalidRequest, match="greedy copies"):
        SamplingParams(temperature=0.0, n=2)


def test_min_tokens_stays_below_max_tokens():
    assert SamplingParams(min_tokens=4, max_tokens=4).min_tokens == 4
    assert SamplingParams(min_tokens=400, max_tokens=None).min_tokens == 400
    with pytest.raises(InvalidRequest, match="must not exceed max_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_it_is_a_value():
    params = SamplingParams(temperature=0.5, stop=["a"])
    with pytest.raises(AttributeError):
        params.temperature = 1.0  # type: ignore[misc]
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    assert again == params


def test_what_arrives_over_the_wire_is_checked_too():
    with pytest.raises((InvalidRequest, msgspec.ValidationError)):
        msgspec.json.decode(b'{"temperature": -1}', type=SamplingParams)
