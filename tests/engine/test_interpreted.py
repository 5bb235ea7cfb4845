"""The engine over the kernels of "cuda" without a card: Triton's interpreter computes, the reference device stands in.

TRITON_INTERPRET=1 pytest -m gpu tests/engine/test_interpreted.py
"""

import os
import random
from dataclasses import replace

import pytest

from tests import checkpoints
from xllm import LLM, SamplingParams
from xllm.device import facts
from xllm.device.table import DEVICES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
]


@pytest.fixture
def stand_in(monkeypatch):
    def card():
        found = facts.reference_facts()
        return replace(found, name="cuda", preferences=replace(found.preferences, block_size=16))

    monkeypatch.setitem(DEVICES, "cuda", DEVICES["reference"])
    monkeypatch.setitem(facts.FACTS, "cuda", card)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.save_qwen3(tmp_path_factory.mktemp("qwen3"))


def generate(model, **options):
    rng = random.Random(0)
    prompts = [[rng.randrange(3, checkpoints.VOCAB) for _ in range(rng.randint(1, 60))] for _ in range(6)]
    params = [
        SamplingParams(
            temperature=temperature, top_p=top_p, top_k=top_k, seed=3, max_tokens=6, ignore_eos=True, logprobs=logprobs
        )
        for temperature, top_p, top_k, logprobs in (
            (0.0, 1.0, 0, None), (0.0, 1.0, 0, 2), (0.7, 0.8, 5, None), (1.0, 1.0, 0, None), (0.9, 0.7, 0, 1), (0.0, 1.0, 0, None),
        )
    ]  # fmt: skip
    with LLM(
        str(model), dtype="float32", threads=1, max_num_seqs=4, block_size=16, max_model_len=128, **options
    ) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [out.outputs[0].token_ids for out in outputs], llm.stats().executor


def test_the_kernels_together_give_the_tokens_of_the_cpu(model, stand_in, caplog):
    expected, _ = generate(model, device="cpu")
    tokens, steps = generate(model, device="cuda", cudagraph_capture_sizes=(1, 2, 4))
    assert tokens == expected
    assert steps.graph_steps > 0
    assert steps.graph_failures == 0
    tokens, steps = generate(model, device="cuda", enforce_eager=True)
    assert tokens == expected
    assert steps.graph_steps == 0
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
