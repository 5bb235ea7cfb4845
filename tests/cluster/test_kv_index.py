import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.cluster.kv_index import TIERS, KvIndex
from xllm.cluster.view import Ask
from xllm.config.decided import KvEventsConfig
from xllm.engine.kv_events import EventStream
from xllm.kv import hashing
from xllm.kv.events import DEVICE, DISK, HOST, Origin
from xllm.kv.pool import BlockPool
from xllm.wire.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch, decode

EPOCH = 7


def stored(*hashes: int, medium: str | None = DEVICE, epoch: int = EPOCH) -> BlockStored:
    return BlockStored(hashes, None, [], 4, None, medium, None, epoch=epoch)


def removed(*hashes: int, medium: str | None = DEVICE, epoch: int = EPOCH) -> BlockRemoved:
    return BlockRemoved(hashes, medium, epoch=epoch)


def batch(*events: BlockStored | BlockRemoved | AllBlocksCleared) -> KVEventBatch:
    return KVEventBatch(0.0, events)


@pytest.fixture
def index() -> KvIndex:
    return KvIndex()


def test_each_instance_has_its_longest_prefix(index):
    assert index.apply("a", 0, batch(stored(1, 2, 3)))
    assert index.apply("b", 0, batch(stored(1, 2), stored(4)))
    assert index.apply("c", 0, batch(stored(2, 3, 4)))
    assert index.longest([1, 2, 3, 4]) == {"a": (3, 0, 0), "b": (2, 0, 0)}
    assert index.longest([1, 2]) == {"a": (2, 0, 0), "b": (2, 0, 0)}
    assert index.longest([2]) == {"a": (1, 0, 0), "b": (1, 0, 0), "c": (1, 0, 0)}
    assert index.longest([9, 1]) == index.longest([]) == {}
    assert len(index) == 4


def test_an_instance_that_dropped_out_does_not_come_back(index):
    index.apply("a", 0, batch(stored(1, 3)))
    index.apply("b", 0, batch(stored(1, 2, 3)))
    assert index.longest([1, 2, 3]) == {"a": (1, 0, 0), "b": (3, 0, 0)}


def test_a_block_counts_in_the_nearest_tier_that_has_it(index):
    index.apply("a", 0, batch(stored(1, 2), stored(2, 3, medium=HOST), stored(1, 2, 3, 4, medium=DISK)))
    assert index.longest([1, 2, 3, 4, 5]) == {"a": (2, 1, 1)}
    assert index.totals("a") == (2, 2, 4)
    index.apply("a", 1, batch(removed(1), removed(3, medium=HOST)))
    assert index.longest([1, 2, 3, 4, 5]) == {"a": (1, 0, 3)}
    index.apply("a", 2, batch(removed(1, medium=DISK)))
    assert index.longest([1, 2, 3, 4, 5]) == {}
    assert index.totals("a") == (1, 1, 3)


def test_a_medium_without_a_name_is_the_device_and_an_unknown_one_is_passed_over(index):
    assert index.apply(
        "a", 0, batch(stored(1, medium=None), stored(2, medium="TAPE"), removed(1, medium="TAPE"))
    )
    assert index.longest([1, 2]) == {"a": (1, 0, 0)}


def test_what_is_told_twice_or_was_never_there_changes_nothing(index):
    index.apply("a", 0, batch(stored(1, 1), removed(5)))
    index.apply("a", 0, batch(removed(1)))
    assert index.totals("a") == (1, 0, 0)
    index.apply("a", 1, batch(removed(1), removed(1)))
    assert index.totals("a") == (0, 0, 0) and len(index) == 0


def test_a_gap_hides_the_instance_until_the_missing_batches_came(index):
    index.apply("a", 0, batch(stored(1)))
    index.apply("b", 0, batch(stored(1)))
    assert not index.apply("a", 2, batch(stored(3)))
    assert not index.known("a") and index.wanted("a") == 1
    assert index.longest([1]) == {"b": (1, 0, 0)}
    assert not index.apply("a", 0, batch(stored(1)))  # known already, and does not fill the gap
    assert index.apply("a", 1, batch(stored(2)))
    assert index.apply("a", 2, batch(stored(3)))
    assert index.known("a") and index.wanted("a") == 3
    assert index.longest([1, 2, 3]) == {"a": (3, 0, 0), "b": (1, 0, 0)}


def test_a_snapshot_ends_a_gap_too(index):
    index.apply("a", 0, batch(stored(1)))
    assert not index.apply("a", 9, batch(stored(3)))
    index.reset("a", EPOCH, 10, {DEVICE: [5, 6], HOST: [7], "TAPE": [8]})
    assert index.known("a") and index.longest([1]) == {}
    assert index.longest([5, 6, 7, 8]) == {"a": (2, 1, 0)}
    assert index.apply("a", 9, batch(stored(3)))  # the snapshot has it
    assert index.longest([3]) == {}
    assert index.apply("a", 10, batch(removed(6)))
    assert index.longest([5, 6, 7]) == {"a": (1, 0, 0)}


def test_who_comes_late_has_to_catch_up(index):
    assert not index.apply("a", 5, batch(stored(1)))
    assert "a" in index and index.wanted("a") == 0
    for number in range(5):
        assert index.apply("a", number, batch(stored(10 + number)))
    assert index.apply("a", 5, batch(stored(1)))
    assert index.totals("a") == (6, 0, 0)


def test_a_later_epoch_is_another_cache(index):
    index.apply("a", 0, batch(stored(1)))
    assert index.apply("a", 0, batch(AllBlocksCleared(epoch=8), stored(2, epoch=8)))
    assert index.longest([1]) == {} and index.longest([2]) == {"a": (1, 0, 0)}
    assert index.apply("a", 1, batch(stored(1)))  # of the epoch before: late, and meaningless
    assert index.wanted("a") == 1 and index.longest([1]) == {}
    assert not index.apply("a", 1, batch(stored(3, epoch=9)))  # batch 0 of epoch 9 is missing
    assert index.totals("a") == (0, 0, 0)


def test_dropping_an_instance_leaves_the_others_and_frees_its_place(index):
    for id in "abc":
        index.apply(id, 0, batch(stored(1, 2), stored(2, medium=HOST)))
    index.drop("b")
    index.drop("b")
    assert "b" not in index and not index.known("b") and index.wanted("b") == 0
    assert index.totals("b") == (0, 0, 0)
    assert index.longest([1, 2]) == {"a": (2, 0, 0), "c": (2, 0, 0)}
    index.apply("d", 0, batch(stored(2)))
    assert index.longest([2]) == {"a": (1, 0, 0), "c": (1, 0, 0), "d": (1, 0, 0)}
    for id in "acd":
        index.drop(id)
    assert len(index) == 0 and index.longest([1, 2]) == {}


def test_what_was_removed_is_not_dropped_again(index):
    index.apply("a", 0, batch(stored(1, 2), stored(2, medium=HOST)))
    index.apply("b", 0, batch(stored(1)))
    index.apply("a", 1, batch(removed(1, 2)))
    index.drop("a")
    assert len(index) == 1 and index.longest([1]) == {"b": (1, 0, 0)}
    index.apply("b", 1, batch(removed(1)))
    index.apply("b", 2, batch(AllBlocksCleared(epoch=EPOCH)))
    assert len(index) == 0


def test_all_blocks_cleared_clears_every_tier(index):
    index.apply("a", 0, batch(stored(1), stored(1, medium=HOST), AllBlocksCleared(epoch=EPOCH), stored(2)))
    assert index.totals("a") == (1, 0, 0) and index.longest([1]) == {}


def test_what_an_engine_publishes_is_found_by_what_a_router_computes(tmp_path):
    """From a real block pool through the bytes on the wire."""
    stream = EventStream(KvEventsConfig(f"ipc://{tmp_path}/live", True, None, "", 10, 10, 10), 4)
    pool = BlockPool(8, 4, events=stream.log)
    index, number = KvIndex(), itertools.count()

    def publish() -> bool:
        return index.apply("a", next(number), decode(stream._encode((0.0, stream.log.drain()))))

    tokens = list(range(100, 119))
    names = hashing.chain(hashing.root("tenant"), tokens, 4)
    blocks = pool.allocate(4)
    assert blocks is not None
    for i, (block, name) in enumerate(zip(blocks, names, strict=True)):
        pool.publish(block, name, Origin(names[i - 1] if i else None, tokens[4 * i : 4 * i + 4], "tenant"))
    try:
        assert publish() and index.known("a")
        assert index.longest(Ask.of("r", tokens, 4, "tenant").hashes) == {"a": (4, 0, 0)}
        assert index.longest(Ask.of("r", tokens[:16], 4, "tenant").hashes) == {
            "a": (3, 0, 0)
        }  # the last is computed
        assert index.longest(Ask.of("r", tokens, 4).hashes) == {}
        pool.withdraw(blocks[2])
        assert publish()
        assert index.longest(Ask.of("r", tokens, 4, "tenant").hashes) == {"a": (2, 0, 0)}
    finally:
        stream.close()


class Plain:
    """The same, as sets: per instance and tier the blocks it holds."""

    def __init__(self) -> None:
        self.held: dict[str, dict[str, set[int]]] = {}

    def longest(self, hashes: list[int]) -> dict[str, tuple[int, ...]]:
        answer = {}
        for id, tiers in self.held.items():
            counts = [0, 0, 0]
            for name in hashes:
                tier = next((i for i, medium in enumerate(TIERS) if name in tiers[medium]), None)
                if tier is None:
                    break
                counts[tier] += 1
            if any(counts):
                answer[id] = tuple(counts)
        return answer


ids = st.sampled_from([f"i{n}" for n in range(12)])
hashes = st.lists(st.integers(0, 12), max_size=10)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("store"), ids, st.sampled_from(TIERS), hashes),
        st.tuples(st.just("remove"), ids, st.sampled_from(TIERS), hashes),
        st.tuples(st.sampled_from(["clear", "drop"]), ids, st.just(DEVICE), st.just([])),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(steps=steps, asked=hashes)
def test_any_history_answers_as_plain_sets_do(steps, asked):
    index, plain, numbers = KvIndex(), Plain(), dict[str, int]()
    for what, id, medium, names in steps:
        if what == "drop":
            index.drop(id)
            plain.held.pop(id, None)
            numbers.pop(id, None)
            continue
        tiers = plain.held.setdefault(id, {tier: set() for tier in TIERS})
        number = numbers[id] = numbers.get(id, -1) + 1
        if what == "store":
            assert index.apply(id, number, batch(stored(*names, medium=medium)))
            tiers[medium].update(names)
        elif what == "remove":
            assert index.apply(id, number, batch(removed(*names, medium=medium)))
            tiers[medium].difference_update(names)
        else:
            assert index.apply(id, number, batch(AllBlocksCleared(epoch=EPOCH)))
            plain.held[id] = {tier: set() for tier in TIERS}
    for query in (asked, sorted(set(asked)), list(range(13))):
        assert index.longest(query) == plain.longest(query)
    for id, tiers in plain.held.items():
        assert index.totals(id) == tuple(len(tiers[tier]) for tier in TIERS)
    assert len(index) == len(
        set().union(*(names for tiers in plain.held.values() for names in tiers.values()))
    )
