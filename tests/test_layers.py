"""What the import contracts of pyproject.toml promise, and what they cannot express. See also `test_torch_free.py`."""

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import importlib, sys
for name in {absent!r}:
    sys.modules[name] = None  # importing it now raises ImportError
for name in {names!r}:
    importlib.import_module(name)
print(" ".join(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""


def modules(room: str) -> list[str]:
    files = sorted((ROOT / "xllm" / room).rglob("*.py"))
    return [".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in files]


def imported(*names: str, absent: tuple[str, ...] = ()) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after importing `names`."""
    program = PROGRAM.format(absent=absent, names=names)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_command_line_and_its_help_need_no_torch():
    names = ["xllm.cli", "xllm.server.options", "xllm.bench.cli", "xllm.config.flags", "xllm.config.options"]
    assert not imported(*names) & {"torch", "transformers", "numpy", "fastapi"}


def test_the_front_end_process_needs_no_torch():
    assert not imported("xllm.engine.async_llm", "xllm.server.app") & {"torch", "transformers"}


def test_the_engine_never_loads_transformers():
    names = [m for room in ("engine", "executor", "models", "ops", "device") for m in modules(room)]
    if importlib.util.find_spec("triton") is None:  # without CUDA's PyTorch there is none, and these need it
        names = [name for name in names if not name.startswith("xllm.ops.cuda.")]
    imported(*names, absent=("transformers",))


def test_import_contracts():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command as main; main()",
            "--no-cache",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout
