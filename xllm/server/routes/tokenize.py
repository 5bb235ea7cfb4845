"""POST /tokenize and /detokenize: for clients that count tokens or build prompts themselves."""

from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from xllm.core.errors import InvalidRequest
from xllm.server import state as server_state
from xllm.server.body import read
from xllm.server.disconnect import unless_gone
from xllm.server.prompts import render_chat, tokenize
from xllm.server.state import ServerState

router = APIRouter()


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class TokenizeAnswer(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True):
    tokens: list[int]
    model: str | None = None
    skip_special_tokens: bool | None = None


class DetokenizeAnswer(msgspec.Struct):
    prompt: str


@router.post("/tokenize")
async def tokenize_text(request: Request) -> Response:
    state = server_state.of(request)
    body = await read(request, TokenizeRequest)
    state.check_model(body.model)
    ids = await unless_gone(request, _tokens(state, body))
    answer = TokenizeAnswer(len(ids), state.max_model_len, ids)
    if body.return_token_strs:
        answer.token_strs = [state.engine.tokenizer.token_text(id) for id in ids]
    return Response(msgspec.json.encode(answer), media_type="application/json")


async def _tokens(state: ServerState, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    if body.messages is None:
        assert body.prompt is not None
        special = True if body.add_special_tokens is None else body.add_special_tokens
        return await tokenize(state, body.prompt, add_special_tokens=special, must_fit=False)
    text = await render_chat(state, body.messages, body)
    return await tokenize(state, text, add_special_tokens=bool(body.add_special_tokens), must_fit=False)


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    state = server_state.of(request)
    body = await read(request, DetokenizeRequest)
    state.check_model(body.model)
    size = state.engine.tokenizer.vocab_size
    if body.tokens and (min(body.tokens) < 0 or max(body.tokens) >= size):
        raise InvalidRequest(f"token ids must lie between 0 and {size - 1}", param="tokens")
    text = state.engine.tokenizer.decode(body.tokens, skip_special_tokens=bool(body.skip_special_tokens))
    return Response(msgspec.json.encode(DetokenizeAnswer(text)), media_type="application/json")
