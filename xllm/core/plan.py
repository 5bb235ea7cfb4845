"""What passes between the scheduler and the executor: one `StepPlan` out and one `StepResult` back per step.

A plan is immutable host integers. It speaks of token *positions*, never of sampled values, so that plan N+1 can
be made while step N still runs: the executor keeps every running sequence's tokens in a row (a *slot*) of a device
buffer and reads a step's input from there, whether the host wrote it (prompt) or the sampler did (feedback).
"""

from collections.abc import Sequence

import msgspec

from xllm.core.sampling import SamplingParams


class NewSequence(msgspec.Struct, frozen=True):
    """Full data of a sequence the first time a slot holds it (admission, or resumption after a preemption or from elsewhere)."""

    slot: int
    request_id: str
    token_ids: Sequence[int]  # prompt, then what was generated before a preemption, or elsewhere
    prompt_len: int  # how many of token_ids are prompt (penalties tell prompt from output)
    params: SamplingParams
    seed: int  # resolved; 64 bits unsigned
    stop_ids: Sequence[int]  # end-of-sequence and stop ids, barred until min_tokens are out
    blocks: Sequence[
        int
    ]  # block table so far, this step's blocks included; of a contiguous pool, their places


class StepPlan(msgspec.Struct, frozen=True):
    """The arrays `slots`, `starts`, `counts`, `samples` run parallel, one entry per scheduled sequence.

    Sequence i computes tokens at positions starts[i] .. starts[i] + counts[i] - 1. Where samples[i] is true the
    token for position starts[i] + counts[i] is sampled and written to the slot's row. Owned by the scheduler;
    nobody changes it.
    """

    step: int
    new: Sequence[NewSequence]
    slots: Sequence[int]
    starts: Sequence[int]
    counts: Sequence[int]
    samples: Sequence[bool]
    appended: Sequence[tuple[int, Sequence[int]]]  # (slot, block ids added to its table) for known sequences
    mapped: int = (
        0  # so many orders to map pages (`xllm.core.places`) must have been carried out before it runs
    )

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities at one position: the token that stands there first, then the most likely ones."""

    token_ids: Sequence[int]  # [1 + k]
    logprobs: Sequence[float]  # [1 + k]
    rank: int  # 1 = the first token was the most likely


class StepResult(msgspec.Struct, frozen=True):
    """What a step brought, aligned with its plan's sequences."""

    step: int
    tokens: Sequence[Sequence[int]]  # [] where nothing was sampled
    logprobs: dict[int, TokenLogprobs] = {}  # plan index -> of the sampled token
    prompt_logprobs: dict[int, Sequence[TokenLogprobs]] = {}  # plan index -> of prompt positions start+1 ..
    errors: dict[int, str] = {}  # plan index -> why this sequence alone failed
    seconds: float = 0.0  # from submission to result on the device
