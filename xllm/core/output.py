"""What leaves the engine: per-request deltas inside, the public `RequestOutput` outside."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from xllm.core.plan import TokenLogprobs


class Finish(enum.StrEnum):
    """Why a request ended. Every admitted request gets exactly one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class SequenceOutput(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """News of one sequence after one step, from the engine core to the front end.

    The terminal one has `finish` set and is the last that names this request. There are as many as tokens, and none is
    part of a cycle: the collector need not follow them.
    """

    request_id: str
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()  # one per token id, where asked for
    prompt_logprobs: Sequence[TokenLogprobs] = ()  # next ones in prompt order, where asked for
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache at first admission
    finish: Finish | None = None
    stop_reason: int | None = None  # the stop token id, unless it was the end-of-sequence token
    error: str | None = None
    queued_s: float | None = None  # arrival to first scheduled, on the first output
    prefill_s: float | None = None  # first scheduled to first token, on the first output
    num_preemptions: int = 0
    fetched_tokens: int = 0  # of the prompt, whose KV came from a peer; on the first output
    fetch_s: float = 0.0  # how long the request waited for that


@dataclass(slots=True)
class Logprob:
    """One candidate at one position."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's `n` completions. While streaming, `text`, `token_ids` and `logprobs` are what is new."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Seconds, on the front end's monotonic clock where a point in time, else durations."""

    arrival: float
    first_token: float | None = None
    finished: float | None = None
    queued_s: float | None = None
    prefill_s: float | None = None
    num_preemptions: int = 0

    def snapshot(self) -> "RequestMetrics":
        """A copy; made for every token, and `copy.copy` takes ten times as long."""
        return RequestMetrics(
            self.arrival, self.first_token, self.finished, self.queued_s, self.prefill_s, self.num_preemptions
        )


@dataclass(slots=True)
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    error: str | None = None  # set when a completion finished with "error"
