"""What the CPU comparisons run, as token ids: equal for every engine, no text needed.

W2   one request, 512 tokens in, 64 out: time to first token, time per output token.
W1s  16 requests at once, 32 to 256 in, 32 to 128 out: output tokens per second.
W3   4 prompts of 1024 tokens, one token out: prompt tokens per second.
"""

import random
from dataclasses import dataclass

LOWEST, HIGHEST = 10, 2000  # ids that exist in every tokenizer and are not special


@dataclass(frozen=True, slots=True)
class Request:
    prompt: list[int]
    output_len: int


def _prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(LOWEST, HIGHEST) for _ in range(length)]


def w2() -> list[Request]:
    return [Request(_prompt(512, 1), 64)]


def w1s() -> list[Request]:
    rng = random.Random(7)
    return [Request(_prompt(rng.randint(32, 256), 100 + i), rng.randint(32, 128)) for i in range(16)]


def w3() -> list[Request]:
    return [Request(_prompt(1024, 50 + i), 1) for i in range(4)]


def warm_up() -> list[Request]:
    """Shares no prefix with the others."""
    return [Request(_prompt(96, 900 + i), 4) for i in range(4)]
