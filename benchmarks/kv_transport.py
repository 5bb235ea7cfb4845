"""KV blocks from one process to another on this machine, by every transport that is installed.

    python -m benchmarks.kv_transport [--transports tcp,nixl] [--sizes 32KiB,256KiB,1MiB,9MiB] [--device cuda] [--total 256MiB]

Blocks of each size, `--total` of them all together, in an order of chance and as neighbours; the best of `--repeats`
in GB/s, and milliseconds that a lone block takes. Last, checksums of the same blocks. Every byte is compared.
"""

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from xllm.executor.block_sums import BlockSums
from xllm.executor.transports.table import nixl_module, open_transport

MARK = "descriptor "
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def size(text: str) -> int:
    unit = next((unit for unit in UNITS if text.endswith(unit)), "")
    return int(float(text.removesuffix(unit)) * UNITS.get(unit, 1))


def contents(blocks: int, nbytes: int, device: str) -> torch.Tensor:
    numbers = np.random.default_rng(1).integers(0, 1 << 63, blocks * nbytes // 8, dtype=np.uint64)
    return torch.from_numpy(numbers.view(np.uint8)).view(blocks, nbytes).to(device)


def give(asked: argparse.Namespace, blocks: int, nbytes: int) -> None:
    memory = contents(blocks, nbytes, asked.device)
    if memory.is_cuda:
        torch.cuda.synchronize()
    transport = open_transport(asked.transports, memory)
    print(MARK + transport.descriptor().hex(), flush=True)
    sys.stdin.read()
    transport.close()


def start_giving(name: str, asked: argparse.Namespace, blocks: int, nbytes: int) -> "subprocess.Popen[str]":
    command = [
        sys.executable,
        "-m",
        "benchmarks.kv_transport",
        "--transports",
        name,
        "--device",
        asked.device,
    ]
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": asked.giver_card} if asked.giver_card else {})
    return subprocess.Popen(
        [*command, "--give", str(blocks), str(nbytes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip


def best(repeats: int, work: Callable[[], object]) -> float:
    """Seconds."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def measure(name: str, asked: argparse.Namespace, blocks: int, nbytes: int) -> list[float]:
    """GB/s of neighbours and of blocks in an order of chance, milliseconds of one block."""
    giver = start_giving(name, asked, blocks, nbytes)
    assert giver.stdout is not None and giver.stdin is not None
    line = next(line for line in giver.stdout if line.startswith(MARK))
    memory = torch.zeros(blocks, nbytes, dtype=torch.uint8, device=asked.device)
    transport = open_transport(name, memory)
    peer = transport.connect(bytes.fromhex(line.removeprefix(MARK)))

    def read(theirs: list[int]) -> None:
        reading = peer.read(theirs, theirs)
        while not reading.wait(1.0):
            pass

    order = random.Random(1).sample(range(blocks), blocks)
    read(order)
    if not torch.equal(memory, contents(blocks, nbytes, asked.device)):
        raise SystemExit(f"{name}: what arrived is not what was given")
    total = blocks * nbytes / 1e9
    found = [total / best(asked.repeats, partial(read, which)) for which in ([*range(blocks)], order)]
    found.append(1e3 * best(10 * asked.repeats, lambda: read([0])))
    transport.close()
    giver.stdin.close()
    giver.wait(30)
    return found


def checksums(asked: argparse.Namespace, blocks: int, nbytes: int) -> float:
    sums = BlockSums(contents(blocks, nbytes, asked.device))
    numbers = random.Random(1).sample(range(blocks), blocks)
    sums.sums(numbers)
    return blocks * nbytes / 1e9 / best(asked.repeats, lambda: sums.sums(numbers))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transports", default="tcp,nixl" if nixl_module() else "tcp")
    parser.add_argument("--sizes", default="32KiB,256KiB,1MiB,9MiB")
    parser.add_argument("--total", default="256MiB")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--giver-card", default="", help="CUDA_VISIBLE_DEVICES of the process that gives")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--give", nargs=2, type=int, help=argparse.SUPPRESS)
    asked: Any = parser.parse_args(argv)
    if asked.give:
        give(asked, *asked.give)
        return
    torch.set_num_threads(1)
    print("| transport | blocks | neighbours GB/s | by chance GB/s | one block ms |\n|---|---|---|---|---|")
    for text in asked.sizes.split(","):
        nbytes = size(text)
        blocks = max(1, size(asked.total) // nbytes)
        for name in asked.transports.split(","):
            near, far, alone = measure(name, asked, blocks, nbytes)
            print(f"| {name} | {blocks} x {text} | {near:.2f} | {far:.2f} | {alone:.3f} |", flush=True)
        print(f"| checksums | {blocks} x {text} | | {checksums(asked, blocks, nbytes):.2f} | |", flush=True)


if __name__ == "__main__":
    main()
