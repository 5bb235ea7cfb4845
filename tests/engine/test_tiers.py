"""KV in host memory and on disk, through the engine: the same tokens as without, whatever happens below the device."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests import checkpoints
from tests.engine.pools import BLOCK_BYTES, EVERYWHERE, LONGEST
from tests.engine.test_equality import BACKENDS, BLOCK
from xllm import LLM, SamplingParams
from xllm.core.errors import ConfigError
from xllm.core.transfer import TierStats
from xllm.executor.disk_tier import DiskTier
from xllm.executor.host_tier import HostTier
from xllm.kv.tiers.cost import Cost

ROUNDS, TALKS, OUTPUT = 4, 6, 6
PARAMS = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)


def some_talks(seed: int) -> list[list[list[int]]]:
    """What users say in each round of their conversations; all begin with the same 20 tokens."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, checkpoints.VOCAB) for _ in range(20)]
    return [
        [
            (shared if i == 0 else [])
            + [rng.randrange(3, checkpoints.VOCAB) for _ in range(rng.randint(3, 14))]
            for i in range(ROUNDS)
        ]
        for _ in range(TALKS)
    ]


def replies(model: Path, talks: list[list[list[int]]]) -> list[list[list[int]]]:
    """[round][talk]: the reply."""
    histories: list[list[int]] = [[] for _ in talks]
    found = []
    for i in range(ROUNDS):
        for history, said in zip(histories, talks, strict=True):
            history += said[i]
        found.append(checkpoints.greedy(model, histories, OUTPUT))
        for history, reply in zip(histories, found[-1], strict=True):
            history += reply
    return found


@pytest.fixture(autouse=True)
def nothing_is_too_slow(monkeypatch):
    """So small a model computes a block as fast as it is loaded, or faster: what is decided would hang on the machine."""
    monkeypatch.setattr(Cost, "choose", lambda self, ways, _: 0 if ways else -1)
    monkeypatch.setattr("xllm.scheduler.lower_tiers.SAVING_SHARE", 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.save_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def talks():
    return some_talks(8)


@pytest.fixture(scope="module")
def truth(model, talks):
    return replies(model, talks)


def gib(blocks: int) -> float:
    return (blocks + 0.5) * BLOCK_BYTES / 2**30


def engine(model: Any, backend: str = "graphs", *, host: int = 400, device: int = 20, depth: int = 2, **more: Any) -> LLM:  # fmt: skip
    """A device that holds one long sequence and a bit; `host` blocks below it."""
    return LLM(
        str(model), dtype="float32", max_model_len=LONGEST, block_size=BLOCK, max_num_seqs=4, threads=1,
        kv_cache_memory_bytes=device * BLOCK_BYTES, kv_offloading_size=gib(host), async_scheduling=depth,
        **BACKENDS[backend], **more,
    )  # fmt: skip


def converse(llm: LLM, talks: Any, at_once: int = 3) -> list[list[list[int]]]:
    """Round by round, some conversations at a time, so that the device forgets the others meanwhile."""
    histories: list[list[int]] = [[] for _ in talks]
    replies = []
    for i in range(ROUNDS):
        for history, said in zip(histories, talks, strict=True):
            history += said[i]
        said = []
        for first in range(0, len(histories), at_once):
            prompts = [{"prompt_token_ids": history} for history in histories[first : first + at_once]]
            said += [list(out.outputs[0].token_ids) for out in llm.generate(prompts, PARAMS, use_tqdm=False)]
        for history, reply in zip(histories, said, strict=True):
            history += reply
        replies.append(said)
    return replies


def tiers(llm: LLM) -> list[TierStats]:
    return list(llm.stats().tiers)


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("depth", [1, 2])
def test_conversations_come_back_from_host_memory(model, talks, truth, backend, depth):
    with engine(model, backend, depth=depth) as llm:
        assert converse(llm, talks) == truth
        (host,) = tiers(llm)
        assert host.hits > 20
        assert host.stored > 20
        assert (host.failures, host.skipped, host.evicted) == (0, 0, 0)
        assert llm.stats().evictions > 0
        assert llm.stats().prefix_hit_tokens >= host.hits * BLOCK // 2


@pytest.mark.parametrize("backend", ["cpu", "graphs"])
def test_a_small_tier_gives_up_the_least_recently_used(model, talks, truth, backend):
    with engine(model, backend, host=12) as llm:
        assert converse(llm, talks) == truth
        (host,) = tiers(llm)
        assert host.evicted > 0
        assert host.used <= 12


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_the_disk_serves_after_a_restart(model, talks, truth, tmp_path, backend):
    disk: dict[str, Any] = {"kv_disk_path": str(tmp_path), "kv_disk_size": gib(400)}
    with engine(model, backend, host=24, **disk) as llm:
        assert converse(llm, talks) == truth
        assert tiers(llm)[1].stored > 20
    with engine(model, backend, host=24, **disk) as llm:
        first = {"prompt_token_ids": talks[0][0]}
        assert llm.generate([first], PARAMS, use_tqdm=False)[0].outputs[0].token_ids == truth[0][0]
        assert tiers(llm)[1].hits == len(talks[0][0]) // BLOCK
        assert converse(llm, talks) == truth
        assert tiers(llm)[1].hits > 10


def test_other_weights_do_not_take_what_is_there(model, talks, tmp_path_factory, tmp_path):
    disk: dict[str, Any] = {"kv_disk_path": str(tmp_path), "kv_disk_size": gib(400)}
    with engine(model, host=24, **disk) as llm:
        converse(llm, talks)
    changed = checkpoints.save_qwen3(tmp_path_factory.mktemp("other"), intermediate_size=96)
    with engine(changed, host=24, **disk) as llm:
        llm.generate([{"prompt_token_ids": said[0]} for said in talks], PARAMS, use_tqdm=False)
        assert [(tier.hits, tier.failures) for tier in tiers(llm)] == [(0, 0), (0, 0)]


@pytest.mark.parametrize("backend", ["cpu", "graphs"])
@pytest.mark.parametrize("seed", [1, 2])
def test_damage_below_the_device_never_reaches_a_token(
    model, talks, truth, tmp_path, monkeypatch, backend, seed
):
    """Host memory that turns out damaged, records that cannot be read or written, in a third of all cases."""
    rng = random.Random(seed)

    def sometimes(owner: type, name: str, otherwise: Any) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: original(*given) if rng.random() > 0.3 else otherwise)

    sometimes(HostTier, "check", False)
    sometimes(DiskTier, "read", None)
    sometimes(DiskTier, "write", False)
    with engine(model, backend, host=16, kv_disk_path=str(tmp_path), kv_disk_size=gib(400)) as llm:
        assert converse(llm, talks) == truth
        host, disk = tiers(llm)
        assert disk.failures > 0
        assert host.hits + disk.hits > 0


def test_a_flipped_bit_in_host_memory_is_noticed(model, talks, truth, monkeypatch):
    """For real: the bytes change behind the tier's back, and its checksum tells."""
    seal, sealed = HostTier.seal, []

    def flipping(self: HostTier, slot: int, name: bytes, known: int | None = None) -> None:
        seal(self, slot, name, known)
        sealed.append(slot)
        if len(sealed) % 3 == 0:
            self.array(slot)[17] ^= 4

    monkeypatch.setattr(HostTier, "seal", flipping)
    with engine(model) as llm:
        assert converse(llm, talks) == truth
        (host,) = tiers(llm)
        assert host.failures > 0


def test_forgotten_caches_are_forgotten_below_too(model, talks, truth):
    with engine(model) as llm:
        converse(llm, talks)
        llm.reset_prefix_cache()
        hits = tiers(llm)[0].hits
        assert converse(llm, talks)[0] == truth[0]
        first = tiers(llm)[0]
        assert first.used > 0
        llm.reset_prefix_cache()
        assert tiers(llm)[0].hits >= hits


@pytest.mark.parametrize("backend", ["graphs", pytest.param("cuda-graphs", marks=pytest.mark.gpu)])
def test_what_lies_in_host_memory_outlasts_sleep(model, talks, truth, backend):
    with engine(model, backend, enable_sleep_mode=True) as llm:
        assert converse(llm, talks) == truth
        llm.sleep()
        llm.wake_up()
        hits = tiers(llm)[0].hits
        assert converse(llm, talks) == truth
        assert tiers(llm)[0].hits > hits + 20


def test_more_host_memory_than_is_free_is_refused_at_start(model):
    with pytest.raises(ConfigError, match="host memory are asked for"):
        engine(model, host=int(2**44 / BLOCK_BYTES))
