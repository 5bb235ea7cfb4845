"""Sequences that see their KV at addresses of their own, through the engine: the same tokens, whatever is mapped where."""

from typing import Any

import pytest

from tests import checkpoints
from tests.engine.pools import BLOCK_BYTES, EVERYWHERE, LONGEST, OUTPUT, PARAMS, generate, some_prompts
from tests.engine.test_equality import BACKENDS, BLOCK, GRANULE
from xllm import LLM
from xllm.core.errors import ConfigError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.save_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def prompts():
    return some_prompts()


@pytest.fixture(scope="module")
def truth(model, prompts):
    return checkpoints.greedy(model, prompts, OUTPUT)


def engine(model: Any, backend: str, *, blocks: int = 256, depth: int = 2, **more: Any) -> LLM:
    each = max(BLOCK_BYTES, GRANULE[BACKENDS[backend]["device"]])
    return LLM(
        str(model), dtype="float32", max_model_len=LONGEST, block_size=BLOCK, max_num_seqs=8, threads=1,
        kv_pool="contiguous", kv_cache_memory_bytes=blocks * each, async_scheduling=depth,
        **BACKENDS[backend], **more,
    )  # fmt: skip


def places(llm: LLM) -> Any:
    found = llm.stats().executor.places
    assert found is not None
    return found


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("depth", [1, 2])
def test_the_same_tokens(model, prompts, truth, backend, depth):
    with engine(model, backend, depth=depth) as llm:
        for _ in range(2):
            assert generate(llm, prompts) == truth
        assert places(llm).mapped > 0


@pytest.mark.parametrize("backend", ["cpu", "graphs", pytest.param("cuda-graphs", marks=pytest.mark.gpu)])
def test_under_pressure(model, prompts, truth, backend):
    with engine(model, backend, blocks=2 * LONGEST // BLOCK) as llm:
        for _ in range(2):
            assert generate(llm, prompts) == truth
        assert llm.stats().preemptions > 0


@pytest.mark.parametrize("backend", ["graphs", pytest.param("cuda-graphs", marks=pytest.mark.gpu)])
def test_sleep_gives_everything_back_and_waking_serves_again(model, prompts, truth, backend):
    with engine(model, backend, enable_sleep_mode=True) as llm:
        for _ in range(2):
            assert generate(llm, prompts) == truth
            llm.sleep()
            llm.wake_up()
        assert generate(llm, prompts) == truth


@pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda-graphs", marks=pytest.mark.gpu)])
def test_with_tiers_below(model, prompts, truth, backend):
    with engine(model, backend, blocks=40, kv_offloading_size=400.5 * BLOCK_BYTES / 2**30) as llm:
        for _ in range(3):
            assert generate(llm, prompts) == truth
        assert llm.stats().tiers[0].stored > 20


def test_nothing_is_mapped_for_the_next_request_of_that_size(model, prompts, truth):
    with engine(model, "cpu", enable_prefix_caching=False) as llm:
        for _ in range(8):
            generate(llm, prompts[:1])
        before = places(llm).mapped
        for _ in range(5):
            assert generate(llm, prompts[:1]) == truth[:1]
        assert places(llm).mapped == before


def test_a_block_is_whole_pages_where_nobody_asks_otherwise(model):
    llm = LLM(str(model), dtype="float32", kv_pool="contiguous", device="cpu", kv_cache_memory_bytes=1 << 22)
    with llm:
        cache = llm.config.cache
        assert cache.page_bytes == cache.block_bytes == 16 * 512
    with LLM(
        str(model),
        dtype="float32",
        kv_pool="contiguous",
        device="cpu",
        kv_cache_memory_bytes=1 << 22,
        block_size=8,
    ) as llm:
        assert llm.config.cache.page_bytes == 4096


def test_more_addresses_than_kernels_can_count_are_refused(model, monkeypatch):
    monkeypatch.setattr("xllm.executor.contiguous.MOST_ROWS", 1 << 12)
    with pytest.raises(ConfigError, match="addresses"):
        engine(model, "cpu")


@pytest.mark.parametrize("backend", ["cpu", "graphs"])
def test_a_page_that_cannot_be_mapped_fails_the_step_and_the_engine_lives(
    model, prompts, truth, backend, monkeypatch
):
    from xllm.device.pages_cpu import CpuPages

    plain, refusing = CpuPages.map, [False]

    def refuse(self, place, pages, *, replace=False):
        if refusing[0] and place >= 256:
            raise MemoryError("no more mappings")
        plain(self, place, pages, replace=replace)

    monkeypatch.setattr(CpuPages, "map", refuse)
    with engine(model, backend) as llm:
        assert generate(llm, prompts) == truth
        refusing[0] = True
        unlike = [{"prompt_token_ids": [7 + i] * (90 - 20 * i)} for i in range(4)]
        failed = llm.generate(unlike, PARAMS, use_tqdm=False)
        assert {out.outputs[0].finish_reason for out in failed} == {"error"}
        refusing[0] = False
        assert generate(llm, prompts) == truth
