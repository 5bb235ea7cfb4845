"""POST /v1/chat/completions: the next message of a conversation."""

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response

from xllm.core.errors import InvalidRequest
from xllm.core.output import CompletionOutput, Logprob, RequestOutput
from xllm.core.sampling import SamplingParams
from xllm.server import state as server_state
from xllm.server.body import read
from xllm.server.disconnect import unless_gone
from xllm.server.fields import SamplingFields, refuse_unsupported
from xllm.server.generation import Job, Tally, Usage, new_id, outputs, whole
from xllm.server.logprobs import ChatLogprobs, PublicLogprob, chat_logprobs, public_prompt_logprobs
from xllm.server.prompts import Prompt, render_chat, tokenize, truncated
from xllm.server.sse import DONE, EventStream, frame
from xllm.server.state import ServerState

router = APIRouter()

Unset = msgspec.UnsetType
UNSET = msgspec.UNSET

_NO_TOOLS = "calling tools is not available yet; send the request without tools or with tool_choice: none"
_TEXT_ONLY = "the model reads and writes text only"

_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "response_format": (
        ({"type": "text"},),
        "constrained decoding (JSON schemas and objects) is not available yet",
    ),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "function_call": (("none", "auto"), _NO_TOOLS),
    "modalities": ((["text"],), _TEXT_ONLY),
    "audio": ((), _TEXT_ONLY),
    "reasoning_effort": (("none",), "the model has no levels of reasoning; see chat_template_kwargs"),
    "verbosity": (("medium",), "the model has no levels of verbosity"),
    "web_search_options": ((), "nothing is searched here"),
}


class ChatRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    messages: list[dict[str, Any]]
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    parallel_tool_calls: Any = None  # harmless: there are no tool calls
    tool_choice: Any = None
    response_format: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    def check(self, state: ServerState) -> None:
        super().check(state)
        refuse_unsupported(self, _REFUSED)
        if self.tools and self.tool_choice != "none":
            raise InvalidRequest(
                f"`tools` is not supported: {_NO_TOOLS}", param="tools", code="unsupported_field"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequest(
                "max_tokens and max_completion_tokens differ; send one of them", param="max_tokens"
            )

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class Message(msgspec.Struct):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class Delta(msgspec.Struct, omit_defaults=True):
    role: Literal["assistant"] | Unset = UNSET
    content: str | Unset = UNSET


class Choice(msgspec.Struct):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: list[int] | Unset = UNSET


class ChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | Unset | None = UNSET
    token_ids: list[int] | Unset = UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    prompt_logprobs: list[dict[int, PublicLogprob] | None] | Unset | None = UNSET
    prompt_token_ids: list[int] | Unset = UNSET


class Chunk(msgspec.Struct, kw_only=True):
    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | Unset | None = UNSET
    prompt_token_ids: list[int] | Unset = UNSET


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    state = server_state.of(request)
    body = await read(request, ChatRequest)
    body.check(state)
    call = Call(state, body)
    with _named_messages():
        job = await unless_gone(request, call.job())
        if body.stream:
            return EventStream([call.frames(job)], call.tail)
        result = await unless_gone(request, whole(state, job, call.tally))
    return Response(msgspec.json.encode(call.answer(job, result)), media_type="application/json")


@contextmanager
def _named_messages() -> Iterator[None]:
    """What the engine calls the prompt, the client knows as its messages."""
    try:
        yield
    except InvalidRequest as e:
        e.param = "messages" if e.param == "prompt" else e.param
        raise


class Call:
    """One request to this endpoint."""

    def __init__(self, state: ServerState, body: ChatRequest):
        self.state = state
        self.body = body
        self.id = new_id("chatcmpl")
        self.created = int(time.time())
        self.tally = Tally()
        self.top = body.top_logprobs or 0

    async def job(self) -> Job:
        body, state = self.body, self.state
        text = await render_chat(state, body.messages, body)
        special = bool(body.add_special_tokens)  # the template has put in its own
        ids = await tokenize(
            state, text, add_special_tokens=special, must_fit=body.truncate_prompt_tokens is None
        )
        ids = truncated(ids, body.truncate_prompt_tokens, state)
        return Job(
            id=self.id,
            prompt=Prompt(ids, text),
            params=self._params(len(ids)),
            priority=body.priority or 0,
            deadline_s=body.deadline_s,
            cache_salt=body.cache_salt or "",
            targets=body.targets(self.state),
        )

    def _params(self, prompt_tokens: int) -> SamplingParams:
        """Without a limit of the request's own, the model's, and within that what is left of the context."""
        limit = self.body.limit
        if limit is None and (usual := self.state.default_params.get("max_tokens")) is not None:
            limit = max(1, min(usual, self.state.max_model_len - prompt_tokens))
        return self.body.sampling(
            self.state, max_tokens=limit, logprobs=self.top if self.body.logprobs else None
        )

    # ---- whole

    def answer(self, job: Job, result: RequestOutput) -> ChatCompletion:
        made = ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.state.model,
            choices=[self._choice(c) for c in result.outputs],
            usage=self.tally.usage(),
        )
        if self.body.prompt_logprobs is not None:
            made.prompt_logprobs = public_prompt_logprobs(result.prompt_logprobs)
        if self.body.return_token_ids:
            made.prompt_token_ids = job.prompt.ids
        return made

    def _choice(self, done: CompletionOutput) -> Choice:
        logprobs = self._logprobs(done.token_ids, done.logprobs or [])
        choice = Choice(done.index, Message(done.text), logprobs, done.finish_reason, done.stop_reason)
        if self.body.return_token_ids:
            choice.token_ids = done.token_ids
        return choice

    def _logprobs(self, ids: list[int], positions: list[dict[int, Logprob]]) -> ChatLogprobs | None:
        if not self.body.logprobs:
            return None
        return chat_logprobs(self.state.engine.tokenizer, ids, positions, self.top)

    # ---- streamed

    async def frames(self, job: Job) -> AsyncGenerator[bytes, None]:
        begun: set[int] = set()
        with _named_messages():
            async with aclosing(outputs(self.state, job, self.tally)) as deltas:
                async for output in deltas:
                    made = b""
                    for new in output.outputs:
                        if new.index not in begun:
                            made += self._first(job, new.index, first_of_all=not begun)
                            begun.add(new.index)
                        if (choice := self._delta(new)) is not None:
                            made += self._frame([choice])
                    if made:
                        yield made

    def _first(self, job: Job, index: int, *, first_of_all: bool) -> bytes:
        ids = job.prompt.ids if self.body.return_token_ids and first_of_all else UNSET
        return self._frame([ChunkChoice(index, Delta(role="assistant", content=""))], prompt_token_ids=ids)

    def _delta(self, new: CompletionOutput) -> ChunkChoice | None:
        shows_ids = new.token_ids and (self.body.logprobs or self.body.return_token_ids)
        if not (new.text or new.finish_reason or shows_ids):
            return None
        choice = ChunkChoice(new.index, Delta(content=new.text or UNSET), finish_reason=new.finish_reason)
        if new.finish_reason is not None:
            choice.stop_reason = new.stop_reason
        if new.token_ids:
            choice.logprobs = self._logprobs(new.token_ids, new.logprobs or [])
            if self.body.return_token_ids:
                choice.token_ids = new.token_ids
        return choice

    def _frame(
        self,
        choices: list[ChunkChoice],
        *,
        usage: Usage | Unset | None = UNSET,
        prompt_token_ids: list[int] | Unset = UNSET,
    ) -> bytes:
        if usage is UNSET and self.body.include_usage:
            usage = self.tally.usage() if self.body.continuous_usage else None
        return frame(
            Chunk(
                id=self.id,
                created=self.created,
                model=self.state.model,
                choices=choices,
                usage=usage,
                prompt_token_ids=prompt_token_ids,
            )
        )

    def tail(self) -> bytes:
        return (self._frame([], usage=self.tally.usage()) if self.body.include_usage else b"") + DONE
