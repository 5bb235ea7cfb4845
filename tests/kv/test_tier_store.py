import pytest

from xllm.core.transfer import Seen
from xllm.kv.tiers.store import ABSENT_S, HELD_S, StoreView

A, B, C, D = (letter * 16 for letter in (b"a", b"b", b"c", b"d"))


@pytest.fixture
def view() -> StoreView:
    view = StoreView()
    view.now = 100.0
    return view


def told(view: StoreView, names: list[bytes], count: int, pause: float = 0.0) -> bool:
    view.look(1, names)
    return view.seen(Seen(1, count, 0.01, pause))


def test_of_the_unknown_one_may_ask(view):
    assert view.is_open(A)
    assert not view.has(A)


def test_an_answer_counts_for_a_while(view):
    assert told(view, [A, B, C, D], 2)
    assert [view.has(name) for name in (A, B, C, D)] == [True, True, False, False]
    assert [view.is_open(name) for name in (A, B, C, D)] == [False, False, False, True]
    view.now += ABSENT_S
    assert view.is_open(C)
    view.now += HELD_S
    assert not view.has(A)
    assert view.is_open(A)


def test_one_answer_for_each_question(view):
    view.look(1, [A])
    view.look(2, [B])
    assert view.looks == 2
    assert view.seen(Seen(2, 1, 0.01))
    assert view.looks == 1
    with pytest.raises(KeyError):
        view.seen(Seen(2, 1, 0.01))


def test_silence(view):
    told(view, [A], 1)
    assert not told(view, [B], 0, pause=3.0)
    assert view.silent
    assert not view.has(A)
    assert not view.is_open(B)
    assert not view.wants(C)
    told(view, [B], 0, pause=1.0)
    view.now += 2.5
    assert view.silent, "the longer of two"
    view.now += 0.5
    assert view.has(A)
    assert view.is_open(B)
    assert view.wants(C)
    assert (view.failures, view.skipped) == (2, 1)


def test_what_was_sent_is_there_and_not_sent_again(view):
    assert view.wants(A)
    view.sent(A, True)
    assert view.has(A)
    assert not view.wants(A)
    view.sent(B, False)
    assert view.wants(B)
    view.missed(A)
    assert view.wants(A)
    assert (view.stored, view.failures) == (1, 2)


def test_what_is_disowned_is_neither_found_nor_asked_nor_sent(view):
    told(view, [A], 1)
    view.disown([A])
    told(view, [A], 1)
    view.sent(A, True)
    assert not (view.has(A) or view.is_open(A) or view.wants(A))


def test_after_forgetting_it_all_an_answer_under_way_says_nothing(view):
    told(view, [A], 1)
    view.disown([B])
    view.look(5, [C, D])
    view.clear()
    assert view.seen(Seen(5, 1, 0.01))
    assert not any(view.has(name) for name in (A, B, C, D))
    assert all(view.is_open(name) for name in (A, B, C, D))


def test_so_much_is_remembered_and_no_more():
    view = StoreView(most_names=3)
    for name in (A, B, C, D):
        view.sent(name, True)
    assert [view.has(name) for name in (A, B, C, D)] == [False, True, True, True]
    view.disown([A, B, C, D])
    assert view.is_open(A)
    assert not view.is_open(D)
