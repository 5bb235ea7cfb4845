"""What stands in front of a KV block wherever it outlives this process: whose it is, what it is called, and a checksum of
its bytes under that name. So whoever reads a block from a disk or a store can tell whether it is the one that was asked
for, whole, whatever happened to it there.
"""

import struct
from typing import NamedTuple

import xxhash

MAGIC, VERSION = b"xllm-blk", 1
_FORM = struct.Struct(
    "<8sIIQQ16s16sQ"
)  # magic, version, 0, number, bytes of the block, owner, name, checksum
BYTES = _FORM.size + 8


class Record(NamedTuple):
    number: int  # of the write; what it counts is for who writes
    name: bytes  # 16 bytes
    known: int  # `checksum` of the block under its name


def owner_of(fingerprint: bytes) -> bytes:
    """16 bytes that tell whose blocks may be taken for each other's: what the bytes depend on beside their names."""
    digest: bytes = xxhash.xxh3_128_digest(fingerprint)
    return digest


def pack(record: Record, block_bytes: int, owner: bytes) -> bytes:
    """`BYTES` long."""
    assert len(record.name) == 16
    return sealed(
        _FORM.pack(
            MAGIC, VERSION, 0, record.number, block_bytes, owner, record.name, record.known
        )
    )  # fmt: skip


def parse(header: bytes, block_bytes: int, owner: bytes) -> Record | None:
    """None where this is no record, not a whole one, or one of others."""
    content = header[: _FORM.size]
    if len(content) < _FORM.size or header[:BYTES] != sealed(content):
        return None
    magic, version, _, number, length, whose, name, known = _FORM.unpack(content)
    if (magic, version, length, whose) != (MAGIC, VERSION, block_bytes, owner):
        return None
    return Record(number, name, known)


def sealed(content: bytes) -> bytes:
    """A header with the checksum that tells whether it is whole."""
    digest: bytes = xxhash.xxh3_64_digest(content)
    return content + digest
