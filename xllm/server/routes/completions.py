"""POST /v1/completions: text after a prompt."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from xllm.core.errors import InvalidRequest
from xllm.core.output import CompletionOutput, Logprob, RequestOutput
from xllm.core.sampling import SamplingParams
from xllm.server import state as server_state
from xllm.server.body import read
from xllm.server.disconnect import together, unless_gone
from xllm.server.fields import SamplingFields, refuse_unsupported
from xllm.server.generation import MAX_SEQUENCES, Job, Tally, Usage, check_sequences, new_id, outputs, whole
from xllm.server.logprobs import CompletionLogprobs, LegacyLogprobs, PublicLogprob, public_prompt_logprobs
from xllm.server.prompts import Prompt, split_prompts, tokenize, truncated
from xllm.server.sse import DONE, EventStream, frame
from xllm.server.state import ServerState

router = APIRouter()

DEFAULT_MAX_TOKENS = 16  # the API's

_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "suffix": (("",), "the model continues a text, it does not fill a gap"),
    "response_format": (({"type": "text"},), "constrained decoding is not available yet"),
}


class CompletionRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    prompt: str | list[str | int | list[int]]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: Any = None
    response_format: Any = None

    def check(self, state: ServerState) -> None:
        super().check(state)
        refuse_unsupported(self, _REFUSED)
        if self.best_of is not None and self.best_of != (1 if self.n is None else self.n):
            raise InvalidRequest(
                "best_of must equal n: there is no ranking of completions here", param="best_of"
            )
        if self.max_tokens == 0 and (not self.echo or self.stream):
            raise InvalidRequest(
                "max_tokens: 0 makes sense only with echo: true and without stream", param="max_tokens"
            )


class Choice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: list[dict[int, PublicLogprob] | None] | msgspec.UnsetType | None = msgspec.UNSET


class Completion(msgspec.Struct, kw_only=True):
    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    state = server_state.of(request)
    body = await read(request, CompletionRequest)
    body.check(state)
    call = Call(state, body)
    jobs = await unless_gone(request, call.jobs())
    if body.stream:
        return EventStream([call.frames(job) for job in jobs], call.tail)
    wholes = await unless_gone(request, together(*(whole(state, job, call.tally) for job in jobs)))
    return Response(msgspec.json.encode(call.answer(jobs, wholes)), media_type="application/json")


class Call:
    """One request to this endpoint."""

    def __init__(self, state: ServerState, body: CompletionRequest):
        self.state = state
        self.body = body
        self.id = new_id("cmpl")
        self.created = int(time.time())
        self.tally = Tally()
        self.n = 1 if body.n is None else body.n
        self.tokenizer = state.engine.tokenizer

    async def jobs(self) -> list[Job]:
        body = self.body
        items = split_prompts(body.prompt, MAX_SEQUENCES)
        check_sequences(len(items), self.n)
        prompts = [await self._prompt(item) for item in items]
        return [
            Job(
                id=self.id if len(prompts) == 1 else f"{self.id}-{i}",
                prompt=prompt,
                params=self._params(prompt),
                first_index=i * self.n,
                priority=body.priority or 0,
                deadline_s=body.deadline_s,
                cache_salt=body.cache_salt or "",
                targets=body.targets(self.state),
            )
            for i, prompt in enumerate(prompts)
        ]

    async def _prompt(self, item: str | list[int]) -> Prompt:
        body = self.body
        if isinstance(item, list):
            return Prompt(truncated(item, body.truncate_prompt_tokens, self.state), None)
        special = True if body.add_special_tokens is None else body.add_special_tokens
        ids = await tokenize(
            self.state, item, add_special_tokens=special, must_fit=body.truncate_prompt_tokens is None
        )
        await asyncio.sleep(0)  # between many prompts others get their turn
        return Prompt(truncated(ids, body.truncate_prompt_tokens, self.state), item)

    def _params(self, prompt: Prompt) -> SamplingParams:
        body = self.body
        room = self.state.max_model_len - len(prompt.ids)
        max_tokens = (
            max(1, min(DEFAULT_MAX_TOKENS, room)) if body.max_tokens is None else max(1, body.max_tokens)
        )
        if body.max_tokens is not None and body.max_tokens < 0:
            raise InvalidRequest("max_tokens must be at least 0", param="max_tokens")
        more = {}
        if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
            more["prompt_logprobs"] = body.logprobs
        return body.sampling(self.state, max_tokens=max_tokens, logprobs=body.logprobs, **more)

    # ---- whole

    def answer(self, jobs: list[Job], wholes: list[RequestOutput]) -> Completion:
        choices = []
        for job, result in zip(jobs, wholes, strict=True):
            for completion in result.outputs:
                if (
                    self.body.max_tokens == 0
                ):  # only the prompt was wanted; the engine makes one token at least
                    self.tally.completion -= len(completion.token_ids)
                    completion = CompletionOutput(completion.index, finish_reason="length", logprobs=[])
                choices.append(self._choice(job, completion, result.prompt_logprobs))
        return self._body(choices, self.tally.usage())

    def _body(self, choices: list[Choice], usage: Usage | msgspec.UnsetType | None) -> Completion:
        return Completion(
            id=self.id, created=self.created, model=self.state.model, choices=choices, usage=usage
        )

    def _choice(
        self, job: Job, done: CompletionOutput, prompt_logprobs: list[dict[int, Logprob] | None] | None
    ) -> Choice:
        printer = self._printer()
        logprobs = None
        if printer is not None:
            echoed = (job.prompt.ids, prompt_logprobs or []) if self.body.echo else ([], [])
            logprobs = printer.of([*echoed[0], *done.token_ids], [*echoed[1], *(done.logprobs or [])])
        text = self._echo(job) + done.text if self.body.echo else done.text
        choice = Choice(job.first_index + done.index, text, logprobs, done.finish_reason, done.stop_reason)
        if self.body.return_token_ids:
            choice.token_ids, choice.prompt_token_ids = done.token_ids, job.prompt.ids
        if self.body.prompt_logprobs is not None:
            choice.prompt_logprobs = public_prompt_logprobs(prompt_logprobs)
        return choice

    def _printer(self) -> LegacyLogprobs | None:
        return None if self.body.logprobs is None else LegacyLogprobs(self.tokenizer, self.body.logprobs)

    def _echo(self, job: Job) -> str:
        """The prompt as the client wrote it, unless it wrote ids or had it cut."""
        cut = self.body.truncate_prompt_tokens is not None
        if job.prompt.text is None or cut:
            return self.tokenizer.decode(job.prompt.ids)
        return job.prompt.text

    # ---- streamed

    async def frames(self, job: Job) -> AsyncGenerator[bytes, None]:
        printers: dict[int, LegacyLogprobs | None] = {}
        prompt_logprobs: list[dict[int, Logprob] | None] = []
        async with aclosing(outputs(self.state, job, self.tally)) as deltas:
            async for output in deltas:
                prompt_logprobs += output.prompt_logprobs or []
                for new in output.outputs:
                    started = new.index in printers
                    if not started and not new.token_ids and new.finish_reason is None:
                        continue  # the prompt's own logprobs may come in several pieces first
                    printer = printers.setdefault(new.index, self._printer())
                    choice = self._delta(job, new, printer, None if started else prompt_logprobs)
                    if choice is not None:
                        yield self._frame(choice)

    def _delta(
        self,
        job: Job,
        new: CompletionOutput,
        printer: LegacyLogprobs | None,
        prompt_logprobs: list[dict[int, Logprob] | None] | None,
    ) -> Choice | None:
        """What is new, or None when there is nothing to show. `prompt_logprobs` only with the first."""
        text, ids = new.text, new.token_ids
        positions: list[dict[int, Logprob] | None] = [*(new.logprobs or [])]
        if prompt_logprobs is not None and self.body.echo:
            text = self._echo(job) + text
            ids, positions = [*job.prompt.ids, *ids], [*prompt_logprobs, *positions]
        if not (text or new.finish_reason or (ids and (printer or self.body.return_token_ids))):
            return None
        logprobs = printer.of(ids, positions) if printer is not None else None
        choice = Choice(job.first_index + new.index, text, logprobs, new.finish_reason, new.stop_reason)
        if self.body.return_token_ids:
            choice.token_ids = new.token_ids
            if prompt_logprobs is not None:
                choice.prompt_token_ids = job.prompt.ids
        return choice

    def _frame(self, *choices: Choice, usage: Usage | msgspec.UnsetType | None = msgspec.UNSET) -> bytes:
        if usage is msgspec.UNSET and self.body.include_usage:
            usage = self.tally.usage() if self.body.continuous_usage else None
        return frame(self._body(list(choices), usage))

    def tail(self) -> bytes:
        return (self._frame(usage=self.tally.usage()) if self.body.include_usage else b"") + DONE
