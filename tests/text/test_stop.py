"""The stop matcher against searching the whole text by brute force."""

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.core.errors import InvalidRequest
from xllm.text.stop import MAX_STOP_CHARACTERS, StopMatcher

letters = st.text("ab", max_size=24)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


def first_end(text: str, stops: list[str], armed_from: int = 0) -> tuple[int, str] | None:
    """Where the first stop string is complete, and the longest that is complete there."""
    for end in range(armed_from + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


def cut(text: str, cuts: list[int]) -> list[str]:
    borders = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(borders)]


@given(text=letters, stops=stop_lists, cuts=st.lists(st.integers(0, 24), max_size=10), include=st.booleans())
def test_finds_what_brute_force_finds(text: str, stops: list[str], cuts: list[int], include: bool):
    matcher = StopMatcher(stops, include)
    expected = first_end(text, stops)
    shown, pushed = "", 0
    for piece in cut(text, cuts):
        emit, matched = matcher.push(piece)
        shown += emit
        pushed += len(piece)
        if matched is not None:
            assert expected is not None
            end, stop = expected
            assert matched == stop
            assert pushed - len(piece) < end <= pushed  # reported by the push that completes it
            assert shown == (text[:end] if include else text[: end - len(stop)])
            return
        # shown early is exactly what no stop string can take back
        assert text.startswith(shown)
        held = text[len(shown) : pushed]
        longest = max(
            (n for stop in stops for n in range(len(stop)) if text[:pushed].endswith(stop[:n])), default=0
        )
        assert len(held) == (0 if include else longest)
    assert expected is None
    assert shown + matcher.finish() == text


@given(
    text=letters,
    stops=stop_lists,
    cuts=st.lists(st.integers(0, 24), max_size=10),
    armed_from=st.integers(0, 24),
)
def test_unarmed_text_is_passed_over(text: str, stops: list[str], cuts: list[int], armed_from: int):
    matcher = StopMatcher(stops)
    armed_from = min(armed_from, len(text))
    shown = ""
    for piece in [
        *((p, False) for p in cut(text[:armed_from], cuts)),
        *((p, True) for p in cut(text[armed_from:], cuts)),
    ]:
        emit, matched = matcher.push(*piece)
        shown += emit
        if matched is not None:
            assert (end := first_end(text, stops, armed_from)) is not None
            assert (matched, shown) == (end[1], text[: end[0] - len(end[1])])
            return
    assert first_end(text, stops, armed_from) is None
    assert shown + matcher.finish() == text


def test_an_end_that_begins_before_it_may_count():
    matcher = StopMatcher(["abc"])
    assert matcher.push("xab", armed=False) == ("x", None)
    assert matcher.push("c") == ("", "abc")


def test_the_longest_of_those_completed_together():
    assert StopMatcher(["b", "ab"]).push("xab") == ("x", "ab")
    assert StopMatcher(["abcd", "bc"]).push("abcd") == ("a", "bc")  # complete one character earlier


def test_characters_beyond_the_first_plane():
    matcher = StopMatcher(["👍🏽"])
    assert matcher.push("ok 👍") == ("ok ", None)
    assert matcher.push("🏽!") == ("", "👍🏽")


@pytest.mark.parametrize(
    "stops", [[""], ["a", ""], ["x" * (MAX_STOP_CHARACTERS + 1)], ["x" * 5000, "y" * 5000]]
)
def test_useless_and_huge_stop_strings_are_refused(stops: list[str]):
    with pytest.raises(InvalidRequest) as caught:
        StopMatcher(stops)
    assert caught.value.param == "stop"


def test_the_worst_stop_strings_stay_cheap():
    stops = ["a" * n + "b" for n in range(1, 64)]
    matcher = StopMatcher(stops)
    begin = time.thread_time()
    for _ in range(200):
        assert matcher.push("a" * 1000)[1] is None
    assert time.thread_time() - begin < 5.0
    assert matcher.push("b")[1] == stops[-1]
