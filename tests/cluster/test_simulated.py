"""Policies against each other on the same traffic, four instances, in modelled time."""

from statistics import median

import pytest

from tests.cluster.simulator import Call, Instance, World
from tests.cluster.traces import conversations, strangers

SEEDS = (1, 2, 3, 4)


def play(policy: str, calls: list[Call], **targets: float) -> list[Call]:
    world = World(policy, [Instance(f"i{n}") for n in range(4)], **targets)
    world.run(calls)
    assert not world.shed and all(call.made == call.output_tokens for call in calls)
    assert all(view.active == view.queued_tokens == 0 or view.load.running for view in world.fleet)
    return calls


def ttfts(calls: list[Call]) -> list[float]:
    return sorted(call.first - call.at for call in calls)


def p99(values: list[float]) -> float:
    return values[len(values) * 99 // 100]


def hit_rate(calls: list[Call]) -> float:
    return sum(call.cached for call in calls) / sum(call.prompt_tokens for call in calls)


def shared_prompts(seed: int) -> list[Call]:
    """More system prompts than fit into one instance's cache."""
    return conversations(seed, sessions=150, turns=4, rate=16, systems=24, system_blocks=100)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("policy", ["prefix_aware", "slo_aware"])
def test_where_prefixes_dominate_the_first_token_comes_twice_as_soon(policy, seed):
    blind, aware = play("round_robin", shared_prompts(seed)), play(policy, shared_prompts(seed))
    assert hit_rate(aware) > 1.5 * hit_rate(blind)
    assert median(ttfts(aware)) < median(ttfts(blind)) / 2
    assert p99(ttfts(aware)) < p99(ttfts(blind))


@pytest.mark.parametrize("seed", SEEDS)
def test_conversations_go_where_they_were(seed):
    def calls() -> list[Call]:
        return conversations(seed, sessions=100, turns=6, rate=20, systems=6, system_blocks=20)

    blind, aware = play("round_robin", calls()), play("prefix_aware", calls())
    assert hit_rate(aware) > 1.25 * hit_rate(blind)
    assert median(ttfts(aware)) < 0.75 * median(ttfts(blind))
    assert p99(ttfts(aware)) < 1.05 * p99(ttfts(blind))


@pytest.mark.parametrize("rate", [8, 20, 40], ids=["light", "busy", "full"])
def test_without_prefixes_nothing_is_lost_to_least_loaded(rate):
    """Over all seeds; one trace at the edge of what the instances can take may go either way."""
    least = [play("least_loaded", strangers(seed, 400, rate)) for seed in SEEDS]
    aware = [play("prefix_aware", strangers(seed, 400, rate)) for seed in SEEDS]
    assert sum(sum(ttfts(calls)) for calls in aware) < 1.01 * sum(sum(ttfts(calls)) for calls in least)
    assert sum(p99(ttfts(calls)) for calls in aware) < 1.02 * sum(p99(ttfts(calls)) for calls in least)
    for ours, theirs in zip(aware, least, strict=True):
        assert max(call.end for call in ours) < 1.03 * max(call.end for call in theirs)


@pytest.mark.parametrize("seed", SEEDS)
def test_slo_aware_meets_more_targets_where_instances_differ(seed):
    def met(policy: str) -> int:
        instances = [Instance("a"), Instance("b")]
        instances += [Instance(id, token_s=240e-6, base_s=0.016) for id in "cd"]
        world, calls = World(policy, instances, ttft_s=0.15, tpot_s=0.03), strangers(seed, 400, 14)
        world.run(calls)
        return sum(
            call.first - call.at <= 0.15 and (call.end - call.first) / (call.made - 1) <= 0.03
            for call in calls
        )

    assert met("slo_aware") > 1.1 * met("least_loaded")
    assert met("slo_aware") > 1.1 * met("prefix_aware")
