"""KV that one engine computes and another one goes on from: the same tokens as of one engine alone."""

import random
from typing import Any

import pytest

from tests import checkpoints
from tests.engine.dialling import until
from tests.engine.kv_in_process import Network
from tests.engine.pd_pair import asked, member
from tests.engine.pools import BLOCK_BYTES, EVERYWHERE
from tests.executor.transports.giving import needs_mooncake

BLOCK, OUTPUT = 8, 12


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.save_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def prompts():
    """Of several lengths around whole blocks; some begin alike."""
    rng = random.Random(11)
    shared = [rng.randrange(3, checkpoints.VOCAB) for _ in range(20)]
    own = [[rng.randrange(3, checkpoints.VOCAB) for _ in range(count)] for count in (5, 8, 9, 25, 41, 30)]
    return [shared[: 20 * (i % 2)] + tail[: 48 - 20 * (i % 2)] for i, tail in enumerate(own)]


@pytest.fixture(scope="module")
def truth(model, prompts):
    return checkpoints.greedy(model, prompts, OUTPUT)


def run_all(d, prompts, kv_from, prefix="r", **params):
    ids = [f"{prefix}{i}" for i in range(len(prompts))]
    tokens, ends = d.run(
        *(asked(id, p, kv_from, OUTPUT, **params) for id, p in zip(ids, prompts, strict=True))
    )
    assert all(end.error is None for end in ends.values())
    return [tokens[id] for id in ids]


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize(
    ("depth", "pool"), [(1, "paged"), (2, "paged"), (3, "paged"), (3, "elastic"), (2, "contiguous")]
)
def test_what_a_peer_computed_is_gone_on_from(model, prompts, truth, backend, depth, pool):
    settings: dict[str, Any] = {"async_scheduling": depth, "kv_pool": pool}
    if backend.startswith("cuda") and pool != "paged":
        pytest.skip("there pieces of memory are larger than this model's blocks, or not all there")
    transport = "tcp" if backend.startswith("cuda") else Network()
    with (
        member(model, transport, "p", backend, **settings) as p,
        member(model, transport, "d", backend, **settings) as d,
    ):
        assert run_all(d, prompts, p.kv_from()) == truth
        assert d.stats.fetched_blocks > 10
        assert d.stats.failures == {}
        until(lambda: p.stats.provided_blocks == d.stats.fetched_blocks, "all is taken")
        assert p.overall.generation_tokens <= len(prompts), "nothing is generated there"


@pytest.mark.parametrize("where", ["p", "d", "both"])
def test_prefixes_that_are_cached_are_not_sent_and_not_computed(model, prompts, truth, where):
    network = Network()
    with member(model, network, "p") as p, member(model, network, "d") as d:
        for one in (p, d):
            if one.name in where or where == "both":
                one.run(asked("before", prompts[3][:17], None, 1))
        computed = p.overall.prompt_tokens if where != "d" else 0
        assert run_all(d, prompts[3:4], p.kv_from()) == truth[3:4]
        blocks = (len(prompts[3]) - 1) // BLOCK
        assert d.stats.fetched_blocks == (blocks if where == "p" else blocks - 2)
        if where != "d":
            until(lambda: p.stats.provisions == 1, "it has ended")
            assert p.overall.prompt_tokens - computed == len(prompts[3]) - 16


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_prompts_come_in_chunks_on_either_side(model, prompts, truth, chunk):
    network = Network()
    chunked = {"long_prefill_token_threshold": chunk}
    with member(model, network, "p", **chunked) as p, member(model, network, "d") as d:
        assert run_all(d, prompts, p.kv_from()) == truth
        assert len(network.readings) > 6, "what is there is read while the rest is computed"
    with member(model, network, "p") as p, member(model, network, "d", **chunked) as d:
        assert run_all(d, prompts, p.kv_from()) == truth


@pytest.mark.parametrize("backend", ["cpu", "graphs"])
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.9, "top_p": 0.95, "seed": 5},
        {"temperature": 0.9, "top_k": 20, "min_p": 0.01, "seed": 6, "logprobs": 2},
        {
            "repetition_penalty": 1.5,
            "presence_penalty": 1.0,
            "logit_bias": {7: 5.0},
            "seed": 1,
            "temperature": 1.0,
        },
        {"bad_words_token_ids": [[5], [9, 4]], "min_tokens": 3, "stop_token_ids": [*range(3, 67)]},
    ],
    ids=["seeded", "logprobs", "penalties", "stops"],
)
def test_sampled_tokens_are_those_of_one_engine(model, prompts, backend, sampling):
    network = Network()
    with member(model, network, "p", backend) as p, member(model, network, "d", backend) as d:
        alone = run_all(p, prompts, None, "alone", **sampling)
        p.core.scheduler.pool.reset_cache()
        assert run_all(d, prompts, p.kv_from(), **sampling) == alone
        assert d.stats.fetched_blocks > 0


def test_a_third_engine_that_only_has_it_is_asked_for_no_more(model, prompts, truth):
    network = Network()
    with member(model, network, "has") as has, member(model, network, "d") as d:
        run_all(has, prompts[:3], None)
        computed = has.overall.prompt_tokens
        assert run_all(d, prompts, has.kv_from(compute=False)) == truth
        assert has.overall.prompt_tokens == computed
        assert 0 < d.stats.fetched_blocks < sum((len(p) - 1) // BLOCK for p in prompts)
        assert d.stats.failures == {}


def test_what_a_third_engine_has_in_host_memory_comes_up_for_a_peer(model, prompts, truth):
    network = Network()
    little: dict[str, Any] = {"kv_cache_memory_bytes": 12 * BLOCK_BYTES, "kv_offloading_size": 0.01}
    with member(model, network, "has", **little) as has, member(model, network, "d") as d:
        offload = has.core.scheduler.lower._offload
        assert offload is not None
        offload.cost.choose = lambda ways, block_size: 0 if ways else -1  # type: ignore[method-assign]
        for prompt in [*prompts[3:], *prompts[:3]]:
            run_all(has, [prompt], None)
        computed = has.overall.prompt_tokens
        assert run_all(d, prompts[3:4], has.kv_from(compute=False)) == truth[3:4]
        assert d.stats.fetched_blocks == (len(prompts[3]) - 1) // BLOCK
        assert has.overall.prompt_tokens == computed
        assert has.overall.tiers[0].hits > 0


def test_the_first_output_tells_what_came_from_a_peer(model, prompts):
    network = Network()
    with member(model, network, "p") as p, member(model, network, "d") as d:
        _, ends = d.run(asked("one", prompts[3], p.kv_from(), 1))
        end = ends["one"]
        assert end.num_cached_tokens == end.fetched_tokens == (len(prompts[3]) - 1) // BLOCK * BLOCK
        assert end.fetch_s > 0.0
        assert d.stats.fetched_bytes == d.stats.fetched_blocks * 4096


def test_both_give_and_fetch_at_once(model, prompts, truth):
    network = Network()
    with member(model, network, "a") as a, member(model, network, "b") as b:
        for i, prompt in enumerate(prompts):
            a.dial.send(asked(f"x{i}", prompt, b.kv_from()))
        assert run_all(b, [prompt[::-1] for prompt in prompts], a.kv_from(), "y")
        until(a.at_rest, "a")
        assert run_all(a, prompts, None, "z") == truth
        assert a.stats.fetches > 0 < b.stats.fetches


@pytest.mark.parametrize(
    ("transport", "pool"),
    [
        ("tcp", "paged"),
        pytest.param("mooncake", "paged", marks=needs_mooncake),
        pytest.param("mooncake", "elastic", marks=needs_mooncake),
        pytest.param("mooncake", "contiguous", marks=needs_mooncake),
    ],
)
def test_over_tcp(model, prompts, truth, transport, pool):
    with (
        member(model, transport, "p", kv_pool=pool) as p,
        member(model, transport, "d", kv_pool=pool) as d,
    ):
        assert run_all(d, prompts, p.kv_from()) == truth
        assert d.stats.failures == {}
        assert d.stats.fetched_blocks > 10


def test_who_shares_kv_does_not_sleep(model):
    with member(model, Network(), "p") as p:
        assert "cannot sleep" in (p.core._sleep() or "")
