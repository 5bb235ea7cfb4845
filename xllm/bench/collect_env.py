"""`xllm collect-env`: what a bug report or a benchmark needs to say about machine and software. Nothing secret."""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

PACKAGES = (
    "pyxllm", "torch", "numpy", "tokenizers", "safetensors", "huggingface_hub", "transformers", "msgspec", "pyzmq",
    "fastapi", "uvicorn", "uvloop", "httptools", "triton",
)  # fmt: skip
# Instruction sets that decide which kernels a CPU gets, by their names in /proc/cpuinfo.
CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "avx512_vnni",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
)
# Variables that change how we run. Their values are shown, so none that may carry a secret belongs here.
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "PYTHONOPTIMIZE")


def collect() -> dict[str, Any]:
    return {
        "xllm": _version("pyxllm"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "distribution": _distribution(),
        "cpu": cpu(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": _gpus(),
        "compiler": _first_line("g++", "--version"),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "torch": _torch(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def cpu() -> dict[str, Any]:
    """Model name, cores this process may use, physical cores of the machine, instruction sets that matter."""
    info = _read("/proc/cpuinfo")
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    present = set(fields.get("flags", fields.get("Features", "")).split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "usable_cores": usable,
        "physical_cores": psutil.cpu_count(logical=False),
        "instructions": [flag for flag in CPU_FLAGS if flag in present],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="xllm collect-env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="as JSON")
    facts = collect()
    if parser.parse_args(argv).json:
        print(json.dumps(facts, indent=2))
    else:
        print("\n".join(_lines(facts)))
    return 0


def _lines(facts: dict[str, Any]) -> list[str]:
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines.append(f"{name}:")
            lines += [f"  {key}: {_text(v)}" for key, v in value.items()]
        else:
            lines.append(f"{name}: {_text(value)}")
    return lines


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _torch() -> dict[str, Any] | None:
    try:
        import torch
    except ImportError:
        return None
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _gpus() -> list[str]:
    query = "--query-gpu=name,memory.total,driver_version"
    output = _run("nvidia-smi", query, "--format=csv,noheader")
    return output.splitlines() if output else []


def _distribution() -> str | None:
    for line in _read("/etc/os-release").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip('"')
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(*command: str) -> str | None:
    output = _run(*command)
    return output.splitlines()[0] if output else None


def _run(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
