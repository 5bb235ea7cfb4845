"""KV comes wrong, late, twice or not at all, at rates of some per cent of all readings, between processes at load: no wrong
token. At length instances die in the midst of it, too."""

import random

import pytest

from tests.faults.load import Load
from tests.faults.pd import TOKENS, known, metrics, prompts, total, until_at_rest
from tests.faults.rig import EAGER, Cluster, cluster, go_on, kill, stop_the_world, until
from tests.server.command import url_of

ROLES = {"p": "prefill", "d1": "decode", "d2": "decode"}
RATES = {"drop": 0.01, "delay": 0.04, "corrupt": 0.05, "swap": 0.05, "reorder": 0.05, "double": 0.04, "break": 0.03}  # fmt: skip
SMALL_STEPS = ("--max-num-batched-tokens", "192")  # a prompt comes in several readings
LENGTHS = (20, 500, 1000, 300, 800, 60, 450, 700)
REQUESTS, MANY = 200, 10_000


def start(made: Cluster) -> dict[str, str]:
    rates = "&".join(f"{kind}={rate}" for kind, rate in RATES.items())
    flags = (*SMALL_STEPS, "--kv-transport", f"faulty:tcp?{rates}&seed=3")
    return made.real(*ROLES, flags=flags, roles=ROLES)


def failed(urls: dict[str, str]) -> float:
    return total([urls["d1"], urls["d2"]], "kv_peer_fetch_failures_total")


@pytest.mark.timeout(120)
def test_random_faults_of_the_transport():
    with cluster() as made:
        urls = start(made)
        questions = known(urls["p"], prompts(4, LENGTHS, 320), 24)
        router = made.router(cli=EAGER)
        router.until_serving(*ROLES)
        salts = [f"{i}" for i in range(REQUESTS // 2)]
        with Load(router.url, questions, 12, most=TOKENS, salts=salts) as load:
            load.until_answered(REQUESTS, 60)
        load.check(REQUESTS // 4)
        assert router.told()["counts"]["moves"] == 0, "nobody is blamed for a peer that is slow"
        until_at_rest(urls.values())
        assert metrics(urls["p"])["kv_peer_provided_blocks_total"] > 200
        assert failed(urls) >= 5


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_requests_while_instances_die_too():
    """Small caches: what is fetched is thrown out and fetched anew."""
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    with cluster() as made:
        urls = start(made)
        questions = known(urls["p"], prompts(seed, LENGTHS * 3, 320))
        router = made.router(cli=EAGER)
        router.until_serving(*ROLES)
        salts = [f"{i}" for i in range(MANY // 2)]
        with Load(router.url, questions, 12, most=TOKENS, salts=salts) as load:
            while load.seen.answered.total() < MANY:
                load.until_answered(MANY // 50, 300)
                victim = chance.choice(list(ROLES))
                stopped = chance.random() < 0.5
                print(f"seed {seed}: {load.seen.answered.total()} answered, {victim} {stopped=}")
                if stopped:
                    stop_the_world(made.instances[victim])
                    until(lambda: victim not in router.serving(), "it is noticed")  # noqa: B023
                    load.until_answered(8, 60)
                    go_on(made.instances[victim])
                else:
                    kill(made.instances[victim])
                    made.restart(victim)
                    urls[victim] = url_of(made.instances[victim])
                router.until_serving(*ROLES, timeout_s=60)
        print(load.seen)
        load.check(MANY // 4)
        until_at_rest(urls.values())
