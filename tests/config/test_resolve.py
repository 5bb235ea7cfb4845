from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.config.decided import ModelConfig
from xllm.config.facts import DeviceFacts, ModelFacts
from xllm.config.options import EngineOptions, option_fields
from xllm.config.resolve import resolve
from xllm.core.errors import ConfigError

GIB = 1 << 30
MODEL = ModelConfig(
    directory="/m", architecture="Qwen3ForCausalLM", vocab_size=1000, hidden_size=64, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16, max_position=4096, eos_ids=(2,), load_format="auto", hf={},
)  # fmt: skip
FACTS = ModelFacts(
    dtype="bfloat16",
    weight_bytes={"bfloat16": GIB, "float32": 2 * GIB},
    kv_bytes_per_token={"bfloat16": 1024, "float32": 2048},
)
DEVICE = DeviceFacts(name="cpu", description="4 cores", cores=4, total_bytes=16 * GIB, free_bytes=12 * GIB)


def decide(device=DEVICE, facts=FACTS, model=MODEL, **options):
    return resolve(EngineOptions(**options), model, facts, device)


def test_defaults_follow_the_checkpoint_and_the_machine():
    config = decide()
    assert config.executor.dtype == "bfloat16"
    assert config.executor.threads == 4
    assert config.scheduler.max_model_len == 4096
    assert config.cache.block_bytes == 1024 * config.cache.block_size
    assert config.cache.num_blocks * config.cache.block_size >= config.scheduler.max_model_len


def test_every_decision_is_explained():
    text = "\n".join(decide().reasons)
    for word in ("dtype bfloat16", "threads", "KV cache", "tokens a step", "in flight"):
        assert word in text


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float16", "bfloat16"), ("float32", "float32"), ("bfloat16", "bfloat16")]
)
def test_auto_dtype(dtype, expected):
    assert decide(facts=replace(FACTS, dtype=dtype)).executor.dtype == expected


def test_no_more_kv_than_the_slots_can_use():
    config = decide(max_num_seqs=2, max_model_len=160)
    assert config.cache.num_blocks == 2 * 160 // config.cache.block_size


def test_a_small_machine_shortens_the_model_length_and_says_so():
    config = decide(device=replace(DEVICE, free_bytes=GIB + 4 * (1 << 20)))
    assert config.scheduler.max_model_len < 4096
    assert config.scheduler.max_model_len == config.cache.num_blocks * config.cache.block_size
    assert any("max model length" in reason for reason in config.reasons)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"trust_remote_code": True}, "runs no code"),
        ({"block_size": 17}, "block-size"),
        ({"max_model_len": 5000}, "beyond the model's own 4096"),
        ({"max_model_len": 0}, "at least 1"),
        ({"max_num_seqs": -1}, "max-num-seqs must be at least 1"),
        ({"gpu_memory_utilization": 1.5}, "gpu-memory-utilization"),
        ({"kv_cache_memory_bytes": 100 * GIB}, "exceed the machine"),
        ({"kv_cache_memory_bytes": 1 << 20, "max_model_len": 4096}, "less than one sequence"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 100}, "computes a prompt in one step"),
        ({"async_scheduling": 9}, "more than 8 steps"),
        ({"long_prefill_token_threshold": -1}, "must not be negative"),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        decide(**options)


def test_weights_beyond_memory_are_refused():
    with pytest.raises(ConfigError, match=r"only 0\.50 GiB of memory is free"):
        decide(device=replace(DEVICE, free_bytes=GIB // 2))


def test_whole_prompts_get_a_budget_that_holds_them():
    config = decide(enable_chunked_prefill=False)
    assert config.scheduler.max_num_batched_tokens >= config.scheduler.max_model_len


@given(
    free=st.integers(GIB + (1 << 20), 64 * GIB),
    seqs=st.integers(1, 512),
    length=st.integers(32, 4096),
    block=st.sampled_from([8, 16, 64]),
)
def test_one_sequence_of_the_longest_length_always_fits(free, seqs, length, block):
    device = replace(DEVICE, free_bytes=free, total_bytes=64 * GIB)
    try:
        config = decide(device=device, max_num_seqs=seqs, max_model_len=length, block_size=block)
    except ConfigError:
        return
    assert config.cache.num_blocks * block >= config.scheduler.max_model_len
    assert config.cache.num_blocks * config.cache.block_bytes + GIB <= free + block * 1024


def test_every_knob_has_help():
    assert all(meta["help"] for _, meta in option_fields())


def test_an_elastic_pool_promises_nothing():
    assert decide(kv_pool="elastic").cache.pool == "elastic"
    with pytest.raises(ConfigError, match="no_eviction"):
        decide(kv_pool="elastic", admission="no_eviction")
