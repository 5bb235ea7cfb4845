"""The facts of an NVIDIA GPU, without torch: asked of `nvidia-smi`, which comes with every driver."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess

import psutil

from xllm.config.facts import DeviceFacts, Preferences
from xllm.core.errors import ConfigError

MIB = 1 << 20
LARGE = 70 << 30  # bytes of a data-centre card
ASK_S = 20.0  # a driver that wakes a card takes seconds
OLDEST = 8.0  # compute capability: bfloat16 products and asynchronous copies begin there


def missing() -> str | None:
    """Why a GPU cannot be used here, or None. Costs no process where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return "there is no NVIDIA driver (nvidia-smi) on this machine"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides every GPU"
    try:
        if importlib.metadata.version("torch").endswith("+cpu"):
            return "the PyTorch here is the build without CUDA"
    except importlib.metadata.PackageNotFoundError:
        return "PyTorch is not installed"
    if importlib.util.find_spec("triton") is None:
        return "the package triton, which comes with PyTorch for CUDA, is not installed"
    return None


def cuda_facts() -> DeviceFacts:
    """Of the first card that CUDA_VISIBLE_DEVICES leaves. Raises ConfigError where none can be used."""
    if why := missing():
        raise ConfigError(f"--device cuda: {why}")
    name, total, free, capability = _ask(first_visible())
    if float(capability) < OLDEST:
        raise ConfigError(
            f"--device cuda: {name} has compute capability {capability}; {OLDEST} (Ampere) or newer is needed"
        )
    total_bytes = int(total) * MIB
    large = total_bytes >= LARGE
    return DeviceFacts(
        name="cuda",
        description=f"{name}, compute capability {capability}",
        cores=max(1, (psutil.cpu_count(logical=False) or 1) // 2),
        total_bytes=total_bytes,
        free_bytes=int(free) * MIB,
        preferences=Preferences(
            block_size=64,  # prefill attention reads whole tiles of 64 keys; decode does not care
            max_num_seqs=1024 if large else 256,
            token_budget=8192 if large else 2048,
            memory_share=1.0,
            page_bytes=2 << 20,  # what the driver maps at once
            graphs=True,
            measured=True,
        ),
    )


def first_visible() -> str:
    """As nvidia-smi takes it: an index in bus order, or a UUID."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()


def _ask(card: str) -> tuple[str, str, str, str]:
    query = "--query-gpu=name,memory.total,memory.free,compute_cap"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits", "-i", card],
            capture_output=True, text=True, timeout=ASK_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as e:
        raise ConfigError(f"--device cuda: nvidia-smi did not answer ({type(e).__name__})") from e
    fields = [field.strip() for field in done.stdout.strip().split(",")]
    if done.returncode or len(fields) != 4:
        told = (done.stderr or done.stdout).strip().splitlines()
        raise ConfigError(f"--device cuda: nvidia-smi -i {card}: {told[0] if told else 'no answer'}")
    return fields[0], fields[1], fields[2], fields[3]
