import pytest

from xllm.core.request import Phase, Request
from xllm.core.sampling import SamplingParams


def fresh(prompt: list[int], output: list[int] | None = None) -> Request:
    request = Request("a", prompt, SamplingParams(), 0.0, 100, 1)
    request.output_token_ids = output or []
    return request


def test_it_begins_waiting_with_nothing():
    request = fresh([1, 2])
    assert request.phase is Phase.WAITING
    assert (request.slot, request.blocks, request.num_known, request.num_tokens) == (-1, [], 2, 2)


def test_known_and_in_flight_are_counted_apart():
    request = fresh([1, 2], [3])
    request.num_in_flight = 2
    assert (request.num_known, request.num_tokens) == (3, 5)


@pytest.mark.parametrize(
    ("start", "stop", "tokens"),
    [
        (0, 5, [1, 2, 3, 8, 9]),
        (0, 2, [1, 2]),
        (0, 3, [1, 2, 3]),
        (2, 4, [3, 8]),
        (3, 5, [8, 9]),
        (4, 5, [9]),
        (4, 9, [9]),
        (1, 1, []),
        (3, 3, []),
    ],
)
def test_known_tokens_span_prompt_and_output(start, stop, tokens):
    assert fresh([1, 2, 3], [8, 9]).known_tokens(start, stop) == tokens


def test_requests_are_themselves_not_their_values():
    assert fresh([1]) != fresh([1])
    assert len({fresh([1]), fresh([1])}) == 2


def test_two_requests_share_no_lists():
    one, other = (Request(id, [1], SamplingParams(), 0.0, 9, 1) for id in "ab")
    one.blocks.append(3)
    one.output_token_ids.append(4)
    one.block_hashes.append(b"x")
    assert (other.blocks, other.output_token_ids, other.block_hashes) == ([], [], [])
