from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.config.test_resolve import DEVICE, GIB, decide
from xllm.config.facts import Preferences
from xllm.config.memory import fit_cache
from xllm.core.errors import ConfigError

CARD = replace(
    DEVICE,
    name="cuda",
    description="a card",
    preferences=Preferences(
        block_size=64, max_num_seqs=8, token_budget=2048, memory_share=1.0, graphs=True, measured=True
    ),
)


def test_a_card_leaves_the_size_of_its_cache_to_the_engine():
    config = decide(device=CARD)
    assert config.cache.num_blocks == 0
    assert config.cache.block_size == 64
    sized = fit_cache(config, GIB // 64, "as measured")
    assert sized.cache.num_blocks == GIB // 64 // config.cache.block_bytes
    assert sized.reasons[: len(config.reasons)] == config.reasons
    assert "as measured" in sized.reasons[-1]


def test_a_size_that_was_asked_for_needs_no_measuring():
    config = decide(device=CARD, kv_cache_memory_bytes=GIB)
    assert config.cache.num_blocks == GIB // config.cache.block_bytes


def test_weights_that_do_not_fit_are_refused_before_anything_starts():
    with pytest.raises(ConfigError, match="the weights take"):
        decide(device=replace(CARD, free_bytes=GIB // 2))


def test_a_length_that_was_asked_for_is_never_shortened():
    config = decide(device=CARD, max_model_len=4096)
    with pytest.raises(ConfigError, match="less than one sequence of 4096"):
        fit_cache(config, 4000 * 1024, "as measured")


@given(budget=st.integers(0, 64 * GIB), seqs=st.integers(1, 300), block=st.sampled_from([8, 16, 64]))
def test_never_more_than_the_budget_nor_than_can_be_used(budget, seqs, block):
    config = decide(device=CARD, max_num_seqs=seqs, block_size=block)
    try:
        sized = fit_cache(config, budget, "")
    except ConfigError:
        assert budget < 2 * config.cache.block_bytes
        return
    assert sized.cache.num_blocks * sized.cache.block_bytes <= budget
    assert sized.cache.num_blocks <= seqs * 4096 // block
    assert sized.scheduler.max_model_len == min(4096, sized.cache.num_blocks * block)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"cudagraph_capture_sizes": (1, 9)}, "between 1 and --max-num-seqs 8"),
        ({"cudagraph_capture_sizes": (0, 2)}, "between 1 and --max-num-seqs 8"),
        ({"cudagraph_capture_sizes": (2,), "enforce_eager": True}, "opposite things"),
    ],
)
def test_graph_sizes_that_cannot_be_are_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        decide(device=CARD, **options)


def test_graph_sizes():
    assert decide(device=CARD).executor.graph_sizes == (1, 2, 4, 8)
    assert decide(device=CARD, cudagraph_capture_sizes=(4, 2, 2)).executor.graph_sizes == (2, 4)
    assert decide(device=CARD, enforce_eager=True).executor.graph_sizes == ()
    assert decide(device=CARD, max_num_seqs=300).executor.graph_sizes[-2:] == (288, 300)
    assert decide().executor.graph_sizes == ()
    assert decide(enforce_eager=True).executor.graph_sizes == ()
    with pytest.raises(ConfigError, match="the device cpu has no graphs"):
        decide(cudagraph_capture_sizes=(1,))
