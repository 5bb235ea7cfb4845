"""Copies of what an engine has cached, kept by its clients: a snapshot and what changes after it."""

import contextlib
import random

import pytest

from tests import checkpoints
from tests.engine.scripted import make_core, submit
from tests.engine.test_several_clients import WAIT_S, running
from xllm.config.options import EngineOptions
from xllm.engine.build import build_core, decide
from xllm.engine.core import EngineCore
from xllm.engine.kv_events import EventStream
from xllm.kv.events import DEVICE, DISK, HOST
from xllm.wire.channel import MemoryChannel
from xllm.wire.dial import Dial
from xllm.wire.doors import Listen
from xllm.wire.hub import Hub
from xllm.wire.kv_events import block_hash
from xllm.wire.messages import (
    Abort,
    FollowKv,
    KvChanges,
    Message,
    Reply,
    ResetPrefixCache,
    Sleep,
    WakeUp,
)

BLOCK = 8
Held = dict[str, set[int]]  # by tier


class Follower:
    """Joins with a Reply of `call_id`, and counts."""

    def __init__(self, call_id: int):
        self.call_id = call_id
        self.held: Held = {}
        self.next: int | None = None  # None: not there yet
        self.kinds: set[str] = set()

    def hear(self, message: Message | None) -> None:
        if isinstance(message, Reply) and message.call_id == self.call_id:
            assert message.refused is None
            self.next = message.value["number"]
            self.held = {medium: set(hashes) for medium, hashes in message.value["blocks"].items()}
        elif isinstance(message, KvChanges) and self.next is not None:
            assert message.number == self.next
            self.next += 1
            for change in message.changes:
                self.kinds.add(change.kind)
                tier = self.held.setdefault(change.medium, set())
                if change.kind == "cleared":
                    self.held = {}
                elif change.kind == "stored":
                    tier |= set(change.hashes)
                else:
                    assert tier.issuperset(change.hashes)
                    tier -= set(change.hashes)

    @property
    def tiers(self) -> Held:
        return {medium: hashes for medium, hashes in self.held.items() if hashes}


def cached_in(core: EngineCore) -> Held:
    """Looked up where prompts look it up."""
    pool, offload = core.scheduler.pool, core.scheduler.lower._offload
    found: Held = {DEVICE: set(), HOST: set(), DISK: set()}
    for block in range(pool.num_blocks):
        if (name := pool.index.name_of(block)) is not None:
            found[DEVICE].add(block_hash(name))
    for tier in () if offload is None else offload._tiers:
        for slot in range(tier.capacity):
            if (name := tier.name_of(slot)) is not None and tier.find(name) is not None:
                found[tier.medium].add(block_hash(name))
    return {medium: hashes for medium, hashes in found.items() if hashes}


def follow_at_random(core: EngineCore, front: MemoryChannel, source: random.Random, turns: int) -> set[str]:
    """After every turn every follower holds what the engine has; who follows comes at any moment."""
    followers: list[Follower] = []
    prefixes = [[source.randrange(3, 200) for _ in range(60)] for _ in range(6)]
    for turn in range(turns):
        id = f"r{turn}"
        dice = source.random()
        if dice < 0.4:
            prompt = [*source.choice(prefixes)[: source.randrange(1, 60)], turn % 100 + 3]
            front.send(submit(id, prompt, max_tokens=source.randrange(1, 12)))
        elif dice < 0.45:
            front.send(Abort(request_ids=[f"r{source.randrange(turn + 1)}"]))
        elif dice < 0.47:
            front.send(ResetPrefixCache(call_id=-turn))
        elif dice < 0.52 and not core.busy:
            front.send(Sleep(call_id=-turn))
            front.send(WakeUp(call_id=-turn))
        elif dice < 0.6 and len(followers) < 8:
            followers.append(Follower(turn + 1))
            front.send(FollowKv(call_id=turn + 1))
        core.turn(wait_s=0.0)
        while (message := front.receive(0.0)) is not None:
            for follower in followers:
                follower.hear(message)
        for follower in followers:
            assert follower.next is not None
            assert follower.tiers == cached_in(core)
    assert len(followers) > 3
    return set().union(*(follower.kinds for follower in followers))


@pytest.mark.parametrize("seed", range(8))
def test_a_follower_holds_what_the_pool_holds_at_every_moment(seed):
    stream = EventStream(None, BLOCK)
    core, front = make_core(events=stream, blocks=24)
    stream.cached = {DEVICE: core.scheduler.pool.index.names}
    try:
        kinds = follow_at_random(core, front, random.Random(seed), 400)
        assert kinds == {"stored", "removed", "cleared"}
        assert core.scheduler.stats().evictions > 0
    finally:
        core.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.save_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.mark.parametrize("seed", range(2))
def test_tiers_below_the_device_are_followed_too(model, tmp_path, seed, monkeypatch):
    monkeypatch.setattr("xllm.scheduler.lower_tiers.SAVING_SHARE", 1)
    block_bytes = BLOCK * 2 * 2 * 2 * 16 * 4
    asked = EngineOptions(
        model=str(model), dtype="float32", max_model_len=112, block_size=BLOCK, max_num_seqs=4, threads=1,
        kv_cache_memory_bytes=20 * block_bytes, kv_offloading_size=30.5 * block_bytes / 2**30,
        kv_disk_path=str(tmp_path), kv_disk_size=60.5 * block_bytes / 2**30, enable_sleep_mode=True, device="reference",
    )  # fmt: skip
    front, inbox = MemoryChannel.pair()
    core, _ = build_core(decide(asked), inbox, lambda _: None, {}, followed=True)
    try:
        follow_at_random(core, front, random.Random(seed), 500)
        assert core.last_stats is not None
        assert core.last_stats.kv_events.changes > 50
        assert core.last_stats.cached_blocks == len(cached_in(core).get(DEVICE, ()))
        host, disk = core.last_stats.tiers
        assert host.evicted > 0
        assert disk.stored > 0
    finally:
        core.close()


def test_an_engine_that_tells_nothing_says_so():
    core, front = make_core()
    front.send(FollowKv(call_id=3))
    core.turn(wait_s=0.0)
    reply = front.receive(0.0)
    assert isinstance(reply, Reply)
    assert "tells its clients nothing" in (reply.refused or "")
    core.close()


def test_over_a_hub_only_those_who_asked_hear_of_it(tmp_path):
    stream = EventStream(None, BLOCK)
    core, _ = make_core(events=stream)
    stream.cached = {DEVICE: core.scheduler.pool.index.names}
    with contextlib.closing(Hub([Listen(f"ipc://{tmp_path}/hub")])) as hub, contextlib.ExitStack() as stack:
        core.inbox = hub
        stack.enter_context(running(core))
        asks, other = (stack.enter_context(contextlib.closing(Dial(hub.addresses[0]))) for _ in range(2))
        assert asks.wait_ready(WAIT_S)
        assert other.wait_ready(WAIT_S)
        other.send(submit("before", [1] * 40, max_tokens=1))
        assert other.receive(WAIT_S) is not None
        follower = Follower(5)
        asks.send(FollowKv(call_id=5))
        follower.hear(asks.receive(WAIT_S))
        assert len(follower.held[DEVICE]) == 5
        other.send(submit("after", [2] * 40, max_tokens=1))
        for _ in range(2):  # a second one, so that the first one's changes are out
            heard = other.receive(WAIT_S)
            assert heard is not None
            assert not isinstance(heard, KvChanges)
            other.send(submit("more", [3] * 40, max_tokens=1))
        while len(follower.held[DEVICE]) < 10:
            message = asks.receive(WAIT_S)
            assert message is not None
            follower.hear(message)
