import msgspec
import pytest

from xllm.core.output import CompletionOutput, Finish, RequestMetrics, RequestOutput, SequenceOutput
from xllm.core.plan import TokenLogprobs


def test_finish_reasons_are_the_apis_words():
    assert [str(finish) for finish in Finish] == ["stop", "length", "abort", "error"]


def test_a_delta_is_small_on_the_wire():
    assert msgspec.json.encode(SequenceOutput("a", [7])) == b'{"request_id":"a","token_ids":[7]}'


@pytest.mark.parametrize(
    "output",
    [
        SequenceOutput("a", [7], finish=Finish.STOP, stop_reason=7, num_preemptions=2),
        SequenceOutput(
            "a", [7], [TokenLogprobs([7], [-0.5], 1)], queued_s=0.5, prefill_s=0.25, num_cached_tokens=8
        ),
        SequenceOutput("a", finish=Finish.ERROR, error="why"),
    ],
)
def test_outputs_survive_the_wire(output):
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(output), type=SequenceOutput)
    assert msgspec.to_builtins(again) == msgspec.to_builtins(output)
    assert again.finish is output.finish


def test_a_completion_is_finished_when_it_says_why():
    completion = CompletionOutput(0)
    assert not completion.finished
    completion.finish_reason = "stop"
    assert completion.finished
    assert CompletionOutput(1).token_ids is not completion.token_ids


def test_the_public_output_has_the_known_shape():
    output = RequestOutput("a", "hi", [1], None, [CompletionOutput(0, "there")], True, RequestMetrics(0.0))
    assert (output.outputs[0].text, output.num_cached_tokens, output.error) == ("there", 0, None)
    assert (output.metrics.first_token, output.metrics.num_preemptions) == (None, 0)
