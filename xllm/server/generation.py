"""One HTTP request as one or more engine requests: outputs, whole or as they come, and usage."""

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from typing import cast

import msgspec

from xllm.core.errors import EngineFault, InvalidRequest
from xllm.core.output import RequestOutput
from xllm.core.sampling import SamplingParams
from xllm.core.targets import NO_TARGETS, Targets
from xllm.engine.outputs import Collector
from xllm.server.prompts import Prompt
from xllm.server.state import ServerState

# ids of the engine requests that the HTTP request at hand became, where somebody outside wants to know
JOBS: ContextVar[list[str] | None] = ContextVar("jobs", default=None)
MAX_SEQUENCES = 1024  # prompts times n of one HTTP request


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


@dataclass(slots=True)
class Tally:
    """Tokens of one HTTP request so far."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def usage(self) -> Usage:
        details = PromptTokensDetails(self.cached)
        return Usage(self.prompt, self.completion, self.prompt + self.completion, details)


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt and all of its `n` completions: what the engine calls a request."""

    id: str
    prompt: Prompt
    params: SamplingParams
    first_index: int = 0  # of its completions among the choices of the HTTP request
    priority: int = 0
    deadline_s: float | None = None
    cache_salt: str = ""
    targets: Targets = NO_TARGETS


def new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


def check_sequences(prompts: int, n: int) -> None:
    if prompts * n > MAX_SEQUENCES:
        raise InvalidRequest(
            f"one request may ask for at most {MAX_SEQUENCES} completions, not {prompts * n}", param="n"
        )


async def outputs(state: ServerState, job: Job, tally: Tally) -> AsyncGenerator[RequestOutput, None]:
    """The engine's deltas, counted and measured. `EngineFault` when the engine gives up."""
    meter = state.metrics.meter()
    if (jobs := JOBS.get()) is not None:
        jobs.append(job.id)
    stream = state.engine.generate(
        job.prompt.ids,
        job.params,
        request_id=job.id,
        priority=job.priority,
        deadline_s=job.deadline_s,
        cache_salt=job.cache_salt,
        targets=job.targets,
    )
    first = True
    try:
        async with aclosing(cast(AsyncGenerator[RequestOutput, None], stream)) as deltas:
            async for output in deltas:
                if first:
                    first = False
                    tally.prompt += len(job.prompt.ids)
                    tally.cached += output.num_cached_tokens
                tally.completion += sum(len(c.token_ids) for c in output.outputs)
                meter.saw(output)
                if any(c.finish_reason == "error" for c in output.outputs):
                    raise EngineFault(output.error or "the engine could not finish this request")
                yield output
    finally:
        meter.ended(len(job.prompt.ids))


async def whole(state: ServerState, job: Job, tally: Tally) -> RequestOutput:
    collector = Collector()
    async with aclosing(outputs(state, job, tally)) as deltas:
        async for output in deltas:
            collector.add(output)
    return collector.result
