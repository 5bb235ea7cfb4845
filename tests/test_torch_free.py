"""The rooms that decide run where torch is not installed: routers, policies and their tests stay light."""

import subprocess
import sys

import pytest

ROOMS = ["core", "config", "wire", "scheduler", "kv.events", "kv.hashing", "kv.index", "kv.pool", "cluster"]

# runs in a fresh interpreter: imports every module of a room with torch made unimportable
PROBE = """
import importlib, pkgutil, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{name} is absent here")

sys.meta_path.insert(0, NoTorch())
room = importlib.import_module("xllm." + sys.argv[1])
modules = [m.name for m in pkgutil.walk_packages(room.__path__, room.__name__ + ".")] if hasattr(room, "__path__") else []
for name in modules:
    importlib.import_module(name)
assert "torch" not in sys.modules
print(len(modules))
"""


@pytest.mark.parametrize("room", ROOMS)
def test_imports_without_torch(room):
    done = subprocess.run([sys.executable, "-c", PROBE, room], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    if room in ("core", "scheduler"):
        assert int(done.stdout) > 5, "the probe found the room's modules"


def test_the_probe_would_notice():
    probe = PROBE.replace('room = importlib.import_module("xllm." + sys.argv[1])', "import torch")
    done = subprocess.run([sys.executable, "-c", probe, "core"], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "torch is absent here" in done.stderr
