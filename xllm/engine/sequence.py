"""The front end's side of one sequence: tokens become text, stop strings end it, log-probabilities get names."""

from collections.abc import Sequence

import msgspec

from xllm.core.errors import InvalidRequest
from xllm.core.output import CompletionOutput, Finish, Logprob, SequenceOutput
from xllm.core.plan import TokenLogprobs
from xllm.core.sampling import SamplingParams
from xllm.core.seeds import GOLDEN, mix
from xllm.text.detokenize import IncrementalDetokenizer
from xllm.text.stop import StopMatcher
from xllm.text.tokenizer import Tokenizer, check_text


class Child:
    """One of a request's `n` completions. Raises `InvalidRequest` for stop strings without a text."""

    def __init__(
        self,
        id: str,
        index: int,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
    ):
        self.id = id
        self.index = index
        self.num_preemptions = 0
        self._params = params
        self._tokenizer = tokenizer
        self._num_tokens = 0
        self._cumulative = None if params.logprobs is None else 0.0
        self._detokenizer: IncrementalDetokenizer | None = None
        self._matcher: StopMatcher | None = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = IncrementalDetokenizer(
                tokenizer, prompt_token_ids, params.skip_special_tokens
            )
        if params.stop_strings:
            if self._detokenizer is None:
                raise InvalidRequest("stop strings need detokenize=True and a tokenizer", param="stop")
            self._matcher = StopMatcher(params.stop_strings, params.include_stop_str_in_output)

    def advance(self, output: SequenceOutput) -> CompletionOutput:
        """What is new, up to and with the token that completed a stop string.

        A token that ended the sequence by itself (end of sequence, `stop_token_ids`) counts as a token but
        shows no text, unless `include_stop_str_in_output`.
        """
        news = self._news()
        silent = output.finish is Finish.STOP and not self._params.include_stop_str_in_output
        for i, token_id in enumerate(output.token_ids):
            news.token_ids.append(token_id)
            if news.logprobs is not None:
                news.logprobs.append(self._name(output.logprobs[i]))
                self._cumulative = (self._cumulative or 0.0) + output.logprobs[i].logprobs[0]
            self._num_tokens += 1
            if silent and i == len(output.token_ids) - 1:
                break
            text, matched = self._show(token_id)
            news.text += text
            if matched is not None:
                news.cumulative_logprob = self._cumulative
                news.finish_reason, news.stop_reason = Finish.STOP.value, matched
                return news
        news.cumulative_logprob = self._cumulative
        if output.finish is not None:
            self._end(news, output.finish)
            news.stop_reason = output.stop_reason
        return news

    def end(self, finish: Finish) -> CompletionOutput:
        """The last news of a sequence that is ended from here."""
        news = self._news()
        news.cumulative_logprob = self._cumulative
        self._end(news, finish)
        return news

    def name_prompt(self, entries: Sequence[TokenLogprobs]) -> list[dict[int, Logprob] | None]:
        return [self._name(entry) for entry in entries]

    def _news(self) -> CompletionOutput:
        return CompletionOutput(index=self.index, logprobs=None if self._params.logprobs is None else [])

    def _show(self, token_id: int) -> tuple[str, str | None]:
        if self._detokenizer is None:
            return "", None
        text = self._detokenizer.push((token_id,))
        if self._matcher is None:
            return text, None
        return self._matcher.push(text, armed=self._num_tokens > self._params.min_tokens)

    def _end(self, news: CompletionOutput, finish: Finish) -> None:
        """Show what was held back: nothing more comes that could make a character or a stop string of it."""
        rest = self._detokenizer.finish() if self._detokenizer else ""
        if self._matcher:
            rest = self._matcher.push(rest, armed=False)[0] + self._matcher.finish()
        news.text += rest
        news.finish_reason = finish.value

    def _name(self, entry: TokenLogprobs) -> dict[int, Logprob]:
        """By token id: the token itself, then the most likely ones, which rank 1, 2, ..."""
        text = self._tokenizer.token_text if self._tokenizer else _nameless
        token_id = entry.token_ids[0]
        named = {token_id: Logprob(entry.logprobs[0], entry.rank, text(token_id))}
        for rank in range(1, len(entry.token_ids)):
            token_id = entry.token_ids[rank]
            if token_id not in named:
                named[token_id] = Logprob(entry.logprobs[rank], rank, text(token_id))
        return named


def _nameless(token_id: int) -> None:
    return None


def child_params(params: SamplingParams, index: int, tokenizer: Tokenizer | None) -> SamplingParams:
    """What the engine is to do for completion `index`: one sequence, ids instead of words, its own seed.

    The first keeps the request's seed and alone computes prompt log-probabilities, which are the same for
    all. Raises `InvalidRequest` for bad words without a tokenizer.
    """
    bad_words = [*(params.bad_words_token_ids or ()), *_tokenise(params.bad_words or (), tokenizer)]
    return msgspec.structs.replace(
        params,
        n=1,
        seed=None if params.seed is None else _derive(params.seed, index),
        bad_words=None,
        bad_words_token_ids=bad_words or None,
        prompt_logprobs=None if index else params.prompt_logprobs,
    )


def _tokenise(words: Sequence[str], tokenizer: Tokenizer | None) -> list[list[int]]:
    """Each word at the beginning of a text, and behind a space where that makes other tokens."""
    if words and tokenizer is None:
        raise InvalidRequest("bad_words needs a tokenizer", param="bad_words")
    sequences: list[list[int]] = []
    for word in words:
        assert tokenizer is not None
        check_text(word, "bad_words")
        bare = word.lstrip() or word
        for text in (bare, " " + bare):
            token_ids = tokenizer.encode(text, add_special_tokens=False)
            if token_ids and token_ids not in sequences:
                sequences.append(token_ids)
    return sequences


def _derive(seed: int, index: int) -> int:
    """splitmix64 of the pair, so that neighbouring seeds do not share children; the first keeps the seed."""
    if index == 0:
        return seed
    return mix(seed + index * GOLDEN)
