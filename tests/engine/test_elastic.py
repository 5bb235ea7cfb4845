"""A pool whose memory comes and goes, through the engine: the same tokens, and no more memory than is used."""

from typing import Any

import pytest

from tests import checkpoints
from tests.engine.pools import BLOCK_BYTES, EVERYWHERE, LONGEST, OUTPUT, generate, some_prompts
from tests.engine.test_equality import BACKENDS, BLOCK
from xllm import LLM
from xllm.core.errors import ConfigError, InvalidRequest


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.save_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def prompts():
    return some_prompts()


@pytest.fixture(scope="module")
def truth(model, prompts):
    return checkpoints.greedy(model, prompts, OUTPUT)


def engine(model: Any, backend: str, *, blocks: int = 4096, depth: int = 2, **more: Any) -> LLM:
    return LLM(
        str(model), dtype="float32", max_model_len=LONGEST, block_size=BLOCK, max_num_seqs=8, threads=1, kv_pool="elastic",
        kv_cache_memory_bytes=blocks * BLOCK_BYTES, async_scheduling=depth, **BACKENDS[backend], **more,
    )  # fmt: skip


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("depth", [1, 2])
def test_the_same_tokens(model, prompts, truth, backend, depth):
    with engine(model, backend, depth=depth) as llm:
        for _ in range(2):
            assert generate(llm, prompts) == truth


def test_memory_follows_the_load(model, prompts, truth):
    """Little at start, more under load."""
    with engine(model, "cpu") as llm:
        generate(llm, prompts[:1])
        start = llm.stats().segments
        assert start is not None
        assert start.mapped < start.capacity // 2
        assert generate(llm, prompts) == truth
        loaded = llm.stats().segments
        assert loaded is not None
        assert loaded.most >= start.mapped


@pytest.mark.parametrize("backend", ["graphs", pytest.param("cuda-graphs", marks=pytest.mark.gpu)])
def test_sleep_gives_everything_back_and_waking_serves_again(model, prompts, truth, backend):
    with engine(model, backend, enable_sleep_mode=True) as llm:
        assert generate(llm, prompts) == truth
        llm.sleep()
        llm.wake_up()
        assert generate(llm, prompts) == truth
        segments = llm.stats().segments
        assert segments is not None
        assert segments.shrunk > 0


@pytest.mark.parametrize("backend", ["graphs", pytest.param("cuda-graphs", marks=pytest.mark.gpu)])
def test_a_limit_at_run_time_is_kept(model, prompts, truth, backend):
    segment = 4096 * BLOCK_BYTES // 16 if backend == "graphs" else 2 << 20
    with engine(model, backend) as llm:
        assert generate(llm, prompts) == truth
        llm.limit_kv_memory(segment)
        assert generate(llm, prompts) == truth
        assert llm.limit_kv_memory(segment) == segment
        llm.limit_kv_memory(None)
        assert generate(llm, prompts) == truth
        with pytest.raises(InvalidRequest, match="holds no sequence"):
            llm.limit_kv_memory(BLOCK_BYTES)


def test_only_an_elastic_pool_has_a_limit(model):
    llm = LLM(str(model), dtype="float32", device="cpu", kv_cache_memory_bytes=1 << 20)
    with llm, pytest.raises(InvalidRequest, match="elastic"):
        llm.limit_kv_memory(1 << 19)


def test_nobody_is_preempted_while_more_memory_can_come(model, prompts, truth):
    with engine(model, "graphs", blocks=2 * LONGEST // BLOCK) as llm:
        assert generate(llm, prompts) == truth
    with engine(model, "graphs") as llm:
        assert generate(llm, prompts) == truth
        assert llm.stats().preemptions == 0


@pytest.mark.parametrize("backend", ["cpu", "graphs"])
def test_with_tiers_below(model, prompts, truth, backend):
    with engine(model, backend, blocks=40, kv_offloading_size=400.5 * BLOCK_BYTES / 2**30) as llm:
        for _ in range(3):
            assert generate(llm, prompts) == truth
        assert llm.stats().tiers[0].stored > 20


def test_a_cache_smaller_than_its_segments_is_refused(model, monkeypatch):
    monkeypatch.setattr("xllm.executor.kv_memory.blocks_per_segment", lambda *_: 64)
    with pytest.raises(ConfigError, match="segments"):
        engine(model, "cpu", blocks=32)
