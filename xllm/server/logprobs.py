"""Log-probabilities in the two forms of the OpenAI API: that of completions, and that of chat."""

from collections.abc import Sequence

import msgspec

from xllm.core.output import Logprob
from xllm.text.tokenizer import Tokenizer

LOWEST = -9999.0  # what clients get for minus infinity, which JSON cannot say


class CompletionLogprobs(msgspec.Struct):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int] = []


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class PublicLogprob(msgspec.Struct):
    """One candidate of `prompt_logprobs`."""

    logprob: float
    rank: int | None
    decoded_token: str | None


def finite(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST


class LegacyLogprobs:
    """Keeps count of characters from piece to piece, for `text_offset`."""

    def __init__(self, tokenizer: Tokenizer, top: int, offset: int = 0):
        self._tokenizer = tokenizer
        self._top = top
        self._offset = offset

    def of(self, ids: Sequence[int], positions: Sequence[dict[int, Logprob] | None]) -> CompletionLogprobs:
        """A position is None where the model said nothing about the token: the first one of a prompt."""
        made = CompletionLogprobs(top_logprobs=[] if self._top else None)
        for id, candidates in zip(ids, positions, strict=False):
            token = self._tokenizer.token_text(id)
            made.tokens.append(token)
            made.text_offset.append(self._offset)
            self._offset += len(token)
            made.token_logprobs.append(None if candidates is None else finite(candidates[id].logprob))
            if made.top_logprobs is not None:
                made.top_logprobs.append(None if candidates is None else self._best(candidates))
        return made

    def _best(self, candidates: dict[int, Logprob]) -> dict[str, float]:
        """The chosen token and the most likely ones; of two ids with one text the likelier counts."""
        ranked = sorted(candidates.items(), key=lambda item: item[1].logprob)
        return {self._tokenizer.token_text(id): finite(c.logprob) for id, c in ranked}


def chat_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], positions: Sequence[dict[int, Logprob]], top: int
) -> ChatLogprobs:
    content = []
    for id, candidates in zip(ids, positions, strict=False):
        likeliest = sorted(candidates.items(), key=lambda item: -item[1].logprob)[:top]
        best = [TopLogprob(*_named(tokenizer, other, c.logprob)) for other, c in likeliest]
        content.append(TokenLogprob(*_named(tokenizer, id, candidates[id].logprob), best))
    return ChatLogprobs(content)


def _named(tokenizer: Tokenizer, id: int, logprob: float) -> tuple[str, float, list[int]]:
    return tokenizer.token_text(id), finite(logprob), list(tokenizer.token_bytes(id))


def public_prompt_logprobs(
    positions: Sequence[dict[int, Logprob] | None] | None,
) -> list[dict[int, PublicLogprob] | None] | None:
    if positions is None:
        return None
    return [
        None
        if p is None
        else {id: PublicLogprob(finite(c.logprob), c.rank, c.decoded_token) for id, c in p.items()}
        for p in positions
    ]
