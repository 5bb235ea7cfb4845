"""From conversations to packed rows of tokens, in parallel and the same for any number of workers."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from tools.demo.corpus.grammar import Conversation
from tools.demo.corpus.mixture import training_set
from tools.demo.tokenizer import END, START, render

SHARD = 10_000
"""Conversations of one unit of work; each has its own seed."""

BEGIN, ANSWER, CUT = 1, 2, 4
"""Flags of a token: first of a conversation; written by the assistant; of a conversation cut by its row's start."""


@dataclass(frozen=True)
class Rows:
    """Packed tokens: ``tokens[row, position]`` with a flag each, and what the users asked, as hashes."""

    tokens: npt.NDArray[np.int16]
    flags: npt.NDArray[np.uint8]
    questions: frozenset[int]
    conversations: int


def question_hash(text: str) -> int:
    """A number for a user message that ignores case, outer spaces and final marks."""
    normal = text.lower().strip(" .!?")
    return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "big")


def answer_flags(ids: npt.NDArray[np.int16], tokenizer: Tokenizer) -> npt.NDArray[np.uint8]:
    """Flag each token of an assistant's message and the end mark after it."""
    header = tokenizer.encode(f"{START}assistant\n").ids
    starts, ends = np.flatnonzero(ids == header[0]), np.flatnonzero(ids == tokenizer.token_to_id(END))
    mine = ids[starts + 1] == header[1]
    steps = np.zeros(len(ids) + 1, dtype=np.int8)
    steps[starts[mine] + len(header)] += 1
    steps[ends[mine] + 1] -= 1
    return (np.cumsum(steps[:-1]) * ANSWER).astype(np.uint8)


def encode(
    tokenizer: Tokenizer, conversations: list[Conversation]
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8]]:
    """Tokens and flags of conversations, one after the other."""
    encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast([render(c) for c in conversations])]
    ids = np.concatenate([np.asarray(one, dtype=np.int16) for one in encoded])
    flags = answer_flags(ids, tokenizer)
    begins = np.cumsum([0] + [len(one) for one in encoded[:-1]])
    flags[begins] |= BEGIN
    return ids, flags


def _shard(
    serialised: str, seed: int, index: int
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8], set[int]]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_str(serialised)
    conversations = list(training_set(seed * 100_003 + index, SHARD))
    ids, flags = encode(tokenizer, conversations)
    return ids, flags, {question_hash(turn.user) for c in conversations for turn in c.turns}


def shards(
    tokenizer: Tokenizer, seed: int, count: int, workers: int
) -> Iterator[tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8], set[int]]]:
    """The shards in order, made by several processes."""
    make = partial(_shard, tokenizer.to_str(), seed)
    if workers <= 1:
        yield from map(make, range(count))
        return
    with multiprocessing.get_context("fork").Pool(workers) as processes:
        yield from processes.imap(make, range(count))


def pack(
    ids: npt.NDArray[np.int16], flags: npt.NDArray[np.uint8], length: int
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8]]:
    """Cut one stream into rows; the rest of a conversation that began in the row before is flagged as cut."""
    rows = len(ids) // length
    tokens, packed = (
        ids[: rows * length].reshape(rows, length),
        flags[: rows * length].reshape(rows, length).copy(),
    )
    begun = np.maximum.accumulate(packed & BEGIN, axis=1).astype(bool)
    packed[~begun] |= CUT
    return tokens, packed


def build_rows(tokenizer: Tokenizer, seed: int, conversations: int, length: int, workers: int) -> Rows:
    """Generate, encode and pack the training set."""
    count = max(1, conversations // SHARD)
    ids, flags, asked = zip(*shards(tokenizer, seed, count, workers), strict=True)
    tokens, packed = pack(np.concatenate(ids), np.concatenate(flags), length)
    return Rows(tokens, packed, frozenset().union(*asked), count * SHARD)
