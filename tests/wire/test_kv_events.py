"""The bytes, read the ways that others read them."""

from typing import Any

import msgspec
import pytest

from xllm.wire.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    block_hash,
    decode,
    encode,
)

STORED = BlockStored(
    block_hashes=[2**64 - 1, 7], parent_block_hash=None, token_ids=[1, 151_643, 2**32 - 1, 0], block_size=2,
    lora_id=None, medium="GPU", lora_name=None, extra_keys=[["tenant"], None], epoch=5,
)  # fmt: skip
BATCH = KVEventBatch(
    1.5,
    [STORED, BlockRemoved(block_hashes=[7], medium="CPU", epoch=5), AllBlocksCleared(epoch=5)],
    0,
)


def test_it_is_an_array_of_tagged_maps():
    assert msgspec.msgpack.decode(encode(BATCH)) == [
        1.5,
        [
            {
                "type": "BlockStored",
                "block_hashes": [2**64 - 1, 7],
                "parent_block_hash": None,
                "token_ids": [1, 151_643, 2**32 - 1, 0],
                "block_size": 2,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
                "extra_keys": [["tenant"], None],
                "epoch": 5,
            },
            {"type": "BlockRemoved", "block_hashes": [7], "medium": "CPU", "epoch": 5},
            {"type": "AllBlocksCleared", "epoch": 5},
        ],
        0,
    ]


def test_both_ways():
    assert encode(decode(encode(BATCH))) == encode(BATCH)
    with pytest.raises(msgspec.MsgspecError):
        decode(b"\x93")


def test_a_strict_reader_of_the_known_fields_is_content():
    """Who declares every field of vLLM's without a default, and knows of no `epoch`."""

    class Event(msgspec.Struct, tag=True):
        pass

    class Stored(Event, tag="BlockStored"):
        block_hashes: list[int]
        parent_block_hash: int | None
        token_ids: list[int]
        block_size: int
        lora_id: int | None
        medium: str | None
        lora_name: str | None
        extra_keys: list[tuple[Any, ...] | None] | None = None
        group_idx: int | None = None

    class Removed(Event, tag="BlockRemoved"):
        block_hashes: list[int]
        medium: str | None
        group_idx: int | None = None

    class Cleared(Event, tag="AllBlocksCleared"):
        pass

    batch = msgspec.msgpack.decode(
        encode(BATCH), type=tuple[float, list[Stored | Removed | Cleared], int | None]
    )
    assert [type(event) for event in batch[1]] == [Stored, Removed, Cleared]
    assert batch[1][0] == Stored(
        [2**64 - 1, 7], None, [1, 151_643, 2**32 - 1, 0], 2, None, "GPU", None, [("tenant",), None]
    )


def test_a_hash_is_the_low_half_of_a_name():
    assert block_hash(bytes(range(16))) == 0x08090A0B0C0D0E0F
    assert block_hash(b"\xff" * 16) == 2**64 - 1
