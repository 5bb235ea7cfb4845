"""KV cache events as routers read them: the msgpack that vLLM publishes since 0.24, so that who understands it
understands us (Dynamo, llm-d, vLLM's own example subscriber).

A batch is an array `[ts, events, data_parallel_rank]`; an event is a map whose `type` names the class below. `epoch` is
ours: other readers pass over keys they do not know.
"""

from collections.abc import Sequence

import msgspec


class _Event(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, gc=False):
    pass


class BlockStored(_Event, frozen=True):
    """Blocks of one sequence, each following the one before."""

    block_hashes: Sequence[int]  # see `block_hash`
    parent_block_hash: int | None  # of the first; None at the start of a sequence
    token_ids: Sequence[int]  # block_size for each block
    block_size: int  # tokens
    lora_id: int | None
    medium: str | None  # "GPU": the tier the model computes from, "CPU": host memory
    lora_name: str | None
    # one entry a block: what its hash stands for besides the tokens; a salt, with the first block of a sequence
    extra_keys: Sequence[Sequence[str] | None] | None = None
    epoch: int = 0


class BlockRemoved(_Event, frozen=True):
    block_hashes: Sequence[int]
    medium: str | None
    epoch: int = 0


class AllBlocksCleared(_Event, frozen=True):
    epoch: int = 0


class KVEventBatch(msgspec.Struct, frozen=True, array_like=True, gc=False):
    ts: float  # seconds since 1970
    events: Sequence[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(KVEventBatch)


def block_hash(name: bytes) -> int:
    """A block's name on the wire: the low 64 bits of its 16 bytes, for readers decode hashes as 64-bit integers."""
    return int.from_bytes(name[-8:], "big")


def encode(batch: KVEventBatch) -> bytes:
    return _encoder.encode(batch)


def decode(payload: bytes) -> KVEventBatch:
    """Raises `msgspec.MsgspecError` where it is no batch."""
    return _decoder.decode(payload)
