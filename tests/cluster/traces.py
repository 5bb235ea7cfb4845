"""Traffic of known shape for the simulator, from a seed."""

import random

from tests.cluster.simulator import BLOCK, Call


def conversations(
    seed: int, sessions: int, turns: int, rate: float, systems: int, system_blocks: int
) -> list[Call]:
    """`rate` requests a second: sessions of `turns`, each over one of `systems` system prompts; every turn repeats the
    conversation so far and adds to it."""
    rng = random.Random(seed)
    heads = [tuple(_block(rng) for _ in range(system_blocks)) for _ in range(systems)]
    calls, start = [], 0.0
    for session in range(sessions):
        start += rng.expovariate(rate / turns)
        at, blocks = start, rng.choice(heads)
        for turn in range(turns):
            blocks += tuple(_block(rng) for _ in range(rng.randint(2, 8)))
            output = rng.randint(24, 96)
            answer = tuple(_block(rng) for _ in range(output // BLOCK))
            tokens = len(blocks) * BLOCK + rng.randint(1, BLOCK - 1)
            calls.append(Call(f"{session}.{turn}", at, blocks, tokens, output, answer))
            blocks += answer
            at += rng.expovariate(0.25) + output * 0.02
    return sorted(calls, key=lambda call: call.at)


def strangers(seed: int, count: int, rate: float) -> list[Call]:
    """Requests that have nothing in common; prompts of log-normal length."""
    rng = random.Random(seed)
    calls, at = [], 0.0
    for n in range(count):
        at += rng.expovariate(rate)
        blocks = tuple(_block(rng) for _ in range(min(int(rng.lognormvariate(3.2, 0.9)) + 1, 400)))
        calls.append(Call(str(n), at, blocks, len(blocks) * BLOCK + 3, rng.randint(10, 200)))
    return calls


def _block(rng: random.Random) -> int:
    return rng.getrandbits(64)
