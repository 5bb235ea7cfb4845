import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from tests.ops.cases import draw, packed
from xllm.ops.cpu import build
from xllm.ops.cpu.build import BuildError
from xllm.ops.table import is_available, load_ops

pytestmark = pytest.mark.skipif(not is_available("cpu"), reason="there is no C++ compiler on this machine")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_two_processes_build_one_library(cache: Path) -> None:
    command = [sys.executable, "-m", "xllm.ops.cpu.build"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (process.communicate()[0] for process in running)
    assert first == second
    library = Path(first.removeprefix("CPU kernels: ").strip())
    assert library.is_relative_to(cache)
    assert sorted(path.name for path in library.parent.iterdir()) == ["libxllm_ops.so", "lock"]
    assert build.build() == library


def test_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="no C\\+\\+ compiler \\(no-such-compiler\\)"):
        build.build()
    told = subprocess.run(
        [sys.executable, "-m", "xllm.ops.cpu.build"], capture_output=True, text=True, check=False
    )
    assert told.returncode == 1
    assert told.stderr.startswith("CPU kernels were not built: there is no C++ compiler")


def test_compiler_that_fails(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = cache / "c++"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: no' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(BuildError, match=r"the C\+\+ compiler failed \(x\.cpp:1: error: no\)"):
        build.build()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_cache_that_cannot_be_written(cache: Path) -> None:
    cache.chmod(0o500)
    assert build.build().exists()


@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64"])
def test_sources_compile_for_lesser_processors(march: str, cache: Path) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("flags of another processor")
    compiler = build.find_compiler()
    for source in build.HERE.glob("*.cpp"):
        command = [compiler, *build.FLAGS, f"-march={march}", "-fsyntax-only", str(source)]
        subprocess.run(command, check=True, capture_output=True)


def test_kernels_from_several_threads_at_once() -> None:
    """One model may run in one thread while another draws or drafts in a second."""
    ops = load_ops("cpu", torch.float32)
    weight, x = packed(ops, draw(900, 300), torch.float32), draw(200, 300)
    expected = ops.linear(x, weight, None)
    wrong: list[int] = []

    def work() -> None:
        wrong.extend(i for i in range(50) if not torch.equal(ops.linear(x, weight, None), expected))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_kernels_after_a_fork() -> None:
    """The child has no helper threads; it must work alone instead of waiting for them."""
    code = """
import os, torch
from tests.ops.cases import draw, packed
from xllm.ops.table import load_ops
torch.set_num_threads(4)
ops = load_ops("cpu", torch.float32)
weight, x = packed(ops, draw(900, 300), torch.float32), draw(200, 300)
expected = ops.linear(x, weight, None)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(ops.linear(x, weight, None), expected) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)
