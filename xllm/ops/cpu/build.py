"""Builds the C++ kernels: a few seconds, once per machine. `python -m xllm.ops.cpu.build` does it ahead of time.

The library lies in `$XDG_CACHE_HOME/xllm/ops-<hash>` (or ~/.cache), where the hash covers the sources, the flags, the
compiler and the processor: nothing stale or foreign is ever loaded. It needs nothing but the C++ standard library.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math")


class BuildError(Exception):
    """Why there can be no library on this machine, in one sentence."""


def build() -> Path:
    """The library's path; compiles it where it is not there yet. Safe for several processes at once."""
    compiler = find_compiler()
    library = _cache_directory() / f"ops-{_fingerprint(compiler)}" / "libxllm_ops.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():  # nobody built it while we waited
            _compile(compiler, library)
    return library


def find_compiler() -> str:
    wanted = os.environ.get("CXX", "g++")
    found = shutil.which(wanted)
    if found is None:
        raise BuildError(f"there is no C++ compiler ({wanted}) on this machine")
    return found


def _cache_directory() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xllm"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="xllm-"))
    return cache if os.access(cache, os.W_OK) else Path(tempfile.mkdtemp(prefix="xllm-"))


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256()
    for source in sorted(HERE.glob("*.cpp")) + sorted(HERE.glob("*.h")):
        digest.update(source.name.encode() + source.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    for part in (" ".join(_flags()), version.decode(errors="replace"), _processor()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def _flags() -> list[str]:
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"
    return [*FLAGS, native]


def _processor() -> str:
    """What the processor can do, so that a cache on a shared disk serves each machine its own library."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    told = {line.split(":")[0].strip(): line for line in reversed(lines) if ":" in line}
    return "".join(told.get(name, "") for name in ("model name", "flags", "Features", "CPU part"))


def _compile(compiler: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        sources = sorted(HERE.glob("*.cpp"))
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        _run(
            [compiler, *_flags(), "-c", str(source), "-o", str(object)]
            for source, object in zip(sources, objects, strict=True)
        )
        fresh = Path(scratch) / library.name
        _run([[compiler, "-shared", "-pthread", *map(str, objects), "-o", str(fresh)]])
        os.replace(fresh, library)


def _run(commands: Iterable[Sequence[str]]) -> None:
    """All commands at once; BuildError with the first complaint if one fails."""
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    complaints = [process.communicate()[1] for process in running]
    for process, complaint in zip(running, complaints, strict=True):
        if process.returncode:
            first = next(
                (line for line in complaint.splitlines() if "error" in line), complaint.strip()[:200]
            )
            raise BuildError(f"the C++ compiler failed ({first})")


if __name__ == "__main__":
    try:
        print(f"CPU kernels: {build()}")
    except (BuildError, OSError) as error:
        print(f"CPU kernels were not built: {error}", file=sys.stderr)
        sys.exit(1)
