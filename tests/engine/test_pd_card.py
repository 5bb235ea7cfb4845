"""KV from one engine to another on a card, with blocks as large as those of real models: every pool by every transport."""

import random
from typing import Any

import pytest

from tests import checkpoints
from tests.engine.dialling import until
from tests.engine.pd_pair import asked, member
from tests.executor.transports.giving import needs_nixl

BLOCK, OUTPUT = 64, 8
BLOCK_BYTES = 2 << 20
LENGTHS = (70, 64, 200, 321, 450)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.save_qwen3(
        tmp_path_factory.mktemp("qwen3"), max_position=640, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8,
        head_dim=128,
    )  # fmt: skip


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(12)
    return [rng.choices(range(3, checkpoints.VOCAB), k=length) for length in LENGTHS]


@pytest.fixture(scope="module")
def truth(model, prompts):
    return checkpoints.greedy(model, prompts, OUTPUT)


@pytest.mark.parametrize(
    ("backend", "pool", "transport"),
    [
        ("cpu", "paged", "tcp"),
        *(
            pytest.param("cuda-graphs", pool, transport, marks=[pytest.mark.gpu, *marks])
            for pool in ("paged", "elastic", "contiguous")
            for transport, marks in (("tcp", ()), ("auto", ()), ("nixl", (needs_nixl,)))
            if not (transport == "nixl" and pool != "paged")
        ),
    ],
)
def test_large_blocks_come_over(model, prompts, truth, backend, pool, transport):
    settings: dict[str, Any] = {
        "kv_pool": pool, "block_size": BLOCK, "max_model_len": 640, "max_num_batched_tokens": 128, "kv_cache_memory_bytes": 64 * BLOCK_BYTES,
    }  # fmt: skip
    with (
        member(model, transport, "p", backend, **settings) as p,
        member(model, transport, "d", backend, **settings) as d,
    ):
        ids = [f"r{i}" for i in range(len(prompts))]
        tokens, ends = d.run(
            *(asked(id, prompt, p.kv_from(), OUTPUT) for id, prompt in zip(ids, prompts, strict=True))
        )
        assert [ends[id].error for id in ids] == [None] * len(ids)
        assert [tokens[id] for id in ids] == truth
        assert d.stats.failures == {}
        assert d.stats.fetched_blocks == sum((length - 1) // BLOCK for length in LENGTHS)
        until(lambda: p.stats.provided_blocks == d.stats.fetched_blocks, "all is taken")
