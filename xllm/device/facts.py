"""What the machine is, torch-free: the front end resolves its configuration before any engine process exists."""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil

from xllm.config.facts import CPU_PREFERENCES, DeviceFacts
from xllm.core.errors import ConfigError
from xllm.device import nvidia

log = logging.getLogger(__name__)
_CGROUP = Path("/sys/fs/cgroup")
_SHOWN_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")


def measure(name: str) -> DeviceFacts:
    """Facts of the device called `name`; "auto" takes the fastest that is here.

    Raises ConfigError for an unknown device, and for one asked for by name that cannot be used.
    """
    if name == "auto":
        return _best()
    if name not in FACTS:
        raise ConfigError(f"device {name!r} is not known; known: {', '.join(FACTS)}")
    return FACTS[name]()


def _best() -> DeviceFacts:
    """A GPU where there is one that can be used; where one cannot, a line says why."""
    if nvidia.missing():
        return cpu_facts()
    try:
        return nvidia.cuda_facts()
    except ConfigError as e:
        log.warning("the CPU is used: %s", e.message.removeprefix("--device cuda: "))
        return cpu_facts()


def cpu_facts() -> DeviceFacts:
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    limit, used = _cgroup_memory()
    if limit is not None:
        total, free = min(total, limit), min(free, max(0, limit - used))
    cores = _cores()
    model, flags = _cpu_model()
    description = f"{cores} core{'s' if cores > 1 else ''} of {model}" + (
        f" ({' '.join(flags)})" if flags else ""
    )
    return DeviceFacts(name="cpu", description=description, cores=cores, total_bytes=total, free_bytes=free)


def reference_facts() -> DeviceFacts:
    """The CPU, made to behave as a card does: see `xllm.device.reference`."""
    suits = replace(CPU_PREFERENCES, graphs=True, max_num_seqs=16)
    return replace(cpu_facts(), name="reference", preferences=suits)


FACTS: dict[str, Callable[[], DeviceFacts]] = {
    "cpu": cpu_facts,
    "cuda": nvidia.cuda_facts,
    "reference": reference_facts,
}


def _cores() -> int:
    """Physical cores this process may use: hyper-threads share the units a matrix product needs."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    logical, physical = psutil.cpu_count() or allowed, psutil.cpu_count(logical=False) or allowed
    cores = max(1, allowed * physical // logical) if allowed > 1 else 1
    quota = _cgroup_cpus()
    return max(1, min(cores, int(quota))) if quota is not None else cores


def _cgroup_cpus() -> float | None:
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _cgroup_memory() -> tuple[int | None, int]:
    """-> (limit or None, in use without what the kernel would give back)."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit == "max":
            return None, 0
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return int(limit), max(0, used - int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None, 0


def _cpu_model() -> tuple[str, list[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
        lines = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in text.splitlines())}
    except OSError:
        return "an unknown processor", []
    known = lines.get("flags", lines.get("Features", "")).split()
    return lines.get("model name", "an unknown processor"), [f for f in _SHOWN_FLAGS if f in known]
