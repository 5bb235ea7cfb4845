"""A quantised checkpoint gives the logits of its dequantised weights; a float one is quantised as it loads."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import packers
from tests.models.harness import Driver, Sequence, load
from tests.models.test_packed import AWQ, COMPRESSED, GPTQ
from xllm.config.facts import kept_in
from xllm.core.errors import ConfigError
from xllm.engine.build import model_facts
from xllm.models.checkpoint import read_model_config
from xllm.models.loader import load_model
from xllm.models.quantisation import is_quantised
from xllm.models.sizing import weight_bytes
from xllm.models.table import find_family
from xllm.ops.linear import tensors_of
from xllm.ops.quantised import Fp8Weight, Int4Weight
from xllm.ops.table import load_ops

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 128, "tie_word_embeddings": False, "attention_bias": True, "torch_dtype": "float32",
}  # fmt: skip
PROMPT = list(range(10, 40))

Tensors = dict[str, torch.Tensor]
Packed = tuple[
    dict[str, np.ndarray], np.ndarray
]  # tensors of a matrix by the last part of the name, and what they mean


@dataclass(frozen=True)
class Case:
    config: dict[str, Any]
    scheme: str
    pack: Callable[[np.ndarray], Packed]


def four_bits(
    pack: Callable[..., dict[str, np.ndarray]], group: int | None
) -> Callable[[np.ndarray], Packed]:
    def packed(weight: np.ndarray) -> Packed:
        parts = packers.quantise(weight, group or weight.shape[1])
        return pack(*parts), packers.dequantise(*parts)

    return packed


def fp8(weight: np.ndarray, per_row: bool) -> Packed:
    """The numbers are bytes here, and become 8-bit floats when saved."""
    axis = 1 if per_row else None
    scale = (np.abs(weight).max(axis=axis, keepdims=per_row) / 448).astype(np.float32)
    numbers = torch.from_numpy((weight / scale).astype(np.float32)).to(torch.float8_e4m3fn)
    tensors = {"weight": numbers.view(torch.uint8).numpy(), "weight_scale": np.asarray(scale)}
    return tensors, numbers.float().numpy() * scale


CASES = {
    "awq": Case(AWQ | {"group_size": 32}, "awq", four_bits(packers.pack_awq, 32)),
    "awq whole rows": Case(AWQ | {"group_size": -1}, "awq", four_bits(packers.pack_awq, None)),
    "gptq": Case(GPTQ | {"group_size": 16}, "gptq", four_bits(packers.pack_gptq, 16)),
    "gptq v2": Case(
        GPTQ | {"group_size": 32, "checkpoint_format": "gptq_v2"},
        "gptq",
        four_bits(partial(packers.pack_gptq, version=2, indices=False), 32),
    ),
    "fp8": Case({"quant_method": "fp8"}, "fp8", lambda weight: fp8(weight, per_row=False)),
    "compressed-tensors": Case(COMPRESSED, "fp8", lambda weight: fp8(weight, per_row=True)),
}


def make(directory: Path, case: Case | None) -> tuple[Path, Path]:
    """(quantised checkpoint, float checkpoint of what it means); without a case the first is float, too."""
    quantised, plain = directory / "quantised", directory / "plain"
    for path in (quantised, plain):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(QWEN3))
    packed: Tensors = {}
    meant: Tensors = {}
    config = read_model_config(plain, None, "auto")
    torch.manual_seed(0)
    for parameter in find_family(config.architecture).parameters(config):
        for source in parameter.sources:
            tensor = torch.randn(source.shape) * 0.2
            meant[source.tensor] = packed[source.tensor] = tensor
            if case is not None and is_quantised(parameter):
                parts, values = case.pack(packed.pop(source.tensor).double().numpy())
                base = source.tensor.removesuffix("weight")
                packed |= {base + name: to_torch(part) for name, part in parts.items()}
                meant[source.tensor] = torch.from_numpy(values.astype(np.float32))
    save_file(meant, plain / "model.safetensors")
    if case is not None:
        (quantised / "config.json").write_text(json.dumps(QWEN3 | {"quantization_config": case.config}))
    save_file(packed, quantised / "model.safetensors")
    return quantised, plain


def to_torch(part: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(part).reshape(part.shape))
    return tensor.view(torch.float8_e4m3fn) if part.dtype == np.uint8 else tensor


def logits(directory: Path, scheme: str | None, **options: Any) -> torch.Tensor:
    driver = (
        load(directory, device="reference", **options) if scheme is None else open_with(directory, scheme)
    )
    return driver.step([(Sequence(PROMPT), len(PROMPT))], every_token=True)


def open_with(directory: Path, scheme: str, load_format: str = "auto") -> Driver:
    config = read_model_config(directory, None, load_format)
    ops = load_ops("reference", torch.float32, scheme)
    model = load_model(config, dtype=torch.float32, device="cpu", ops=ops)
    return Driver(model, config, dtype=torch.float32)


def off(given: torch.Tensor, exact: torch.Tensor) -> float:
    return float((given - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_dequantised_weights(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    quantised, plain = make(tmp_path, case)
    # in fp8 the tokens are rounded too
    assert off(logits(quantised, case.scheme), logits(plain, None)) < (0.1 if case.scheme == "fp8" else 1e-5)
    config = read_model_config(quantised, None, "auto")
    model: Any = open_with(quantised, case.scheme).model
    weight = model.layers[1].mlp.gate_up
    assert isinstance(weight, Fp8Weight if case.scheme == "fp8" else Int4Weight)
    assert isinstance(model.lm_head, torch.Tensor)
    resident = sum(tensor.numel() * tensor.element_size() for tensor in model.tensors())
    assert resident == weight_bytes(config, "float32", case.scheme)


@pytest.mark.parametrize("name", ["fp8", "compressed-tensors"])
def test_fp8_numbers_are_kept_as_they_are(tmp_path: Path, name: str) -> None:
    quantised, plain = make(tmp_path, CASES[name])
    model: Any = open_with(quantised, "fp8").model
    plain_model: Any = load(plain, device="reference").model
    for layer, plain_layer in zip(model.layers, plain_model.layers, strict=True):
        assert torch.equal(layer.attention.qkv.dequantise(), plain_layer.attention.qkv)
        assert torch.equal(layer.mlp.down.dequantise(), plain_layer.mlp.down)


def test_parts_of_a_matrix_may_lie_in_several_files(tmp_path: Path) -> None:
    quantised, _ = make(tmp_path, CASES["awq"])
    expected = logits(quantised, "awq")
    tensors = load_file(quantised / "model.safetensors")
    (quantised / "model.safetensors").unlink()
    where = {name: f"{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in tensors if where[name] == file}, quantised / file)
    (quantised / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert torch.equal(logits(quantised, "awq"), expected)


@pytest.mark.parametrize(("scheme", "limit"), [("fp8", 0.1), ("int8", 0.03), ("int4", 0.3)])
def test_float_checkpoints_are_quantised_as_they_load(tmp_path: Path, scheme: str, limit: float) -> None:
    directory, _ = make(tmp_path, None)
    exact = logits(directory, None)
    assert 0 < off(logits(directory, scheme), exact) < limit
    model: Any = open_with(directory, scheme).model
    plain: Any = load(directory, device="reference").model
    quantised = model.layers[0].attention.qkv
    assert torch.equal(quantised.dequantise(), requantised(plain.layers[0].attention.qkv, quantised))
    assert torch.equal(model.embed, plain.embed)


def requantised(rows_NK: torch.Tensor, like: Any) -> torch.Tensor:
    whole = type(like)(*rows_NK.shape)
    whole.put(0, whole.quantise(rows_NK))
    dequantised: torch.Tensor = whole.dequantise()
    return dequantised


def test_dummy_weights_are_quantised_too(tmp_path: Path) -> None:
    quantised, _ = make(tmp_path, CASES["awq"])
    driver = open_with(quantised, "awq", "dummy")
    weight: Any = driver.model.layers[0].mlp.down  # type: ignore[attr-defined]
    assert weight.group == 32
    assert weight.dequantise().std() == pytest.approx(0.02, rel=0.1)
    assert all(part.isfinite().all() for part in tensors_of(weight))


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda t: t.pop("model.layers.1.mlp.down_proj.qzeros"), r"lacks 1 tensors: .*down_proj\.qzeros"),
        (
            lambda t: t.update({"model.layers.1.mlp.down_proj.scales": torch.zeros(6, 64, dtype=torch.float16)}),
            r"down_proj\.scales in model\.safetensors has shape \(6, 64\), the config asks for \(3, 64\)",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.qweight": torch.zeros(64, 8)}),
            r"q_proj\.qweight in model\.safetensors holds torch\.float32, not one of int32",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 64)}),
            r"has 1 tensors the model has no place for: .*q_proj\.weight",
        ),
    ],
    ids=["missing", "shape", "dtype", "both"],
)  # fmt: skip
def test_refuses_a_checkpoint_that_does_not_fit(
    tmp_path: Path, edit: Callable[[Tensors], Any], sentence: str
) -> None:
    quantised, _ = make(tmp_path, CASES["awq"])
    tensors = load_file(quantised / "model.safetensors")
    edit(tensors)
    save_file(tensors, quantised / "model.safetensors")
    with pytest.raises(ConfigError, match=sentence):
        open_with(quantised, "awq")


@pytest.mark.parametrize("scheme", ["gptq", "int4", None])
def test_operators_of_another_scheme_are_refused(tmp_path: Path, scheme: str | None) -> None:
    quantised, _ = make(tmp_path, CASES["awq"])
    with pytest.raises(ConfigError, match=r"is quantised \(awq\) and cannot be loaded as (gptq|int4|floats)"):
        logits(quantised, scheme)


def test_facts_say_what_the_checkpoint_is(tmp_path: Path) -> None:
    quantised, plain = make(tmp_path, CASES["gptq"])
    facts = model_facts(read_model_config(quantised, None, "auto"))
    assert facts.quantization == "gptq"
    assert facts.weight_bytes[kept_in("bfloat16", "gptq")] < facts.weight_bytes["bfloat16"]
    facts = model_facts(read_model_config(plain, None, "auto"), "int8")
    assert facts.quantization is None
    assert facts.weight_bytes[kept_in("bfloat16", "int8")] < facts.weight_bytes["bfloat16"]
