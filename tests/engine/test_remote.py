"""A store that engines share: what one has computed another finds, and whatever happens to the store, tokens are right."""

import random
import time
from typing import Any

import pytest

from tests import checkpoints
from tests.engine.pools import EVERYWHERE
from tests.engine.test_equality import BLOCK
from tests.engine.test_tiers import (
    PARAMS,
    converse,
    engine,
    gib,
    replies,
    some_talks,
    tiers,
)
from xllm.core.errors import ConfigError
from xllm.executor import remote_mover, remote_tier
from xllm.executor.stores.directory import DirectoryStore
from xllm.kv.tiers.cost import Cost


@pytest.fixture(autouse=True)
def nothing_is_too_slow(monkeypatch):
    """As in `test_tiers`."""
    monkeypatch.setattr(Cost, "choose", lambda self, ways, _: 0 if ways else -1)
    monkeypatch.setattr(Cost, "worth_asking", lambda *_: True)
    monkeypatch.setattr("xllm.scheduler.lower_tiers.SAVING_SHARE", 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.save_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def talks():
    return some_talks(9)


@pytest.fixture(scope="module")
def truth(model, talks):
    return replies(model, talks)


def reply(llm: Any, prompt: list[int]) -> list[int]:
    return list(llm.generate([{"prompt_token_ids": prompt}], PARAMS, use_tqdm=False)[0].outputs[0].token_ids)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_the_first_prompt_of_another_engine_hits(model, talks, truth, tmp_path, backend):
    store: dict[str, Any] = {"kv_remote": f"file://{tmp_path}"}
    with engine(model, backend, **store) as first:
        assert converse(first, talks) == truth
        assert tiers(first)[-1].medium == "REMOTE"
        assert tiers(first)[-1].stored > 20
        with engine(model, backend, **store) as second:
            assert reply(second, talks[0][0]) == truth[0][0]
            host, remote = tiers(second)
            assert (host.hits, remote.hits) == (0, len(talks[0][0]) // BLOCK)
            assert second.stats().prefix_hit_tokens == remote.hits * BLOCK
            assert converse(second, talks) == truth
            assert [tier.failures for tier in tiers(second)] == [0, 0]


def test_an_engine_in_a_process_of_its_own(model, talks, truth, tmp_path):
    store: dict[str, Any] = {"kv_remote": f"file://{tmp_path}"}
    with engine(model, **store) as first:
        assert converse(first, talks) == truth
    with engine(model, separate_process=True, **store) as second:
        (out,) = second.generate([{"prompt_token_ids": talks[0][0]}], PARAMS, use_tqdm=False)
        assert out.outputs[0].token_ids == truth[0][0]
        assert out.num_cached_tokens == len(talks[0][0]) // BLOCK * BLOCK


def test_all_tiers_at_once(model, talks, truth, tmp_path):
    """Host memory and disk too small for it all, and a store."""
    store: dict[str, Any] = {"kv_remote": f"file://{tmp_path}/store"}
    with engine(model, **store) as llm:
        assert converse(llm, talks) == truth
    with engine(model, host=12, kv_disk_path=str(tmp_path / "disk"), kv_disk_size=gib(30), **store) as llm:
        assert converse(llm, talks) == truth
        host, disk, remote = tiers(llm)
        assert host.evicted > 0
        assert disk.hits > 0
        assert remote.hits > 5


def test_other_weights_do_not_take_what_is_there(model, talks, tmp_path_factory, tmp_path):
    store: dict[str, Any] = {"kv_remote": f"file://{tmp_path}"}
    with engine(model, **store) as llm:
        converse(llm, talks)
    changed = checkpoints.save_qwen3(tmp_path_factory.mktemp("other"), intermediate_size=96)
    with engine(changed, **store) as llm:
        llm.generate([{"prompt_token_ids": said[0]} for said in talks], PARAMS, use_tqdm=False)
        assert [(tier.hits, tier.failures) for tier in tiers(llm)] == [(0, 0), (0, 0)]


def test_every_file_damaged(model, talks, truth, tmp_path):
    store: dict[str, Any] = {"kv_remote": f"file://{tmp_path}"}
    with engine(model, **store) as llm:
        converse(llm, talks)
    rng = random.Random(1)
    for file in tmp_path.glob("*/??/*"):
        data = bytearray(file.read_bytes())
        match rng.randrange(4):
            case 0:
                data[rng.randrange(80)] ^= 1 << rng.randrange(8)
            case 1:
                data[rng.randrange(128, len(data))] ^= 1 << rng.randrange(8)
            case 2:
                del data[rng.randrange(len(data)) :]
            case 3:
                data = bytearray(
                    rng.choice([*tmp_path.glob("*/??/*")]).read_bytes()
                )  # often another's record
        file.write_bytes(data)
    with engine(model, **store) as llm:
        assert converse(llm, talks) == truth
        assert tiers(llm)[1].failures > 0


@pytest.mark.parametrize("backend", ["cpu", "graphs"])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_store_that_fails_now_and_then(model, talks, truth, tmp_path, monkeypatch, backend, seed):
    """Raises, hangs or loses in a third of all cases, and pauses are short."""
    rng = random.Random(seed)
    monkeypatch.setattr(remote_tier, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(remote_tier, "LONGEST_PAUSE_S", 0.002)
    monkeypatch.setattr(remote_tier, "LOOK_S", 0.1)
    monkeypatch.setattr(remote_tier, "CALL_S", 0.1)
    monkeypatch.setattr(remote_mover, "LEAST_PAUSE_S", 0.001)

    def sometimes(name: str, lost: Any) -> None:
        original = getattr(DirectoryStore, name)

        def call(self: DirectoryStore, keys: Any, *more: Any) -> Any:
            fate = rng.random()
            if fate < 0.1:
                raise OSError("down")
            if fate < 0.12:
                time.sleep(0.2)
            return lost(keys) if fate > 0.8 else original(self, keys, *more)

        monkeypatch.setattr(DirectoryStore, name, call)

    for name in ("get", "put", "exists"):
        sometimes(name, lambda keys: [False] * len(keys))
    for _ in range(2):
        with engine(model, backend, host=16, kv_remote=f"file://{tmp_path}") as llm:
            assert converse(llm, talks) == truth
            assert tiers(llm)[1].failures > 0


def test_a_store_that_dies_is_left_alone_and_costs_little(model, talks, truth, tmp_path, monkeypatch):
    store: dict[str, Any] = {"kv_remote": f"file://{tmp_path}"}
    with engine(model, **store) as llm:
        converse(llm, talks)
    calls = []

    def hangs(self: DirectoryStore, keys: Any, *more: Any) -> Any:
        calls.append(keys)
        time.sleep(20.0)

    monkeypatch.setattr(remote_tier, "LOOK_S", 0.2)
    monkeypatch.setattr(remote_tier, "CALL_S", 0.5)
    monkeypatch.setattr(remote_tier, "CLOSE_S", 0.1)
    with engine(model, **store) as llm:
        reply(llm, talks[0][0])
        for name in ("get", "put", "exists"):
            monkeypatch.setattr(DirectoryStore, name, hangs)
        assert converse(llm, talks) == truth
        assert 1 <= len(calls) <= 10


def test_a_forgotten_cache_is_forgotten_in_the_store_too(model, talks, truth, tmp_path):
    store: dict[str, Any] = {"kv_remote": f"file://{tmp_path}"}
    with engine(model, **store) as first, engine(model, **store) as second:
        converse(first, talks)
        second.reset_prefix_cache()
        assert reply(second, talks[0][0]) == truth[0][0]
        assert tiers(second)[1].hits == 0
        assert converse(second, talks) == truth


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"kv_remote": "redis://here"}, "there are file:// and mooncake://"),
        ({"kv_remote": "file:///proc/no/place"}, "cannot be kept in"),
    ],
)
def test_what_cannot_work_is_refused_at_start(model, asked, says):
    with pytest.raises(ConfigError, match=says):
        engine(model, **asked)
