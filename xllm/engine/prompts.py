"""What a caller may pass as a prompt, and how it becomes token ids."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec

from xllm.core.errors import InvalidRequest
from xllm.text.tokenizer import Tokenizer

LONG_TEXT = 8192  # characters; beyond it tokenising moves to a thread, so that other streams go on


# a dict holds "prompt", or "prompt_token_ids", or ids with the text they came from
Prompt = str | Sequence[int] | Mapping[str, Any]


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many -> many. A sequence of integers is one prompt."""
    many = cast(Sequence[Prompt], prompts)
    if isinstance(prompts, (str, Mapping)) or (prompts and isinstance(many[0], int)):
        return [cast(Prompt, prompts)]
    return list(many)


class PromptReader:
    """Raises InvalidRequest for anything that is not one of the forms above, or that cannot be tokenised."""

    def __init__(self, tokenizer: Tokenizer | None, max_tokens: int):
        self._given = tokenizer
        self._max_tokens = max_tokens  # a text that surely has more is refused before any work on it

    @property
    def _tokenizer(self) -> Tokenizer:
        if self._given is None:
            raise InvalidRequest(
                "text needs a tokenizer, and this engine was started without", param="prompt"
            )
        return self._given

    def read(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """-> (the text if there was one, token ids)."""
        text, ids = _parts(prompt)
        if ids is not None:
            return text, ids
        assert text is not None
        self._tokenizer.check_length(text, self._max_tokens)
        return text, self._tokenizer.encode(text)

    async def read_async(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        text, ids = _parts(prompt)
        if ids is not None:
            return text, ids
        if text is not None and len(text) > LONG_TEXT:
            self._tokenizer.check_length(text, self._max_tokens)
            return text, await asyncio.to_thread(self._tokenizer.encode, text)
        return self.read(prompt)


def _parts(prompt: Prompt) -> tuple[str | None, list[int] | None]:
    if isinstance(prompt, str):
        return prompt, None
    if isinstance(prompt, Mapping):
        ids, text = prompt.get("prompt_token_ids"), prompt.get("prompt")
        unknown = set(prompt) - {"prompt", "prompt_token_ids"}
        if unknown or not isinstance(text, str | None) or (ids is None and text is None):
            raise InvalidRequest(
                'a prompt is a string, token ids, {"prompt": str} or {"prompt_token_ids": [int]}',
                param="prompt",
            )
        return text, None if ids is None else _ids(ids)
    return None, _ids(prompt)


def _ids(ids: Sequence[int]) -> list[int]:
    """A list of its own; compiled code looks at the types, for prompts are long."""
    try:
        if isinstance(ids, Sequence):
            return msgspec.convert(list(ids), list[int])
    except msgspec.ValidationError:
        pass
    raise InvalidRequest("prompt token ids must be a list of integers", param="prompt")
