"""Names of KV blocks: a chained xxh3-128, the same on every machine of a cluster.

    root(salt)        = xxh3_128("xllm.kv.1" 00 | salt in UTF-8)
    name of block i   = xxh3_128(name of block i-1, or root | token ids of block i)

Token ids are unsigned 32-bit little-endian; a name is the 16 bytes of xxh3's canonical (big-endian) form, seed 0.
So a name stands for everything that a block's KV depends on: all tokens up to its end, and the salt, which tells
tenants (and, for media, contents) apart. The number after `kv.` changes with the layout. Two clusters of different
models or block sizes must not share an index: the model is not part of the name.

xxh3 is fast, not cryptographic: who can choose prompts under a salt and see cache hits under the same salt could look
for collisions. Give tenants that distrust each other different, secret salts.
"""

import sys
from array import array
from collections.abc import Iterable

import xxhash

HASH_BYTES = 16
MAX_TOKEN_ID = 2**32 - 1
_DOMAIN = b"xllm.kv.1\0"


def root(salt: str = "") -> bytes:
    """The parent of a sequence's first block. Any text is a salt, lone surrogates included."""
    digest: bytes = xxhash.xxh3_128_digest(_DOMAIN + salt.encode("utf-8", "surrogatepass"))
    return digest


def pack(token_ids: Iterable[int]) -> bytes:
    """Token ids as they are hashed, 4 bytes each. `ValueError` where one is no integer of 32 bits."""
    try:
        packed = array("I", token_ids)
    except (OverflowError, TypeError) as error:
        raise ValueError(f"token ids must be integers from 0 to {MAX_TOKEN_ID}") from error
    if sys.byteorder != "little":
        packed.byteswap()
    return packed.tobytes()


def chain(parent: bytes, token_ids: Iterable[int], block_size: int) -> list[bytes]:
    """Names of the full blocks of `token_ids`, which follow the block (or root) called `parent`.

    A rest shorter than a block has no name yet. Growing a sequence and hashing it whole give the same names:
    `chain(p, a + b)` is `chain(p, a) + chain(last of those, b)` where `a` is whole blocks.
    """
    packed = pack(token_ids)
    width = 4 * block_size
    names = []
    for start in range(0, len(packed) - width + 1, width):
        parent = xxhash.xxh3_128_digest(parent + packed[start : start + width])
        names.append(parent)
    return names
