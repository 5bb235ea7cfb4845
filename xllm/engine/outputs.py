"""From the engine's news of single sequences to what users see of their requests, as a stream or as a whole.

The engine core knows sequences only. A request for `n` completions is `n` of them here, named `<request>/0`
and so on, and ends when all have ended. Whoever streams and wants the whole answer too feeds the deltas to a
`Collector`. Who wants it at the end only says so to `add`: tokens are then held and looked at many at a time,
which is much cheaper, unless a stop string might be among them.
"""

import copy
import itertools
import logging
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import msgspec

from xllm.core.clock import Clock, monotonic
from xllm.core.output import CompletionOutput, Finish, Logprob, RequestMetrics, RequestOutput, SequenceOutput
from xllm.core.plan import TokenLogprobs
from xllm.core.sampling import SamplingParams
from xllm.engine.sequence import Child, child_params
from xllm.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)
# So many tokens are held of a sequence, each time another number of these: those that run in step are then looked at
# in different steps, which spreads the work.
HELD_TOKENS = range(32, 64)


@dataclass(slots=True, eq=False)
class _Open:
    """A request not all of whose completions have ended."""

    id: str
    prompt: str | None
    prompt_token_ids: list[int]
    metrics: RequestMetrics
    streams: bool
    whole: RequestOutput | None = None  # of one that does not stream: what has come so far
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # not yet handed out
    num_cached_tokens: int = 0
    children: dict[str, Child] = field(default_factory=dict)  # those still running, by their ids
    preemptions: dict[int, int] = field(default_factory=dict)  # by index, of all


@dataclass(slots=True, eq=False)
class _Held:
    """News of a sequence that were not looked at yet, up to `limit` tokens. The first token ever is not among them."""

    limit: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_preemptions: int = 0

    def add(self, output: SequenceOutput) -> None:
        self.token_ids += output.token_ids
        if output.logprobs:
            self.logprobs += output.logprobs
        self.num_preemptions = output.num_preemptions

    def within(self, last: SequenceOutput) -> SequenceOutput:
        """`last` as if all tokens had come with it."""
        return msgspec.structs.replace(last, token_ids=self.token_ids, logprobs=self.logprobs)


class OutputProcessor:
    """Keeps the text side of every request. Used from one thread; without a tokenizer there is no text.

    Every request that `add` returned for gets exactly one delta with `finished` set, and every completion
    exactly one `finish_reason`, whichever of `process`, `cancel` and `fail_all` ends it. That delta is the
    only one, and holds everything, of a request that does not stream. After `abort` nothing comes.
    """

    def __init__(self, tokenizer: Tokenizer | None, clock: Clock = monotonic):
        self._tokenizer = tokenizer
        self._clock = clock
        self._requests: dict[str, _Open] = {}
        self._owners: dict[str, _Open] = {}  # by child id
        self._held: dict[str, _Held] = {}  # by child id, of those whose tokens can wait
        self._limits = itertools.cycle(HELD_TOKENS)

    def add(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        arrival: float,
        *,
        stream: bool = True,
    ) -> list[tuple[str, SamplingParams]]:
        """Register a request; returns what to submit to the engine: an id and parameters per completion.

        Without `stream` nothing comes of it before its end.

        Raises `InvalidRequest` and registers nothing if the parameters ask for text that there is none of, or
        `ValueError` if the id is in use.
        """
        if request_id in self._requests:
            raise ValueError("the request id is in use")
        request = _Open(request_id, prompt, prompt_token_ids, RequestMetrics(arrival), stream)
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None]  # nothing predicts the first token
        submissions = []
        for index in range(params.n):
            child = Child(f"{request_id}/{index}", index, prompt_token_ids, params, self._tokenizer)
            request.children[child.id] = child
            submissions.append((child.id, child_params(params, index, self._tokenizer)))
        self._requests[request_id] = request
        self._owners |= dict.fromkeys(request.children, request)
        return submissions

    def process(self, outputs: Iterable[SequenceOutput]) -> tuple[list[RequestOutput], list[str]]:
        """At most one delta per request, and the child ids to abort in the engine, which knows of no end.

        News of sequences that are not, or no longer, known are dropped.
        """
        deltas: dict[str, RequestOutput] = {}
        aborts: list[str] = []
        for output in self._due(outputs):
            request = self._owners.get(output.request_id)
            if request is None:
                continue
            child = request.children[output.request_id]
            try:
                news = self._advance(request, child, output)
                error = output.error or "the engine could not finish the request"
                failed = news.finish_reason == Finish.ERROR
            except Exception as exception:
                _log_without_text(exception)
                news, failed, error = None, True, "an internal error while turning tokens into text"
            delta = self._delta(deltas, request)
            if news is not None:
                self._append(delta, request, child, news)
                if news.finished:
                    aborts += [child.id] if output.finish is None else []
                elif news.token_ids and child.can_wait and not request.streams:
                    self._held[child.id] = _Held(next(self._limits))
            if failed:
                aborts += [id for id in request.children if output.finish is None or id != child.id]
                self._end(delta, request, Finish.ERROR, error)
        return [delta for delta in deltas.values() if self._is_due(delta)], aborts

    def abort(self, request_id: str) -> list[str]:
        """Forget a request nobody listens to any more; returns the child ids to abort in the engine."""
        request = self._requests.get(request_id)
        if request is None:
            return []
        ids = list(request.children)
        self._forget(request)
        return ids

    def cancel(self, request_id: str) -> tuple[list[RequestOutput], list[str]]:
        """End a request with `abort` for whoever listens: the last delta, and the child ids to abort."""
        request = self._requests.get(request_id)
        if request is None:
            return [], []
        ids = list(request.children)
        return [self._end(self._delta({}, request), request, Finish.ABORT, None)], ids

    def fail_all(self, reason: str) -> list[RequestOutput]:
        """End every request with an error: the engine is gone."""
        open_requests = list(self._requests.values())
        return [
            self._end(self._delta({}, request), request, Finish.ERROR, reason) for request in open_requests
        ]

    def child_ids(self) -> list[str]:
        """Of every sequence that still runs."""
        return list(self._owners)

    def __len__(self) -> int:
        """Requests not finished yet."""
        return len(self._requests)

    def _due(self, outputs: Iterable[SequenceOutput]) -> Iterator[SequenceOutput]:
        """What is to be looked at now, with what was held before it; the rest is held."""
        held_of = self._held
        for output in outputs:
            held = held_of.get(output.request_id)
            if held is None:
                yield output
                continue
            held.add(output)
            if output.finish is not None or len(held.token_ids) >= held.limit:
                del held_of[output.request_id]
                yield held.within(output)

    def _is_due(self, delta: RequestOutput) -> bool:
        return delta.finished or (bool(delta.outputs) and self._requests[delta.request_id].streams)

    def _advance(self, request: _Open, child: Child, output: SequenceOutput) -> CompletionOutput:
        metrics = request.metrics
        if child.index == 0:
            request.num_cached_tokens = output.num_cached_tokens or request.num_cached_tokens
            metrics.queued_s = metrics.queued_s if output.queued_s is None else output.queued_s
            metrics.prefill_s = metrics.prefill_s if output.prefill_s is None else output.prefill_s
        preemptions = request.preemptions
        preemptions[child.index] = max(preemptions.get(child.index, 0), output.num_preemptions)
        metrics.num_preemptions = sum(preemptions.values())
        if request.prompt_logprobs is not None:
            request.prompt_logprobs += child.name_prompt(output.prompt_logprobs)
        if output.token_ids and metrics.first_token is None:
            metrics.first_token = self._clock()
        return child.advance(output)

    def _delta(self, deltas: dict[str, RequestOutput], request: _Open) -> RequestOutput:
        delta = deltas.get(request.id) or request.whole
        if delta is None:
            delta = RequestOutput(
                request_id=request.id,
                prompt=request.prompt,
                prompt_token_ids=request.prompt_token_ids,
                prompt_logprobs=None,
                outputs=[],
                finished=False,
                metrics=request.metrics,
            )
            request.whole = None if request.streams else delta
        deltas[request.id] = delta
        return delta

    def _append(self, delta: RequestOutput, request: _Open, child: Child, news: CompletionOutput) -> None:
        """Add news to a delta; news of neither tokens nor an end wait for the next."""
        if not news.token_ids and not news.finished:
            return
        if delta.outputs:
            _add_completion(delta.outputs, news)
        else:
            delta.outputs.append(news)  # made for this delta and held by nobody else
        if child.index == 0:
            delta.prompt_logprobs = delta.prompt_logprobs or request.prompt_logprobs
            request.prompt_logprobs = None
        if news.finished:
            del request.children[child.id], self._owners[child.id]
        if not request.children:
            self._forget(request)
            request.metrics.finished = self._clock()
            delta.finished = True
            if not request.streams:
                delta.outputs.sort(key=lambda completion: completion.index)
        delta.metrics = request.metrics.snapshot()  # the request's own changes later
        delta.num_cached_tokens = request.num_cached_tokens

    def _end(self, delta: RequestOutput, request: _Open, finish: Finish, error: str | None) -> RequestOutput:
        """End all completions that still run."""
        delta.error = error
        for child in list(request.children.values()):
            try:
                if held := self._held.pop(child.id, None):
                    output = held.within(SequenceOutput(child.id, num_preemptions=held.num_preemptions))
                    self._append(delta, request, child, self._advance(request, child, output))
                news = child.end(finish)
            except Exception as exception:
                _log_without_text(exception)
                news = CompletionOutput(index=child.index, finish_reason=finish.value)
            self._append(delta, request, child, news)
        return delta

    def _forget(self, request: _Open) -> None:
        for id in request.children:
            del self._owners[id]
            self._held.pop(id, None)
        self._requests.pop(request.id, None)


class Collector:
    """Puts a request's deltas together. `result` is the request so far, complete once `finished` is set."""

    def __init__(self) -> None:
        self._result: RequestOutput | None = None

    def add(self, delta: RequestOutput) -> None:
        if self._result is None:
            self._result = copy.copy(delta)
            self._result.outputs = []
        result = self._result
        for completion in delta.outputs:
            _add_completion(result.outputs, completion)
        result.outputs.sort(key=lambda completion: completion.index)
        result.finished, result.metrics = delta.finished, delta.metrics
        result.error = delta.error or result.error
        result.num_cached_tokens = delta.num_cached_tokens or result.num_cached_tokens
        if delta.prompt_logprobs is not None:
            result.prompt_logprobs = delta.prompt_logprobs

    @property
    def result(self) -> RequestOutput:
        """Raises `ValueError` before the first delta."""
        if self._result is None:
            raise ValueError("nothing has come yet")
        return self._result


def collect(deltas: Iterable[RequestOutput]) -> RequestOutput:
    """The whole of one request's deltas."""
    collector = Collector()
    for delta in deltas:
        collector.add(delta)
    return collector.result


def _add_completion(outputs: list[CompletionOutput], news: CompletionOutput) -> None:
    """Append news to the completion of the same index; `outputs` shares nothing with `news`."""
    known = next((completion for completion in outputs if completion.index == news.index), None)
    if known is None:
        known = CompletionOutput(index=news.index, logprobs=None if news.logprobs is None else [])
        outputs.append(known)
    known.text += news.text
    known.token_ids += news.token_ids
    if known.logprobs is not None:
        known.logprobs += news.logprobs or ()
    if news.cumulative_logprob is not None:
        known.cumulative_logprob = news.cumulative_logprob
    known.finish_reason = news.finish_reason or known.finish_reason
    if news.stop_reason is not None:
        known.stop_reason = news.stop_reason


def _log_without_text(exception: Exception) -> None:
    """Where it happened and of what kind; the message could hold a user's text."""
    where = "".join(traceback.format_tb(exception.__traceback__))
    log.error("detokenising a request failed with %s:\n%s", type(exception).__name__, where)
