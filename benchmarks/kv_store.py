"""How fast KV blocks go to a store and come back, checksums and copies included, and how long a question takes.

    python -m benchmarks.kv_store file:///tmp/kv [--block-mib 1.75] [--blocks 256]

Sender and fetchers work as in an engine: a party of blocks at a time, one thread to send, two to fetch.
"""

import argparse
import secrets
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from xllm.executor.host_tier import checksum
from xllm.executor.remote_tier import RemoteTier
from xllm.executor.stores.table import open_store

FETCHERS = 2


def timed(work: Callable[[range], int], parties: list[range], threads: int) -> tuple[float, int]:
    """Seconds for all parties, and how many blocks came through."""
    with ThreadPoolExecutor(threads) as pool:
        begin = time.perf_counter()
        good = sum(pool.map(work, parties))
        return time.perf_counter() - begin, good


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("--block-mib", type=float, default=1.75, help="16 tokens of a 0.6B model in bfloat16")
    parser.add_argument("--blocks", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    size = int(asked.block_mib * 2**20)
    blocks_NB = np.random.default_rng(1).integers(0, 256, (asked.blocks, size), dtype=np.uint8)
    into_NB = np.ones_like(blocks_NB)
    rates: dict[str, list[float]] = {"put": [], "get": []}
    looks: list[float] = []
    for _ in range(asked.repeats):
        tier = RemoteTier(open_store(asked.url), size, secrets.token_bytes(8), readers=FETCHERS)
        names = [secrets.token_bytes(16) for _ in range(asked.blocks)]
        known = [checksum(name, row) for name, row in zip(names, blocks_NB, strict=True)]
        step = tier.at_once
        parties = [range(i, min(i + step, asked.blocks)) for i in range(0, asked.blocks, step)]

        def put(
            party: range, tier: RemoteTier = tier, names: list[bytes] = names, known: list[int] = known
        ) -> int:
            return sum(tier.put([(names[i], blocks_NB[i], known[i]) for i in party], tier.realm))

        def get(party: range, tier: RemoteTier = tier, names: list[bytes] = names) -> int:
            came = tier.get([(names[i], into_NB[i]) for i in party], tier.realm)
            return sum(one is not None for one in came)

        for way, work, threads in (("put", put, 1), ("get", get, FETCHERS)):
            seconds, good = timed(work, parties, threads)
            if good != asked.blocks:
                raise SystemExit(
                    f"{way}: {good} of {asked.blocks} blocks came through; is there room for them?"
                )
            rates[way].append(asked.blocks * size / seconds / 1e9)
        for _ in range(20):
            begin = time.perf_counter()
            if tier.count(names, tier.realm) != asked.blocks:
                raise SystemExit("the store does not say what it has")
            looks.append(1e3 * (time.perf_counter() - begin))
        tier.remove(names, tier.realm)
        tier.close()
    told = ", ".join(
        f"{way} {statistics.median(found):.2f} GB/s ({min(found):.2f} to {max(found):.2f})"
        for way, found in rates.items()
    )
    print(
        f"{asked.url}: {asked.blocks} blocks of {asked.block_mib} MiB, {told}; to ask for all of them "
        f"{statistics.median(looks):.2f} ms"
    )


if __name__ == "__main__":
    main()
