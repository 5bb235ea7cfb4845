"""The same tokens, however the work is cut: the whole product of chunking, caching, overlap, company and preemption."""

import itertools
from typing import Any

import pytest

from tests.scheduler.rig import Rig, request

CHUNKS: dict[str, dict[str, Any]] = {
    "1": {"long_prefill_token_threshold": 1},
    "7": {"long_prefill_token_threshold": 7},
    "64": {"max_num_batched_tokens": 64},
    "whole": {"chunked_prefill": False},
}
PROMPTS = [[1] * 12 + [i % 3] * (i % 7 + 1) for i in range(16)]


@pytest.mark.parametrize(
    ("chunk", "caching", "depth", "company", "preempted"),
    list(itertools.product(CHUNKS, (True, False), (1, 2, 3), (1, 16), (False, True))),
)
def test_tokens_do_not_depend_on_how_they_were_made(chunk, caching, depth, company, preempted):
    rig = Rig(
        **{"max_num_batched_tokens": 4096, **CHUNKS[chunk]},
        depth=depth,
        prefix_caching=caching,
        max_num_seqs=16,
        num_blocks=24 if preempted else 256,
        max_model_len=64,
        check_every=False,
    )
    for i in range(company):
        rig.add(request(f"r{i}", PROMPTS[i], 16 + i, seed=i))
    if preempted and company == 1:
        for turns in (9, 3, 14):  # in its prompt or in its output, depending on the chunk
            for _ in range(turns):
                rig.turn()
            for running in list(rig.scheduler._running):
                rig.scheduler._preempt(running)
    rig.drain().check_outputs()
    assert (rig.scheduler.stats().preemptions > 0) == preempted
