"""An executor without a model: in order, late, and suspicious.

Its "KV memory" holds, for every position a step writes, a fingerprint of the whole history up to there (salt and
tokens). Before a sequence may sample, every position is read back through its block table: a block shared wrongly,
handed out too early or never computed is found at once. The "model" is a hash of the history and the seed, so what a
request must output is known without any scheduler: see `alone`.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xllm.core.plan import NewSequence, StepPlan, StepResult, TokenLogprobs
from xllm.core.request import Request

if TYPE_CHECKING:
    from tests.scheduler.fake_places import FakePlaces

VOCAB = 11


def follow(fingerprint: int, token: int) -> int:
    return hash((fingerprint, token))


def begin(salt: str) -> int:
    return hash(tuple(salt.encode()))  # of integers: the same in every process


def history(salt: str, tokens: Sequence[int]) -> list[int]:
    fingerprint, out = begin(salt), []
    for token in tokens:
        fingerprint = follow(fingerprint, token)
        out.append(fingerprint)
    return out


def sample(fingerprint: int, seed: int) -> int:
    return hash((fingerprint, seed, 7)) % VOCAB


def alone(request: Request) -> tuple[list[int], str]:
    """What the request must output, and why it ends, with nobody beside it and no scheduler at all."""
    fingerprint = history(request.cache_salt, request.prompt_token_ids)[-1]
    limit = request.max_total_tokens - len(request.prompt_token_ids)
    if request.params.max_tokens is not None:
        limit = min(limit, request.params.max_tokens)
    output: list[int] = []
    while True:
        token = sample(fingerprint, request.seed)
        output.append(token)
        if token in request.stop_ids and len(output) > request.params.min_tokens:
            return output, "stop"
        if len(output) >= limit:
            return output, "length"
        fingerprint = follow(fingerprint, token)


@dataclass
class Row:
    """What the device knows about the sequence in a slot."""

    request_id: str
    tokens: list[int]
    prompt_len: int
    seed: int
    blocks: list[int]
    logprobs: bool
    prompt_logprobs: bool


class FakeExecutor:
    """`submit` queues, `result` runs the oldest step. `burst` tokens are sampled at once where one is asked for."""

    def __init__(self, block_size: int, burst: int = 1):
        self.block_size = block_size
        self.burst = burst
        self.queue: deque[StepPlan] = deque()
        self.steps_run = 0
        self.rows: dict[int, Row] = {}
        self.salts: dict[str, str] = {}  # by request id; a real model sees other media instead
        self.memory: dict[tuple[int, int], int] = {}  # (block, offset) -> fingerprint
        self.places: FakePlaces | None = None  # where blocks are seen elsewhere than where they are
        self.failing: dict[str, str] = {}  # request id -> the error its next step ends with

    def submit(self, plan: StepPlan) -> None:
        self.queue.append(plan)

    def writes(self, plan: StepPlan, tables: dict[int, list[int]]) -> set[int]:
        size = self.block_size
        return {
            tables[slot][position // size]
            for slot, start, count in zip(plan.slots, plan.starts, plan.counts, strict=True)
            for position in range(start, start + count)
        }

    def touches(self) -> set[int]:
        """By steps that have not run: all that they write or read."""
        tables = {slot: list(row.blocks) for slot, row in self.rows.items()}
        touched: set[int] = set()
        for plan in self.queue:
            for new in plan.new:
                tables[new.slot] = list(new.blocks)
            for slot, blocks in plan.appended:
                tables[slot] += blocks
            for slot, start, count in zip(plan.slots, plan.starts, plan.counts, strict=True):
                touched.update(tables[slot][: -(-(start + count) // self.block_size)])
        return touched

    def result(self) -> StepResult:
        plan = self.queue.popleft()
        self.steps_run += 1
        if self.places is not None:
            self.places.carry_out(plan.mapped)
        for new in plan.new:
            self.rows[new.slot] = self._row(new)
        for slot, blocks in plan.appended:
            self.rows[slot].blocks += blocks
        for slot, start, count in zip(plan.slots, plan.starts, plan.counts, strict=True):
            self._write(self.rows[slot], start, count)
        tokens: list[list[int]] = []
        logprobs: dict[int, TokenLogprobs] = {}
        prompt_logprobs: dict[int, Sequence[TokenLogprobs]] = {}
        errors: dict[int, str] = {}
        for i, slot in enumerate(plan.slots):
            row = self.rows[slot]
            end = plan.starts[i] + plan.counts[i]
            self._check(row, end)
            tokens.append(self._sample(row, end) if plan.samples[i] else [])
            if row.logprobs and tokens[i]:
                logprobs[i] = TokenLogprobs(tokens[i], [-0.5] * len(tokens[i]), 1)
            if row.prompt_logprobs:
                positions = range(plan.starts[i] + 1, min(end + 1, row.prompt_len))
                prompt_logprobs[i] = [TokenLogprobs([row.tokens[p]], [-float(p)], 1) for p in positions]
            if row.request_id in self.failing:
                errors[i] = self.failing.pop(row.request_id)
                tokens[i] = []
        return StepResult(plan.step, tokens, logprobs, prompt_logprobs, errors)

    def _row(self, new: NewSequence) -> Row:
        return Row(
            new.request_id,
            list(new.token_ids),
            new.prompt_len,
            new.seed,
            list(new.blocks),
            new.params.logprobs is not None,
            new.params.prompt_logprobs is not None,
        )

    def _write(self, row: Row, start: int, count: int) -> None:
        assert count > 0, "a step computes something of each of its sequences"
        assert start + count <= len(row.tokens), "a step computes only tokens that exist by then"
        fingerprints = history(self.salts[row.request_id], row.tokens[: start + count])
        for position in range(start, start + count):
            block = self._page(row.blocks[position // self.block_size])
            self.memory[block, position % self.block_size] = fingerprints[position]

    def _check(self, row: Row, end: int) -> None:
        for position, fingerprint in enumerate(history(self.salts[row.request_id], row.tokens[:end])):
            block = self._page(row.blocks[position // self.block_size])
            found = self.memory.get((block, position % self.block_size))
            assert found == fingerprint, (
                f"{row.request_id}: block {block} holds another history at {position}"
            )

    def _page(self, block: int) -> int:
        return block if self.places is None else self.places.page(block)

    def _sample(self, row: Row, end: int) -> list[int]:
        assert end == len(row.tokens), "sampling continues the row"
        fingerprint = history(self.salts[row.request_id], row.tokens)[-1]
        tokens = []
        for _ in range(self.burst):
            tokens.append(sample(fingerprint, row.seed))
            fingerprint = follow(fingerprint, tokens[-1])
        row.tokens += tokens
        return tokens
