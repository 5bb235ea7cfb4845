"""Whatever the requests ask of the sampler, graphs and eager steps on every device choose the same tokens."""

import random

import pytest

from tests import checkpoints
from tests.engine.test_equality import BACKENDS
from xllm import LLM, SamplingParams


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.save_qwen3(tmp_path_factory.mktemp("qwen3"))


def requests(rng):
    for seed in range(16):
        prompt = [rng.randrange(3, checkpoints.VOCAB) for _ in range(rng.randint(1, 60))]
        yield prompt, SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.3]), top_p=rng.choice([1.0, 0.8]), top_k=rng.choice([0, 5, 50]),
            min_p=rng.choice([0.0, 0.05]), presence_penalty=rng.choice([0.0, 0.0, 0.5]), seed=seed,
            repetition_penalty=rng.choice([1.0, 1.0, 1.2]), logprobs=rng.choice([None, None, 2]), min_tokens=rng.choice([0, 5]),
            prompt_logprobs=rng.choice([None, None, None, 1]), max_tokens=rng.randint(5, 24), ignore_eos=True,
        )  # fmt: skip


def generate(model, backend, seed):
    prompts, params = zip(*requests(random.Random(seed)), strict=True)
    with LLM(
        str(model), dtype="float32", threads=1, max_num_seqs=6, block_size=8, **BACKENDS[backend]
    ) as llm:
        outputs = llm.generate(list(prompts), list(params), use_tqdm=False)
        return outputs, llm.stats().executor


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    "backend",
    ["graphs", "eager", *(pytest.param(f"cuda-{how}", marks=pytest.mark.gpu) for how in ("graphs", "eager"))],
)
def test_the_same_tokens_as_on_the_cpu(model, backend, seed):
    expected, _ = generate(model, "cpu", seed)
    outputs, steps = generate(model, backend, seed)
    for out, exact in zip(outputs, expected, strict=True):
        assert out.outputs[0].token_ids == exact.outputs[0].token_ids
        assert (out.outputs[0].logprobs is None) == (exact.outputs[0].logprobs is None)
        if exact.outputs[0].cumulative_logprob is not None:
            assert out.outputs[0].cumulative_logprob == pytest.approx(
                exact.outputs[0].cumulative_logprob, abs=1e-3
            )
        assert (out.prompt_logprobs is None) == (exact.prompt_logprobs is None)
    assert (steps.graph_steps > steps.steps // 2) == backend.endswith("graphs")
