import pytest

from xllm.kv.index import PrefixIndex

A, B, C = b"a" * 16, b"b" * 16, b"c" * 16


@pytest.fixture
def index() -> PrefixIndex:
    index = PrefixIndex(4)
    assert index.add(0, A)
    assert index.add(1, B)
    return index


def test_finds_the_longest_known_prefix(index):
    assert index.find([A, B, C]) == [0, 1]
    assert index.find([A, C, B]) == [0]
    assert index.find([C, A]) == []
    assert index.find([]) == []


def test_finds_no_more_than_asked(index):
    assert index.find([A, B], 1) == [0]
    assert index.find([A, B], 9) == [0, 1]
    assert index.find([A, B], 0) == []


def test_a_name_and_a_block_are_given_once(index):
    assert not index.add(2, A)
    assert not index.add(0, C)
    assert index.name_of(2) is None
    assert index.name_of(0) == A
    assert len(index) == 2


def test_remove_forgets_both_ways(index):
    assert index.remove(0)
    assert not index.remove(0)
    assert index.find([A]) == []
    assert index.add(3, A)
    index.audit()


def test_the_shelf_gives_up_the_least_recently_used_first(index):
    index.add(2, C)
    for block in (0, 1, 2):
        index.shelve(block)
    index.unshelve(0)
    index.shelve(0)  # used in between: the youngest now
    assert index.num_shelved == 3
    assert [index.evict() for _ in range(3)] == [1, 2, 0]
    assert index.find([A]) == []
    with pytest.raises(KeyError):
        index.evict()


def test_clear_returns_the_shelved_oldest_first(index):
    index.shelve(1)
    index.shelve(0)
    assert index.is_shelved(0)
    assert index.clear() == [1, 0]
    assert len(index) == 0
    assert index.num_shelved == 0
    assert not index.is_shelved(0)
    index.audit()


def test_audit_finds_a_nameless_block_on_the_shelf(index):
    index.shelve(3)
    with pytest.raises(AssertionError, match="block 3 is on the shelf without a name"):
        index.audit()


def test_audit_finds_a_broken_map(index):
    index._block_of[C] = 0
    with pytest.raises(AssertionError, match="two-way map"):
        index.audit()
