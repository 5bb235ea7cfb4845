import pytest

from tests.scheduler.rig import config, request
from xllm.core.errors import ConfigError, InvalidRequest
from xllm.kv.pool import BlockPool
from xllm.scheduler.intake import check_config, check_request


def check(one, num_blocks: int = 64, **changes):
    check_request(one, config(**changes), BlockPool(num_blocks, 4))
    return one


@pytest.mark.parametrize("name", ["max_model_len", "max_num_seqs", "max_num_batched_tokens", "depth"])
def test_counts_are_positive(name):
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, not 0") as caught:
        check_config(config(**{name: 0}))
    assert caught.value.param == name


def test_without_chunks_a_step_holds_a_whole_prompt():
    check_config(config(chunked_prefill=False, max_num_batched_tokens=64))
    with pytest.raises(
        ConfigError, match=r"max_num_batched_tokens \(63\) must be at least max_model_len \(64\)"
    ):
        check_config(config(chunked_prefill=False, max_num_batched_tokens=63))


def test_without_chunks_there_is_no_threshold():
    with pytest.raises(ConfigError, match="long_prefill_token_threshold cuts prompts"):
        check_config(config(chunked_prefill=False, max_num_batched_tokens=64, long_prefill_token_threshold=8))


def test_a_threshold_is_not_negative():
    with pytest.raises(ConfigError, match="must not be negative"):
        check_config(config(long_prefill_token_threshold=-1))


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message", "param"),
    [
        ([], 4, "the prompt is empty", "prompt"),
        ([1] * 64, 4, "the prompt has 64 tokens; with at least one to generate, 64 is the limit", "prompt"),
        ([-1], 4, "token ids must be integers from 0", "prompt"),
        ([2**32], 4, "token ids must be integers from 0", "prompt"),
    ],
)
def test_prompts_that_cannot_run_are_refused(prompt, max_tokens, message, param):
    with pytest.raises(InvalidRequest, match=message) as caught:
        check(request("x", prompt, max_tokens))
    assert caught.value.param == param


def test_a_limit_below_the_prompt_is_refused():
    with pytest.raises(InvalidRequest, match="a prompt of 9 tokens leaves no room to generate below 9"):
        check(request("x", [1] * 9, max_total_tokens=9))


def test_what_alone_outgrows_the_cache_is_refused():
    with pytest.raises(
        InvalidRequest, match="33 tokens of prompt and output need 9 KV blocks; the whole cache has 8"
    ):
        check(request("x", [1] * 20, 13), num_blocks=8)
    check(request("x", [1] * 20, 12), num_blocks=8)


@pytest.mark.parametrize(
    ("max_total_tokens", "max_tokens", "limit"),
    [(1000, None, 64), (1000, 5, 8), (7, 5, 7), (1000, 61, 64), (9, None, 9)],
)
def test_the_length_limit_is_the_tightest(max_total_tokens, max_tokens, limit):
    assert (
        check(request("x", [1] * 3, max_tokens, max_total_tokens=max_total_tokens)).max_total_tokens == limit
    )
