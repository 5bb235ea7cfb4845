"""One step in the making: which sequences compute which positions, until the token budget is spent."""

from collections.abc import Sequence
from dataclasses import dataclass

from xllm.core.plan import NewSequence, StepPlan
from xllm.core.request import Request
from xllm.scheduler.tables import BlockTables


@dataclass(frozen=True, slots=True)
class InFlight:
    """A submitted step and whom its results are for. A request that was preempted since has another incarnation (its
    number of preemptions) and one that ended is no longer running: neither takes the result."""

    plan: StepPlan
    requests: Sequence[Request]
    incarnations: Sequence[int]
    num_prefill_tokens: int  # of its tokens, those of prompts


class StepBuilder:
    """Collects a plan's parallel arrays and advances the requests it schedules (`num_computed`, `num_in_flight`)."""

    __slots__ = (
        "appended",
        "budget",
        "counts",
        "incarnations",
        "new",
        "num_prefill_tokens",
        "requests",
        "samples",
        "slots",
        "starts",
        "tables",
    )

    def __init__(self, budget: int, tables: BlockTables):
        self.budget = budget  # tokens left
        self.tables = tables
        self.num_prefill_tokens = 0
        self.requests: list[Request] = []
        self.incarnations: list[int] = []
        self.new: list[NewSequence] = []
        self.slots: list[int] = []
        self.starts: list[int] = []
        self.counts: list[int] = []
        self.samples: list[bool] = []
        self.appended: list[tuple[int, Sequence[int]]] = []

    def decode(self, decoding: Sequence[Request]) -> int:
        """Schedule what the sequences have not computed (one token each, unless a step brought several).

        Returns how many of them, from the first, had their turn before the budget was spent. Who lacks a block goes
        without until steps in flight have returned some; who has sampled up to its length limit only waits for results.
        This loop is most of the host's work per token, so it reads fields instead of asking properties.
        """
        block_size = self.tables.block_size
        budget = self.budget
        ahead = self.tables.ahead(len(decoding))
        for turn, request in enumerate(decoding):
            start = request.num_computed
            end = len(request.prompt_token_ids) + len(request.output_token_ids) + request.num_in_flight
            if end >= request.max_total_tokens:
                continue
            if budget == 0:
                self.budget = 0
                return turn
            have = len(request.blocks) * block_size
            if end + ahead > have and not self._grow(request, end, ahead) and end > have:
                continue
            count = min(end - start, budget)
            budget -= count
            sampled = start + count == end
            self.requests.append(request)
            self.incarnations.append(request.num_preemptions)
            self.slots.append(request.slot)
            self.starts.append(start)
            self.counts.append(count)
            self.samples.append(sampled)
            request.num_computed = start + count
            request.num_in_flight += sampled
        self.budget = budget
        return len(decoding)

    def prefill(self, request: Request, limit: int) -> bool:
        """Schedule the next chunk, at most `limit` tokens, of a sequence all of whose tokens are known. True where it was
        the last one: the step then samples the first token."""
        start = request.num_computed
        left = request.num_known - start
        count = min(left, limit, self.budget)
        complete = count == left
        self.budget -= count
        self.num_prefill_tokens += count
        self.requests.append(request)
        self.incarnations.append(request.num_preemptions)
        self.slots.append(request.slot)
        self.starts.append(start)
        self.counts.append(count)
        self.samples.append(complete)
        request.num_computed = start + count
        request.num_in_flight += complete
        self.tables.publish_in_step(request)
        return complete

    def introduce(self, request: Request) -> None:
        """Tell the executor all about a sequence that has just been given a slot and its blocks."""
        prompt, output = request.prompt_token_ids, request.output_token_ids
        self.new.append(
            NewSequence(
                slot=request.slot,
                request_id=request.id,
                token_ids=tuple(prompt + output if output else prompt),
                prompt_len=len(prompt),
                params=request.params,
                seed=request.seed,
                stop_ids=sorted(request.stop_ids),
                blocks=tuple(self.tables.shown(request)),
            )
        )

    def build(self, step: int) -> InFlight:
        plan = StepPlan(
            step=step,
            new=self.new,
            slots=self.slots,
            starts=self.starts,
            counts=self.counts,
            samples=self.samples,
            appended=self.appended,
            mapped=self.tables.close_step(step),
        )
        return InFlight(plan, self.requests, self.incarnations, self.num_prefill_tokens)

    def _grow(self, request: Request, tokens: int, ahead: int) -> bool:
        have = len(request.blocks)
        fresh = self.tables.grow(request, tokens, ahead)
        if fresh:
            self.appended.append((request.slot, self.tables.shown(request, have)))
        return fresh is not None
