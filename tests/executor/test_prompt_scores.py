import pytest
import torch

from xllm.core.plan import NewSequence
from xllm.core.sampling import SamplingParams
from xllm.executor.prompt_scores import PromptScores
from xllm.executor.sampling import Sampler


@pytest.mark.parametrize(
    ("wanted", "token_ids", "scored"),
    [(None, [1, 2, 3], False), (0, [1, 2, 3], True), (0, [1, 2, 3, 4], False)],
    ids=["unasked", "asked", "begun elsewhere or before a preemption"],
)
def test_whose_prompt_is_scored(wanted, token_ids, scored):
    tokens = torch.zeros((2, 8), dtype=torch.int64)
    scores = PromptScores(Sampler(max_num_seqs=2, vocab_size=9, tokens=tokens), lambda hidden: hidden, tokens)
    before = SamplingParams(prompt_logprobs=1)
    for params, ids in ((before, [1, 2]), (SamplingParams(prompt_logprobs=wanted), token_ids)):
        scores.admit(NewSequence(1, "r", ids, min(len(ids), 3), params, 0, (), [0]))
    assert scores.any_in([0, 1]) == scored
