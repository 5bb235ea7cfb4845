import msgspec
import pytest

from tests.engine.scripted import EOS, make_core, submit
from xllm.core.output import Finish
from xllm.core.request import Request
from xllm.core.sampling import SamplingParams
from xllm.engine.admission import Admission
from xllm.wire.messages import Submit


class Recorder:
    """In the scheduler's place: keeps what it is given."""

    def __init__(self):
        self.requests: list[Request] = []

    def add(self, request: Request) -> None:
        self.requests.append(request)


def admit(*messages: Submit, seed: int = 0, now: float = 100.0) -> list[Request]:
    recorder = Recorder()
    admission = Admission(recorder, eos_ids=frozenset({EOS}), max_model_len=64, seed=seed)  # type: ignore[arg-type]
    for message in messages:
        assert admission.submit(message, now) == []
    return recorder.requests


def make(**params) -> Submit:
    return Submit(request_id="r", prompt_token_ids=[1, 2, 3], params=SamplingParams(**params))


@pytest.mark.parametrize(("max_tokens", "longest"), [(5, 8), (61, 64), (500, 64), (None, 64)])
def test_the_longest_length_is_bounded_by_the_model(max_tokens, longest):
    assert admit(make(max_tokens=max_tokens))[0].max_total_tokens == longest


def test_what_ends_a_request():
    (plain,) = admit(make(stop_token_ids=[7]))
    assert plain.stop_ids == {EOS, 7} and plain.eos_ids == {EOS}
    (on,) = admit(make(stop_token_ids=[7], ignore_eos=True))
    assert on.stop_ids == {7} and not on.eos_ids


def test_a_users_seed_is_kept_as_64_bits():
    assert admit(make(seed=11))[0].seed == 11
    assert admit(make(seed=-1))[0].seed == 2**64 - 1


def test_seeds_of_those_who_bring_none_differ_and_follow_the_engines():
    def drawn(engine_seed):
        return [request.seed for request in admit(*(make() for _ in range(100)), seed=engine_seed)]

    assert len(set(drawn(0))) == 100
    assert drawn(0) == drawn(0)
    assert set(drawn(0)).isdisjoint(drawn(1))


def test_a_deadline_is_told_from_now_and_kept_on_the_scheduler_clock():
    message = Submit(request_id="r", prompt_token_ids=[1], params=SamplingParams(), deadline_s=2.5)
    assert admit(message, now=100.0)[0].deadline == 102.5


def test_a_seed_beside_the_parameters_goes_first():
    both = msgspec.structs.replace(make(seed=11), seed=12)
    alone = msgspec.structs.replace(make(), seed=-1)
    assert [request.seed for request in admit(both, alone)] == [12, 2**64 - 1]


def test_what_was_begun_elsewhere_is_taken_over():
    begun = msgspec.structs.replace(
        make(max_tokens=9), output_token_ids=(4, 5), waited_s=2.5, num_prompt_logprobs=1
    )
    (request,) = admit(begun, now=100.0)
    assert (request.output_token_ids, request.max_total_tokens, request.arrival) == ([4, 5], 12, 97.5)
    assert request.num_prompt_logprobs == 2, "who has a token has had them all"
    (unborn,) = admit(msgspec.structs.replace(begun, output_token_ids=()))
    assert unborn.num_prompt_logprobs == 1


def test_a_refusal_is_the_one_terminal_output():
    core, _ = make_core()
    assert core._admission.submit(submit("r", [1]), 0.0) == []
    (refused,) = core._admission.submit(submit("r", [1]), 0.0)
    assert refused.finish is Finish.ERROR
    assert refused.error
    core.executor.close()
