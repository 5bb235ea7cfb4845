import pytest

from xllm.core.errors import InvalidRequest
from xllm.core.sampling import SamplingParams
from xllm.engine.validate import Validator


@pytest.fixture
def validator():
    return Validator(vocab_size=100, max_model_len=32, max_logprobs=5)


@pytest.mark.parametrize(
    ("prompt", "params"),
    [
        ([0], {}),
        ([99] * 31, {"max_tokens": 1}),
        ([1] * 16, {"max_tokens": 16}),
        ([1] * 31, {"max_tokens": None}),
        ([1], {"logprobs": 5, "prompt_logprobs": 0}),
        ([1], {"logit_bias": {99: 1.0}, "allowed_token_ids": [0, 99], "stop_token_ids": [3]}),
    ],
)
def test_what_fits_passes(validator, prompt, params):
    validator.check(prompt, SamplingParams(**params))


@pytest.mark.parametrize(
    ("prompt", "params", "field", "sentence"),
    [
        ([], {}, "prompt", "at least one token"),
        ([100], {}, "prompt", "token id 100 is not in the vocabulary of 100"),
        ([-1], {}, "prompt", "token id -1"),
        ([1] * 32, {}, "prompt", "The prompt alone has 32"),
        ([1] * 16, {"max_tokens": 17}, "max_tokens", r"33 tokens \(16 in the prompt, 17 in the completion\)"),
        ([1], {"logprobs": 6}, "logprobs", "at most 5"),
        ([1], {"prompt_logprobs": 6}, "prompt_logprobs", "at most 5"),
        ([1], {"logit_bias": {100: 1.0}}, "logit_bias", "100"),
        ([1], {"allowed_token_ids": [5, 200]}, "allowed_token_ids", "200"),
        ([1], {"stop_token_ids": [-2]}, "stop_token_ids", "-2"),
        ([1], {"bad_words_token_ids": [[1, 2], [3, 400]]}, "bad_words_token_ids", "400"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(validator, prompt, params, field, sentence):
    with pytest.raises(InvalidRequest, match=sentence) as refused:
        validator.check(prompt, SamplingParams(**params))
    assert refused.value.param == field
    assert refused.value.status == 400


@pytest.mark.parametrize("prompt", [[True, False], [1.0, 2.5], (5, 6), range(3), [5] * 16])
def test_whatever_lies_between_the_bounds_passes(validator, prompt):
    """Whether ids are integers is the reader's question."""
    validator.check(prompt, SamplingParams())


@pytest.mark.parametrize("wrong", [-1, 100, 2**70, 100.5, -0.1, float("inf")])
@pytest.mark.parametrize("place", [0, 15, 30])
def test_one_wrong_id_among_many_is_named(validator, wrong, place):
    prompt = [7] * 31
    prompt[place] = wrong
    with pytest.raises(InvalidRequest) as refused:
        validator.check(prompt, SamplingParams())
    assert refused.value.message == f"prompt: token id {wrong} is not in the vocabulary of 100"


def test_what_cannot_be_compared_is_a_mistake_of_ours(validator):
    with pytest.raises(TypeError):
        validator.check(["1"], SamplingParams())


def test_too_long_has_the_code_clients_look_for(validator):
    for prompt, params in [([1] * 40, SamplingParams()), ([1] * 20, SamplingParams(max_tokens=20))]:
        with pytest.raises(InvalidRequest) as refused:
            validator.check(prompt, params)
        assert refused.value.code == "context_length_exceeded"
