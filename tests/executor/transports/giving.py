"""A process that gives out KV blocks of random bytes: `python -m tests.executor.transports.giving KIND DEVICE BLOCKS BYTES SEED`.

It prints its descriptor, and ends with its input. The token is XLLM_CLUSTER_TOKEN.
"""

import os
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch

from xllm.core.errors import ConfigError
from xllm.executor.transports.mooncake_engines import load
from xllm.executor.transports.table import nixl_module, open_transport

LONG = 30.0  # seconds; only a failing test waits that long
MARK = "descriptor "

needs_nixl = pytest.mark.skipif(
    nixl_module() is None, reason="NIXL is not installed (pip install 'pyxllm[pd]')"
)


def _mooncake_loads() -> bool:
    try:
        load()
    except ConfigError:
        return False
    return True


needs_mooncake = pytest.mark.skipif(
    not _mooncake_loads(),
    reason="Mooncake is not installed, or does not load (pip install 'pyxllm[mooncake]')",
)


def contents(blocks, nbytes, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (blocks, nbytes), dtype=torch.uint8, generator=generator)


class Giver:
    """The other process."""

    def __init__(self, kind, blocks=64, nbytes=1000, seed=1, token=None, device="cpu"):
        command = [sys.executable, "-m", "tests.executor.transports.giving", kind, device]
        command += [str(number) for number in (blocks, nbytes, seed)]
        env = {**os.environ, "XLLM_CLUSTER_TOKEN": token or ""}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self.blocks = contents(blocks, nbytes, seed)
        output: Any = self.process.stdout
        for line in output:
            if line.startswith(MARK):
                self.descriptor = bytes.fromhex(line.removeprefix(MARK))
                return
        self.end()
        raise AssertionError("it did not start")

    @property
    def pid(self):
        return self.process.pid

    def end(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(LONG)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def main():
    kind, device, *numbers = sys.argv[1:]
    memory = contents(*map(int, numbers)).to(device)
    if memory.is_cuda:
        torch.cuda.synchronize()
    transport = open_transport(kind, memory, token=os.environ["XLLM_CLUSTER_TOKEN"] or None)
    print(MARK + transport.descriptor().hex(), flush=True)
    sys.stdin.read()
    transport.close()


if __name__ == "__main__":
    main()
