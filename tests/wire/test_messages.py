import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.config.decided import (
    CacheConfig,
    EngineConfig,
    ExecutorConfig,
    MemoryConfig,
    ModelConfig,
    SchedulerConfig,
)
from xllm.core.output import Finish, SequenceOutput
from xllm.core.peers import KvFrom
from xllm.core.plan import TokenLogprobs
from xllm.core.sampling import SamplingParams
from xllm.core.stats import SchedulerStats
from xllm.wire.messages import (
    VERSION,
    Abort,
    Fault,
    FirstToken,
    FollowKv,
    Heartbeat,
    KvChange,
    KvChanges,
    LimitKv,
    Loading,
    Offer,
    Outputs,
    Provide,
    Provided,
    Ready,
    Reply,
    ResetPrefixCache,
    Shutdown,
    Sleep,
    StartTrace,
    StopTrace,
    Submit,
    SubmitMany,
    Taken,
    WakeUp,
    WireError,
    decode,
    encode,
)

CONFIG = EngineConfig(
    model=ModelConfig(
        directory="/m", architecture="Qwen3ForCausalLM", vocab_size=9, hidden_size=8, num_layers=1, num_heads=1,
        num_kv_heads=1, head_dim=8, max_position=99, eos_ids=(2, 3), load_format="auto", hf={"rope": {"factor": 2.0}},
    ),
    scheduler=SchedulerConfig(
        max_model_len=99, max_num_seqs=4, max_num_batched_tokens=64, chunked_prefill=True, order="fcfs",
        long_prefill_token_threshold=0, batching="chunked", admission="optimistic", depth=2,
    ),
    cache=CacheConfig(block_size=16, num_blocks=64, prefix_caching=True, block_bytes=1024, kv_dtype="float32"),
    memory=MemoryConfig(kv_bytes=None, utilization=0.9, length_asked=False),
    executor=ExecutorConfig(device="cpu", dtype="float32", threads=1, seed=0, graph_sizes=(1, 2)),
    reasons=("because",),
)  # fmt: skip
STATS = SchedulerStats(1, 2, 1, 0.5, 100, 50, 0, 3, 200, 30, 17)
ONE_OF_EACH = [
    Submit(
        request_id="r", prompt_token_ids=[1, 2, 3], priority=-3, deadline_s=1.5, cache_salt="tenant",
        waited_s=0.5, seed=2**64 - 1, output_token_ids=[4, 5], num_prompt_logprobs=2,
        params=SamplingParams(stop=["a"], logit_bias={3: -1.5}, seed=2**64 - 1, bad_words_token_ids=[[1, 2]]),
    ),
    SubmitMany(
        requests=[
            Submit(request_id=id, prompt_token_ids=[1, 2], params=SamplingParams(seed=3)) for id in ("a", "b")
        ]
    ),
    Abort(request_ids=["a", "b"]),
    Submit(request_id="r", prompt_token_ids=[1], params=SamplingParams(), kv_from=KvFrom("tcp://a:1", "p", 7, compute=False)),
    Provide(request_id="r", prompt_token_ids=[1, 2], first_block=1, block_size=1, fingerprint="00ff", deadline_s=0.5),
    Taken(request_id="r", upto=3),
    Offer(request_id="r", descriptor=b"\0x", first=1, blocks=[7, 3], sums=[2**64 - 1, 0], total=3),
    FirstToken(request_id="r", token_id=7),
    Provided(request_id="r", count=3, error="gone"),
    Provide(request_id="r", prompt_token_ids=[1, 2], first_block=0, block_size=2, fingerprint="", tail_token_ids=[3], params=SamplingParams(top_k=3), seed=2**64 - 1),
    ResetPrefixCache(call_id=4),
    Sleep(call_id=5),
    WakeUp(call_id=6),
    LimitKv(call_id=7, blocks=12),
    FollowKv(call_id=9),
    StartTrace(call_id=7),
    StopTrace(call_id=8, directory="traces"),
    Shutdown(),
    Loading(what="weights", done=3, total=7),
    Ready(config=CONFIG, seconds={"weights": 0.5}, addresses=["tcp://127.0.0.1:5"]),
    Outputs(
        outputs=[
            SequenceOutput(
                request_id="r", token_ids=[5], finish=Finish.STOP, stop_reason=9,
                logprobs=[TokenLogprobs(token_ids=[5, 6], logprobs=[-0.5, -1.0], rank=1)],
            )
        ],
        stats=STATS,
    ),
    Heartbeat(progress=7, busy=True, stats=STATS, outstanding=3),
    KvChanges(number=2, changes=[KvChange("stored", "GPU", [2**64 - 1, 0]), KvChange("cleared", "", [])]),
    Reply(call_id=4, value={"ok": True}),
    Reply(call_id=5, refused="it is busy"),
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
