"""From what a client sent to prompt token ids, without holding up the event loop."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from xllm.core.errors import InvalidRequest
from xllm.server.state import ServerState
from xllm.server.templates import request_template
from xllm.text.chat import ChatTemplate

T = TypeVar("T")

MAX_CHARS = 4 * 2**20  # of a text that need not fit the context
INLINE_CHARS = 4096  # handled within a millisecond or so; longer texts go to the thread


@dataclass(frozen=True, slots=True)
class Prompt:
    ids: list[int]
    text: str | None  # None: the client sent ids


class SaysChat(Protocol):
    """The fields of a request body that decide how its messages become a prompt."""

    chat_template: str | None
    chat_template_kwargs: dict[str, Any] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None


async def tokenize(state: ServerState, text: str, *, add_special_tokens: bool, must_fit: bool) -> list[int]:
    """Raises `InvalidRequest` without the work where the text could never fit, or is absurdly long."""
    tokenizer = state.engine.tokenizer
    if must_fit:
        tokenizer.check_length(text, state.max_model_len)
    elif len(text) > MAX_CHARS:
        raise InvalidRequest(
            f"at most {MAX_CHARS} characters are tokenised at once, not {len(text)}", param="prompt"
        )
    return await _off_loop(state, len(text), lambda: tokenizer.encode(text, add_special_tokens))


async def render_chat(state: ServerState, messages: Sequence[Mapping[str, Any]], chat: SaysChat) -> str:
    template = _template(state, chat.chat_template)
    foreign = chat.chat_template is not None
    size = INLINE_CHARS + 1 if foreign else sum(_size(message) for message in messages)
    return await _off_loop(state, size, lambda: _render(template(), messages, chat))


def _template(state: ServerState, own: str | None) -> Callable[[], ChatTemplate]:
    if own is not None:
        if not state.options.trust_request_chat_template:
            raise InvalidRequest(
                "chat_template is taken from requests only with --trust-request-chat-template",
                param="chat_template",
            )
        return lambda: request_template(state.engine.tokenizer, own)
    if state.chat_template is None:
        raise InvalidRequest(
            "the model has no chat template: use /v1/completions, or serve it with --chat-template"
        )
    return lambda: state.chat_template  # type: ignore[return-value]


def _render(template: ChatTemplate, messages: Sequence[Mapping[str, Any]], chat: SaysChat) -> str:
    going_on = bool(chat.continue_final_message)
    begin_new = not going_on if chat.add_generation_prompt is None else chat.add_generation_prompt
    return template.render(
        messages,
        add_generation_prompt=begin_new,
        continue_final_message=going_on,
        kwargs=chat.chat_template_kwargs,
    )


def _size(message: Mapping[str, Any]) -> int:
    content = message.get("content")
    if isinstance(content, str):
        return len(content)
    return INLINE_CHARS + 1 if content else 0


async def _off_loop(state: ServerState, size: int, work: Callable[[], T]) -> T:
    if size <= INLINE_CHARS:
        return work()
    return await asyncio.get_running_loop().run_in_executor(state.tokenizing, work)


def truncated(ids: list[int], keep: int | None, state: ServerState) -> list[int]:
    """The last `keep` tokens; -1 keeps what the context holds beside one new token."""
    if keep is None:
        return ids
    if keep == -1:
        return ids[-(state.max_model_len - 1) :]
    if not 1 <= keep < state.max_model_len:
        most = state.max_model_len - 1
        raise InvalidRequest(
            f"truncate_prompt_tokens must be -1 or lie between 1 and {most}", param="truncate_prompt_tokens"
        )
    return ids[-keep:]


def split_prompts(prompt: str | Sequence[str | int | list[int]], most: int) -> list[str | list[int]]:
    """One entry per prompt of the four shapes the API allows."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if kinds == {int}:
        return [list(prompt)]  # type: ignore[arg-type]
    if kinds not in ({str}, {list}):
        raise InvalidRequest(
            "prompt must be a string, a list of strings, token ids or a list of lists of token ids, and not empty",
            param="prompt",
        )
    if len(prompt) > most:
        raise InvalidRequest(
            f"prompt takes at most {most} prompts in one request, not {len(prompt)}", param="prompt"
        )
    return list(prompt)  # type: ignore[arg-type]
