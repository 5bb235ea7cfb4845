import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.core.output import Finish, SequenceOutput
from xllm.core.plan import TokenLogprobs
from xllm.core.sampling import SamplingParams
from xllm.core.stats import SchedulerStats
from xllm.wire.messages import (
    VERSION,
    Abort,
    Fault,
    Heartbeat,
    Loading,
    Outputs,
    Ready,
    Reply,
    ResetPrefixCache,
    Shutdown,
    Submit,
    SubmitMany,
    WireError,
    decode,
    encode,
)

STATS = SchedulerStats(1, 2, 1, 0.5, 100, 50, 0, 3, 200, 30, 17)
ONE_OF_EACH = [
    Submit(
        request_id="r", prompt_token_ids=[1, 2, 3], priority=-3, deadline_s=1.5, cache_salt="tenant",
        params=SamplingParams(stop=["a"], logit_bias={3: -1.5}, seed=2**64 - 1, bad_words_token_ids=[[1, 2]]),
    ),
    SubmitMany(
        requests=[
            Submit(request_id=id, prompt_token_ids=[1, 2], params=SamplingParams(seed=3)) for id in ("a", "b")
        ]
    ),
    Abort(request_ids=["a", "b"]),
    ResetPrefixCache(call_id=4),
    Shutdown(),
    Loading(what="weights", done=3, total=7),
    Ready(seconds={"weights": 0.5}),
    Outputs(
        outputs=[
            SequenceOutput(
                request_id="r", token_ids=[5], finish=Finish.STOP, stop_reason=9,
                logprobs=[TokenLogprobs(token_ids=[5, 6], logprobs=[-0.5, -1.0], rank=1)],
            )
        ],
        stats=STATS,
    ),
    Heartbeat(progress=7, busy=True, stats=STATS),
    Reply(call_id=4, value={"ok": True}),
    Fault(reason="out of memory"),
]  # fmt: skip


@pytest.mark.parametrize("message", ONE_OF_EACH, ids=lambda m: type(m).__name__)
def test_every_message_survives_the_wire(message):
    back = decode(encode(message))
    assert type(back) is type(message)
    assert msgspec.to_builtins(back) == msgspec.to_builtins(message)


def test_every_message_type_is_covered():
    from xllm.wire import messages

    assert {type(m) for m in ONE_OF_EACH} == set(messages.Message.__args__)


def test_another_version_is_refused_with_both_versions_named():
    frame = bytes([VERSION + 1]) + encode(Shutdown())[1:]
    with pytest.raises(WireError, match=f"version {VERSION + 1}, this is version {VERSION}"):
        decode(frame)


def test_an_empty_frame_is_refused():
    with pytest.raises(WireError):
        decode(b"")


@given(st.binary(max_size=64))
def test_arbitrary_bytes_are_a_message_or_a_wire_error(junk):
    with contextlib.suppress(WireError):
        decode(bytes([VERSION]) + junk)


def test_sampling_params_are_validated_when_they_arrive_too():
    good = encode(Submit(request_id="r", prompt_token_ids=[1], params=SamplingParams(temperature=1.5)))
    bad = good.replace(msgspec.msgpack.encode(1.5), msgspec.msgpack.encode(-1.5))
    assert bad != good
    with pytest.raises(Exception, match="temperature"):
        decode(bad)
