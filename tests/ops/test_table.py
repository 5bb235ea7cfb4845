import logging

import pytest
import torch

from xllm.core.errors import ConfigError
from xllm.ops.cpu import library
from xllm.ops.cpu.build import BuildError
from xllm.ops.table import TABLE, load_ops, resolve


def test_every_name_resolves_and_no_device_invents_operators() -> None:
    for device, operators in TABLE.items():
        assert operators.keys() <= TABLE["reference"].keys(), device
    for at in TABLE["reference"].values():
        assert callable(resolve(at))


@pytest.mark.parametrize(
    ("device", "dtype", "sentence"),
    [
        ("abacus", torch.float32, "'abacus' has no operators; known: reference, cpu, cuda"),
        ("cpu", torch.float16, "dtype float16 is not supported; supported: float32, bfloat16"),
    ],
)
def test_unknown_device_or_dtype(device: str, dtype: torch.dtype, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_ops(device, dtype)


def test_without_a_compiler_the_reference_runs_and_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise BuildError("there is no C++ compiler (g++) on this machine")

    monkeypatch.setattr(library, "build", fail)
    library.load.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            first, second = load_ops("cpu", torch.float32), load_ops("cpu", torch.bfloat16)
    finally:
        library.load.cache_clear()
    assert first.linear is second.linear is resolve(TABLE["reference"]["linear"])
    assert [record.message for record in caplog.records] == [
        "The fast CPU operators are not available, the model runs several times slower in plain PyTorch: "
        "there is no C++ compiler (g++) on this machine"
    ]
