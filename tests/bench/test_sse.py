from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.bench.sse import SseParser

STREAM = (
    b": a comment\n\n"
    b'data: {"a": 1}\n\n'
    b"event: message\ndata: two\ndata: lines\nid: 7\n\n"
    b"data:no space\r\n\r\n"
    b"\n\n"
    b"retry: 5\n\n"
    b"data: \xc3\xa9\xf0\x9f\x8e\x89\n\n"
    b"data: [DONE]\n\n"
)
EVENTS = [b'{"a": 1}', b"two\nlines", b"no space", "é🎉".encode(), b"[DONE]"]


def parse(pieces: list[bytes]) -> list[bytes]:
    parser = SseParser()
    events = [event for piece in pieces for event in parser.feed(piece)]
    return events + parser.close()


def test_one_piece():
    assert parse([STREAM]) == EVENTS


def test_byte_by_byte():
    assert parse([STREAM[i : i + 1] for i in range(len(STREAM))]) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_any_chunking(cuts):
    edges = [0, *sorted(cuts), len(STREAM)]
    assert parse([STREAM[a:b] for a, b in pairwise(edges)]) == EVENTS


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_line_end_however_cut(end):
    stream = end.join(["data: a", "data: b", "", "data: c", "", ""]).encode()
    assert parse([stream]) == [b"a\nb", b"c"]
    assert parse([stream[i : i + 1] for i in range(len(stream))]) == [b"a\nb", b"c"]


def test_an_event_is_given_as_soon_as_it_is_complete():
    parser = SseParser()
    assert parser.feed(b"data: a\n") == []
    assert parser.feed(b"\n") == [b"a"]


def test_the_last_event_may_lack_its_blank_line():
    assert parse([b"data: a\n\ndata: b"]) == [b"a", b"b"]
    assert parse([b"data: a\n\ndata: b\r"]) == [b"a", b"b"]


@given(st.binary(max_size=200))
def test_no_bytes_make_it_fail(data):
    parse([data[:50], data[50:]])
