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
        self._prompt = prompt_token_ids
        self._params = params
        self._tokenizer = tokenizer if params.detokenize else None
        self._names = _nameless if tokenizer is None else tokenizer.token_text
        self._cumulative = None if params.logprobs is None else 0.0
        self._detokenizer: IncrementalDetokenizer | None = None  # made when the first token comes
        self._matcher: StopMatcher | None = None
        self._num_watched = 0  # tokens that the matcher has seen
        if params.stop_strings:
            if self._tokenizer is None:
                raise InvalidRequest("stop strings need detokenize=True and a tokenizer", param="stop")
            self._matcher = StopMatcher(params.stop_strings, params.include_stop_str_in_output)

    @property
    def can_wait(self) -> bool:
        """Whether its tokens may be looked at later than they come: no text can end it."""
        return self._matcher is None

    def advance(self, output: SequenceOutput) -> CompletionOutput:
        """What is new, up to and with the token that completed a stop string.

        A token that ended the sequence by itself (end of sequence, `stop_token_ids`) counts as a token but
        shows no text, unless `include_stop_str_in_output`.
        """
        news = self._news()
        token_ids = output.token_ids
        silent = output.finish is Finish.STOP and not self._params.include_stop_str_in_output
        shown = token_ids[:-1] if silent else token_ids
        if self._matcher is None:
            news.text = self._text(shown)
        else:
            token_ids = token_ids[: self._watch(self._matcher, shown, news)]
        news.token_ids += token_ids
        if news.logprobs is not None:
            for i in range(len(token_ids)):
                news.logprobs.append(self._name(output.logprobs[i]))
                self._cumulative = (self._cumulative or 0.0) + output.logprobs[i].logprobs[0]
        news.cumulative_logprob = self._cumulative
        if output.finish is not None and not news.finished:
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

    def _text(self, token_ids: Sequence[int]) -> str:
        if self._tokenizer is None:
            return ""
        if self._detokenizer is None:
            self._detokenizer = IncrementalDetokenizer(
                self._tokenizer, self._prompt, self._params.skip_special_tokens
            )
        return self._detokenizer.push(token_ids)

    def _watch(self, matcher: StopMatcher, token_ids: Sequence[int], news: CompletionOutput) -> int | None:
        """Put the tokens' text into `news`. Where one completes a stop string, end it there: -> how many it took."""
        for i, token_id in enumerate(token_ids):
            self._num_watched += 1
            armed = self._num_watched > self._params.min_tokens
            text, matched = matcher.push(self._text((token_id,)), armed)
            news.text += text
            if matched is not None:
                news.finish_reason, news.stop_reason = Finish.STOP.value, matched
                return i + 1
        return None

    def _end(self, news: CompletionOutput, finish: Finish) -> None:
        """Show what was held back: nothing more comes that could make a character or a stop string of it."""
        rest = self._detokenizer.finish() if self._detokenizer else ""
        if self._matcher:
            rest = self._matcher.push(rest, armed=False)[0] + self._matcher.finish()
        news.text += rest
        news.finish_reason = finish.value

    def _name(self, entry: TokenLogprobs) -> dict[int, Logprob]:
        """By token id: the token itself, then the most likely ones, which rank 1, 2, ..."""
        token_id = entry.token_ids[0]
        named = {token_id: Logprob(entry.logprobs[0], entry.rank, self._names(token_id))}
        for rank in range(1, len(entry.token_ids)):
            token_id = entry.token_ids[rank]
            if token_id not in named:
                named[token_id] = Logprob(entry.logprobs[rank], rank, self._names(token_id))
        return named


def _nameless(token_id: int) -> None:
    return None


def child_params(params: SamplingParams, index: int, tokenizer: Tokenizer | None) -> SamplingParams:
    """What the engine is to do for completion `index`: one sequence, ids instead of words, its own seed.

    The first keeps the request's seed and alone computes prompt log-probabilities, which are the same for
    all. Raises `InvalidRequest` for bad words without a tokenizer.
    """
    if params.n == 1 and not params.bad_words:
        return params  # a copy would be checked all over
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
