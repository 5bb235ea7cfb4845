import struct

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from xllm.kv import hashing

tokens = st.lists(st.integers(0, hashing.MAX_TOKEN_ID), max_size=40)


def test_layout_is_what_the_docstring_says():
    root = xxhash.xxh3_128(b"xllm.kv.1\x00" + "té".encode()).digest()
    first = xxhash.xxh3_128(root + struct.pack("<2I", 1, 2**32 - 1)).digest()
    second = xxhash.xxh3_128(first + struct.pack("<2I", 3, 4)).digest()
    assert hashing.root("té") == root
    assert hashing.chain(root, [1, 2**32 - 1, 3, 4, 5], 2) == [first, second]


def test_names_never_change():
    """Other instances and stored caches know blocks by these: a change here is a change of `xllm.kv.1`."""
    assert hashing.root().hex() == "bf9d0c0ee12b0abcad4df8c25786c77d"
    assert [name.hex() for name in hashing.chain(hashing.root(), range(8), 4)] == [
        "52479c24c7d41ca744b2cd6bc616bc0e",
        "505cec4e3c2c045cae747343a8f6fd39",
    ]


def test_a_name_has_sixteen_bytes():
    assert len(hashing.root("a")) == hashing.HASH_BYTES
    assert all(len(name) == hashing.HASH_BYTES for name in hashing.chain(hashing.root(), [1, 2], 1))


def test_a_rest_has_no_name():
    assert hashing.chain(hashing.root(), [1, 2, 3], 4) == []
    assert len(hashing.chain(hashing.root(), [1, 2, 3, 4, 5], 4)) == 1


@given(tokens, st.integers(1, 9), st.integers(0, 40))
def test_growing_gives_the_same_names_as_hashing_whole(ids, block_size, cut):
    cut = min(cut, len(ids)) // block_size * block_size
    whole = hashing.chain(hashing.root("s"), ids, block_size)
    begun = hashing.chain(hashing.root("s"), ids[:cut], block_size)
    grown = hashing.chain(begun[-1] if begun else hashing.root("s"), ids[cut:], block_size)
    assert begun + grown == whole


@given(tokens, tokens, st.integers(1, 5))
def test_equal_names_mean_equal_histories(one, other, block_size):
    ours = hashing.chain(hashing.root(), one, block_size)
    theirs = hashing.chain(hashing.root(), other, block_size)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        end = (i + 1) * block_size
        assert (a == b) == (one[:end] == other[:end])


def test_salts_tell_tenants_apart():
    names = {hashing.chain(hashing.root(salt), [1, 2], 2)[0] for salt in ("", "a", "b", "\ud800")}
    assert len(names) == 4


@pytest.mark.parametrize("ids", [[-1], [2**32], ["a"], [1.5], [None]])
def test_what_is_no_token_id_is_refused(ids):
    with pytest.raises(ValueError, match="token ids must be integers"):
        hashing.chain(hashing.root(), ids, 1)


def test_big_endian_machines_hash_the_same_bytes(monkeypatch):
    monkeypatch.setattr("sys.byteorder", "big")  # then the array's own bytes must be swapped
    assert hashing.pack([1, 2]) == struct.pack(">2I", 1, 2)
