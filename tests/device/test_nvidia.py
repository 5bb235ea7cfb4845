"""The facts of a card, read from a stand-in for nvidia-smi."""

import importlib.metadata
import importlib.util
import os

import pytest

from xllm.core.errors import ConfigError
from xllm.device import nvidia
from xllm.device.facts import measure

H200 = "NVIDIA H200, 143771, 143000, 9.0"


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts an nvidia-smi on the PATH that prints what it is told, and lets PyTorch look as if built for CUDA."""

    def install(says: str, code: int = 0) -> None:
        script = tmp_path / "nvidia-smi"
        script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho "{says}"\nexit {code}\n')
        script.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.11.0+cu130")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "triton" or find(name))
    return install


def test_a_card_is_read(smi):
    smi(H200)
    facts = measure("cuda")
    assert facts.name == "cuda"
    assert facts.total_bytes == 143771 << 20
    assert facts.free_bytes == 143000 << 20
    assert "NVIDIA H200" in facts.description
    assert facts.preferences.measured
    assert facts.preferences.graphs
    assert facts.preferences.block_size == 64
    assert measure("auto") == facts


def test_the_first_visible_card_is_asked(smi, monkeypatch, tmp_path):
    smi(H200)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    measure("cuda")
    assert (tmp_path / "asked").read_text().split()[-2:] == ["-i", "3"]


def test_a_small_card_gets_smaller_steps(smi):
    smi("NVIDIA GeForce RTX 4090, 24564, 24000, 8.9")
    assert measure("cuda").preferences.token_budget < 8192


def test_an_old_card_is_refused(smi, caplog):
    smi("Tesla P100, 16384, 16000, 6.0")
    with pytest.raises(ConfigError, match=r"compute capability 6.0; 8.0 \(Ampere\)"):
        measure("cuda")
    assert measure("auto").name == "cpu"
    assert "the CPU is used: Tesla P100 has compute capability 6.0" in caplog.text


def test_what_nvidia_smi_complains_of_is_passed_on(smi):
    smi("No devices were found", code=6)
    with pytest.raises(ConfigError, match="No devices were found"):
        measure("cuda")


def test_hidden_cards_are_not_used(smi, monkeypatch):
    smi(H200)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES hides"):
        measure("cuda")


def test_a_pytorch_without_cuda_runs_on_the_cpu(smi, monkeypatch):
    smi(H200)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.13.0+cpu")
    with pytest.raises(ConfigError, match="the build without CUDA"):
        measure("cuda")


def test_no_driver(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert measure("auto").name == "cpu"
    with pytest.raises(ConfigError, match="no NVIDIA driver"):
        measure("cuda")
    assert nvidia.missing()
