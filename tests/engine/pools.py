"""What tests of the KV pools share: prompts with common beginnings, and where they run."""

import random

import pytest

from tests import checkpoints
from tests.engine.test_equality import BLOCK
from xllm import LLM, SamplingParams

LONGEST, OUTPUT = 112, 20
BLOCK_BYTES = BLOCK * 2 * 2 * 2 * 16 * 4
PARAMS = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)
EVERYWHERE = [
    *("cpu", "graphs", "eager"),
    *(pytest.param(f"cuda-{how}", marks=pytest.mark.gpu) for how in ("graphs", "eager")),
]


def some_prompts() -> list[list[int]]:
    rng = random.Random(4)
    shared = [rng.randrange(3, checkpoints.VOCAB) for _ in range(30)]
    own = [[rng.randrange(3, checkpoints.VOCAB) for _ in range(3 + 3 * i)] for i in range(16)]
    return [shared[: 5 * (i % 4)] + tail for i, tail in enumerate(own)]


def generate(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], PARAMS, use_tqdm=False)
    return [list(out.outputs[0].token_ids) for out in outputs]
