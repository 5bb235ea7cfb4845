import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xllm.core.errors import ConfigError
from xllm.models.checkpoint import read_model_config
from xllm.models.sizing import kv_bytes_per_token, weight_bytes
from xllm.models.table import ARCHITECTURES, find_family

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "eos_token_id": 7,
}


def write(directory: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def read(directory: Path, **over: Any) -> Any:
    config = {name: value for name, value in (QWEN3 | over).items() if value != "absent"}
    return read_model_config(write(directory, config), None, "auto")


def test_reads_what_the_file_says(tmp_path: Path) -> None:
    config = read_model_config(write(tmp_path, QWEN3, {"eos_token_id": [8, 7]}), None, "dummy")
    assert (config.architecture, config.load_format) == ("Qwen3ForCausalLM", "dummy")
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 32)
    assert config.max_position == 128
    assert config.eos_ids == (7, 8)
    assert config.directory == str(tmp_path)


def test_overrides_merge_into_nested_objects(tmp_path: Path) -> None:
    linear = {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}
    config = read_model_config(
        write(tmp_path, QWEN3 | linear), {"num_hidden_layers": 1, "rope_parameters": {"factor": 8.0}}, "auto"
    )
    assert config.num_layers == 1
    assert config.max_position == 8 * 128
    assert config.hf["rope_parameters"]["rope_theta"] == 1e4


def test_text_part_of_a_nested_config(tmp_path: Path) -> None:
    text = {
        name: value
        for name, value in QWEN3.items()
        if name not in ("architectures", "eos_token_id", "tie_word_embeddings")
    }
    nested = {
        "architectures": ["Qwen3ForCausalLM"],
        "eos_token_id": 3,
        "tie_word_embeddings": True,
        "text_config": text,
    }
    config = read_model_config(write(tmp_path, nested), None, "auto")
    assert config.hidden_size == 64
    assert config.eos_ids == (3,)
    assert config.hf["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        ({"num_key_value_heads": None}, {"num_kv_heads": 4}),
        ({"architectures": ["LlamaForCausalLM"], "head_dim": None}, {"head_dim": 16}),
        ({"head_dim": "absent"}, {"head_dim": 128}),  # what transformers assumes for Qwen3
        ({"eos_token_id": None}, {"eos_ids": ()}),
    ],
)
def test_defaults(tmp_path: Path, over: dict[str, Any], expected: dict[str, Any]) -> None:
    config = read(tmp_path, **over)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({}, 128),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, 512),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 256),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}, 512),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}}, 128),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4,
                                 "original_max_position_embeddings": 16}},
            128,
        ),
    ],
)  # fmt: skip
def test_context_with_rope_scaling(tmp_path: Path, rope: dict[str, Any], length: int) -> None:
    assert read(tmp_path, **rope).max_position == length


@pytest.mark.parametrize(
    ("over", "sentence"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "Architecture GPT2LMHeadModel is not supported; supported: Llama.*Qwen3"),
        ({"architectures": []}, "names no architecture"),
        ({"hidden_size": "absent"}, "lacks the field 'hidden_size'"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised by a method .* supported: awq, gptq, fp8"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 .* not supported for Qwen3ForCausalLM"),
        ({"logit_scale": 0.5}, "logit_scale=0.5"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention' is not supported"),
        ({"layer_types": ["full_attention"]}, "names 1 layers, the model has 2"),
        ({"head_dim": 20}, "multiple of 8"),
        ({"num_key_value_heads": 3}, "do not divide"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope' is not supported; supported: default"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' needs 'factor'"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}}, "'mrope_section' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"a": {"rope_theta": 1.0}, "b": {"rope_theta": 2.0}}}, "differ between layer types"),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": None,
             "layer_types": ["sliding_attention", "full_attention"]},
            "layer_types .* not supported by Mistral",
        ),
    ],
)  # fmt: skip
def test_refuses_with_a_sentence(tmp_path: Path, over: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read(tmp_path, **over)


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_broken_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_model_config(tmp_path, None, "auto")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json: it is not a model directory"):
        read_model_config(tmp_path, None, "auto")


def test_rope_parameters_equal_for_all_layer_types(tmp_path: Path) -> None:
    same = {"rope_type": "default", "rope_theta": 5e5}
    config = read(tmp_path, rope_parameters={"full_attention": same, "sliding_attention": dict(same)})
    assert find_family(config.architecture).spec(config).rope.theta == 5e5


def test_windows(tmp_path: Path) -> None:
    config = read(tmp_path, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    assert find_family(config.architecture).spec(config).windows == (None, 16)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sizes(tmp_path: Path, architecture: str) -> None:
    config = read(tmp_path, architectures=[architecture])
    weights = 100 * 64 + 2 * ((4 + 2 * 2) * 32 * 64 + 64 * 4 * 32 + 3 * 96 * 64)
    vectors = 64 + 2 * 2 * 64
    vectors += {"Qwen3ForCausalLM": 2 * 2 * 32, "Qwen2ForCausalLM": 2 * 8 * 32}.get(architecture, 0)
    assert weight_bytes(config, "bfloat16") == 2 * weights + 4 * vectors
    assert weight_bytes(config, "float32") == 4 * (weights + vectors)
    assert kv_bytes_per_token(config, "bfloat16") == 2 * 2 * 2 * 32 * 2
    with pytest.raises(ConfigError, match="'int8' is not supported"):
        weight_bytes(config, "int8")


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys, xllm.models.source, xllm.models.checkpoint, xllm.models.sizing\n"
        "from xllm.models.table import ARCHITECTURES, find_family\n"
        "for name in ARCHITECTURES: find_family(name)\n"
        "assert 'torch' not in sys.modules and 'huggingface_hub' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
