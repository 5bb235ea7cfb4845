"""RELIABILITY 9: a pool for two requests and hundreds queued. Everybody finishes, with the tokens of an empty machine."""

import random
from typing import Any

import pytest

from tests import checkpoints
from xllm.core.sampling import SamplingParams
from xllm.engine.llm import LLM

BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4  # layers, k and v, heads, head size, float32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.save_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.mark.parametrize(("queued", "admission"), [
    (120, "optimistic"), (60, "no_eviction"),
    pytest.param(500, "optimistic", marks=pytest.mark.slow), pytest.param(500, "no_eviction", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_full_pool_costs_time_and_never_a_token(model, queued, admission):
    rng = random.Random(1)
    prompts = [
        {"prompt_token_ids": [rng.randrange(3, 320) for _ in range(rng.randrange(4, 40))]}
        for _ in range(queued)
    ]
    params = [
        SamplingParams(temperature=0.0, max_tokens=rng.randrange(8, 24), ignore_eos=True)
        for _ in range(queued)
    ]
    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 64, "block_size": 8, "threads": 1}
    with LLM(str(model), **options) as roomy:
        expected = [out.outputs[0].token_ids for out in roomy.generate(prompts, params, use_tqdm=False)]
    with LLM(
        str(model), kv_cache_memory_bytes=2 * 64 * BYTES_PER_TOKEN, admission=admission, **options
    ) as pressed:
        outputs = pressed.generate(prompts, params, use_tqdm=False)
    assert [out.outputs[0].token_ids for out in outputs] == expected
    assert all(out.finished and out.outputs[0].finish_reason == "length" for out in outputs)
    preemptions = sum(out.metrics.num_preemptions for out in outputs)
    assert (preemptions > 0) == (admission == "optimistic")
