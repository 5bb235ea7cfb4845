"""What `--quantization` and `--kv-cache-dtype` decide, and where they are refused."""

from dataclasses import replace
from typing import Any

import pytest

from xllm.config.decided import EngineConfig, ModelConfig
from xllm.config.facts import DeviceFacts, ModelFacts, Preferences, kept_in
from xllm.config.options import EngineOptions, option_fields
from xllm.config.resolve import resolve
from xllm.core.errors import ConfigError
from xllm.ops.schemes import SCHEMES

GIB = 1 << 30
MODEL = ModelConfig(
    directory="/m", architecture="Qwen3ForCausalLM", vocab_size=1000, hidden_size=64, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16, max_position=4096, eos_ids=(2,), load_format="auto", hf={},
)  # fmt: skip
FACTS = ModelFacts(
    dtype="bfloat16",
    weight_bytes={"bfloat16": 20 * GIB, "float32": 40 * GIB}
    | {kept_in(dtype, scheme): 5 * GIB for dtype in ("bfloat16", "float32") for scheme in SCHEMES},
    kv_bytes_per_token={"bfloat16": 1024, "float32": 2048, "float8_e4m3fn": 512},
)
CARD = DeviceFacts(
    name="cuda", description="a card", cores=4, total_bytes=16 * GIB, free_bytes=15 * GIB,
    preferences=Preferences(block_size=64, max_num_seqs=8, token_budget=512, memory_share=1.0),
)  # fmt: skip
CPU = replace(CARD, name="cpu", total_bytes=64 * GIB, free_bytes=60 * GIB)


def decide(device: DeviceFacts = CARD, facts: ModelFacts = FACTS, **options: Any) -> EngineConfig:
    return resolve(EngineOptions(**options), MODEL, facts, device)


def test_the_flag_names_every_scheme() -> None:
    (choices,) = (meta["choices"] for name, meta in option_fields() if name == "quantization")
    assert choices == tuple(SCHEMES)


@pytest.mark.parametrize("scheme", ["fp8", "int8", "int4"])
def test_float_checkpoints_are_quantised_when_asked(scheme: str) -> None:
    config = decide(quantization=scheme)  # in bfloat16 it would not fit
    assert config.executor.quantization == scheme
    assert config.executor.dtype == "bfloat16"
    assert any(f"in {scheme}: as asked" in reason for reason in config.reasons)


@pytest.mark.parametrize("asked", [{}, {"quantization": "awq"}])
def test_quantised_checkpoints_run_as_they_are(asked: dict[str, Any]) -> None:
    config = decide(facts=replace(FACTS, quantization="awq", dtype="float16"), **asked)
    assert config.executor.quantization == "awq"
    assert config.executor.dtype == "bfloat16"
    assert any("in awq: as the checkpoint is" in reason for reason in config.reasons)


def test_float32_checkpoints_keep_the_rest_in_bfloat16_unless_asked() -> None:
    facts = replace(FACTS, dtype="float32")
    assert decide(facts=facts, quantization="int8").executor.dtype == "bfloat16"
    assert decide(facts=facts, quantization="int8", dtype="float32").executor.dtype == "float32"


def test_nothing_asked_nothing_quantised() -> None:
    config = decide(replace(CARD, free_bytes=30 * GIB, total_bytes=32 * GIB))
    assert config.executor.quantization is None
    assert config.cache.kv_dtype == config.executor.dtype == "bfloat16"


def test_the_cache_may_be_in_8_bits() -> None:
    half, whole = (decide(quantization="fp8", kv_cache_dtype=asked) for asked in ("fp8", "auto"))
    assert half.cache.kv_dtype == "float8_e4m3fn"
    assert 2 * half.cache.block_bytes == whole.cache.block_bytes
    assert any("float8_e4m3fn: as asked" in reason for reason in half.reasons)


@pytest.mark.parametrize(
    ("device", "found", "options", "sentence"),
    [
        (CARD, None, {}, r"the weights take 20\.00 GiB in bfloat16, but only 15\.00 GiB"),
        (CARD, None, {"quantization": "awq"}, "the checkpoint is not quantised that way; fp8, int8 and int4"),
        (CARD, "gptq", {"quantization": "awq"}, "--quantization awq: the checkpoint is already quantised, in gptq"),
        (CARD, "awq", {"quantization": "int8"}, "already quantised, in awq"),
        (CPU, None, {"quantization": "int4"}, "weights in int4 run on a GPU only: .* without --quantization"),
        (CPU, "awq", {}, "weights in awq run on a GPU only: .* take the float checkpoint"),
        (CPU, None, {"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8 runs on a GPU only"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(
    device: DeviceFacts, found: str | None, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        decide(device, replace(FACTS, quantization=found), **options)


def test_too_large_even_so() -> None:
    small = replace(CARD, free_bytes=2 * GIB)
    with pytest.raises(ConfigError, match=r"the weights take 5\.00 GiB in int4 and bfloat16, but only 2\.00"):
        decide(small, quantization="int4")
