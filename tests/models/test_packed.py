"""What quantised checkpoints say of themselves, and their packings against independent packers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.models import packers
from xllm.core.errors import ConfigError
from xllm.models.packed import parts_of, read_rows
from xllm.models.quantisation import Packing, read_packing
from xllm.models.spec import Source
from xllm.ops.quantised import Int4Rows

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
FP8_GROUP = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
    "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
}
COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
    "config_groups": {"group_0": FP8_GROUP}, "kv_cache_scheme": None,
}  # fmt: skip

PACK: dict[str, tuple[Packing, Callable[..., dict[str, np.ndarray]]]] = {
    "awq": (Packing("awq"), packers.pack_awq),
    "gptq": (Packing("gptq", zero_offset=1), packers.pack_gptq),
    "gptq_v2": (Packing("gptq"), partial(packers.pack_gptq, version=2, indices=False)),
}


@pytest.mark.parametrize("name", PACK)
@given(
    eights=st.integers(1, 3),
    groups=st.integers(1, 3),
    width=st.sampled_from([8, 16]),
    seed=st.integers(0, 2**31),
)
def test_reads_what_packers_wrote(name: str, eights: int, groups: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = 8 * eights, groups * width
    numbers = rng.integers(0, 16, (rows, columns))
    scales = rng.normal(size=(rows, groups)).astype(np.float16)
    zeros = rng.integers(0, 16, (rows, groups))
    packing, pack = PACK[name]
    packing = Packing(packing.scheme, width, packing.zero_offset)
    source = Source("a.b.weight", (rows, columns))
    tensors = {f"a.b.{part}": torch.from_numpy(made) for part, made in pack(numbers, scales, zeros).items()}
    for tensor, part in parts_of(source, packing).items():
        if tensor in tensors:
            assert tuple(tensors[tensor].shape) in part.shapes
            assert tensors[tensor].dtype in part.dtypes
        else:
            assert part.optional
    read = read_rows(source, tensors, packing, torch.device("cpu"))
    assert isinstance(read, Int4Rows)
    assert np.array_equal(read.numbers_NK, numbers)
    assert np.array_equal(read.zeros_NG, zeros)
    assert np.array_equal(read.scales_NG, scales.astype(np.float32))


def test_zero_points_stored_one_by_one_less_one_are_the_same() -> None:
    """Symmetric checkpoints store 7 for 8, whether their packer subtracted from each nibble or from the word."""
    scales, zeros = np.ones((8, 1), np.float16), np.full((8, 1), 8)
    words = packers.pack_gptq(np.zeros((8, 8), int), scales, zeros)["qzeros"]
    assert words.tolist() == [[0x77777777]]


def test_groups_out_of_order_are_refused() -> None:
    packing = Packing("gptq", 8, 1)
    tensors = packers.pack_gptq(np.zeros((8, 16), int), np.ones((8, 2), np.float16), np.full((8, 2), 8))
    tensors["g_idx"] = tensors["g_idx"][::-1].copy()
    with pytest.raises(
        ConfigError, match=r"^q: its inputs are grouped out of order \(g_idx .*desc_act=false are"
    ):
        read_rows(
            Source("q.weight", (8, 16)),
            {f"q.{name}": torch.from_numpy(part) for name, part in tensors.items()},
            packing,
            torch.device("cpu"),
        )


def test_matrices_that_cannot_be_packed_so() -> None:
    for shape, group in (((12, 64), 32), ((16, 64), 24)):
        with pytest.raises(ConfigError, match=r"q\.weight of .* cannot be packed as awq with groups of"):
            parts_of(Source("q.weight", shape), Packing("awq", group))


@pytest.mark.parametrize(
    ("config", "packing"),
    [
        (AWQ, Packing("awq", 128)),
        (AWQ | {"group_size": 64, "version": "GEMM", "modules_to_not_convert": ["lm_head"]}, Packing("awq", 64)),
        (GPTQ, Packing("gptq", 128, 1)),
        (GPTQ | {"group_size": -1, "checkpoint_format": "gptq_v2", "desc_act": True}, Packing("gptq", None, 0)),
        ({"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]}, Packing("fp8")),
        (COMPRESSED, Packing("fp8")),
        (COMPRESSED | {"ignore": ["re:.*lm_head"]}, Packing("fp8")),
    ],
)  # fmt: skip
def test_reads_configs(config: dict[str, Any], packing: Packing) -> None:
    assert read_packing({"quantization_config": config}) == packing


def test_float_checkpoints_have_no_packing() -> None:
    assert read_packing({}) is None
    assert read_packing({"quantization_config": None}) is None


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"bits": 4}, r"quant_method ''\); supported: awq, gptq, fp8, compressed-tensors"),
        ({"quant_method": "bitsandbytes"}, r"quant_method 'bitsandbytes'"),
        (AWQ | {"bits": 8}, "awq checkpoints with bits=8 are not supported; supported: 4"),
        (AWQ | {"version": "gemv"}, "awq checkpoints with version='gemv' .*; supported: gemm"),
        (AWQ | {"zero_point": False}, "zero_point=False"),
        (AWQ | {"group_size": "all"}, "group_size 'all' in quantization_config"),
        (AWQ | {"modules_to_not_convert": ["visual"]}, r"layers left unquantised \(visual\)"),
        (GPTQ | {"bits": 3}, "gptq checkpoints with bits=3"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        (GPTQ | {"lm_head": True}, "gptq checkpoints with lm_head=True"),
        (GPTQ | {"dynamic": {"-:mlp": {}}}, "gptq checkpoints with dynamic="),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "a scale per block .* --quantization fp8"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "activation_scheme='static'"),
        (COMPRESSED | {"format": "pack-quantized"}, "compressed-tensors checkpoints with format='pack-quantized'"),
        (COMPRESSED | {"ignore": ["model.layers.0.mlp"]}, "left unquantised"),
        (COMPRESSED | {"kv_cache_scheme": {"num_bits": 8}}, "KV cache"),
        (COMPRESSED | {"config_groups": {"0": FP8_GROUP | {"targets": ["re:.*proj"]}}}, "targets="),
        (COMPRESSED | {"config_groups": {"0": FP8_GROUP | {"input_activations": None}}}, "num_bits=None"),
        (
            COMPRESSED | {"config_groups": {"0": FP8_GROUP | {"weights": FP8_GROUP["weights"] | {"strategy": "block"}}}},  # type: ignore[operator]
            "strategy='block'",
        ),
    ],
)  # fmt: skip
def test_refuses_with_a_sentence(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_packing({"quantization_config": config})
