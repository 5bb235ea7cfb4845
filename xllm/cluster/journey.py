"""One request on its way through a cluster: what it asked for, what has come back, and which instances had it.

A journey holds all that another instance needs to go on with it: the request as it came and the tokens so far.
"""

import dataclasses
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from msgspec.structs import replace

from xllm.cluster.pairing import Pairing
from xllm.cluster.view import Ask, Choice
from xllm.core.output import SequenceOutput
from xllm.core.peers import KvFrom
from xllm.wire.messages import Submit

CANDIDATES = 8  # whose numbers are kept of a choice, the best first
OUTPUT = 128  # tokens; who allows more is expected to answer with so many


class Incarnation(NamedTuple):
    """One process of an instance: what comes after a restart is another."""

    id: str
    epoch: int

    def __str__(self) -> str:
        return self.id


@dataclass(slots=True)
class Stage:
    """Its time on one instance. Times are of the router's monotonic clock."""

    at: Incarnation
    choice: Choice
    why: str  # it went there: "new", or what had happened where it was
    sent: float
    had: int = 0  # tokens that it came with
    first: float | None = None  # when the first token came from here
    ended: float | None = None
    tokens: int = 0  # from here
    cached: int | None = None  # tokens of the prompt, as the instance found
    queued_s: float | None = None
    prefill_s: float | None = None
    pairing: Pairing | None = None  # who was to help with its KV
    fetched: int = 0  # tokens of the prompt whose KV came from there
    fetch_s: float = 0.0


@dataclass(slots=True, eq=False)
class Journey:
    submit: Submit
    arrived: float
    block_size: int
    tokens: list[int] = field(default_factory=list)
    num_prompt_logprobs: int = 0
    stages: list[Stage] = field(default_factory=list)
    failures: int = 0  # instances that ended with it, or ended it with an error
    avoid: frozenset[str] = frozenset()  # those that ended it with an error
    lost_at: float | None = None  # since when it has no instance
    why: str = "new"  # it goes where it goes next
    prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.submit.prompt_token_ids)

    @property
    def id(self) -> str:
        return self.submit.request_id

    @property
    def at(self) -> Incarnation | None:
        """Where it is; None between two instances."""
        return None if self.lost_at is not None or not self.stages else self.stages[-1].at

    @property
    def name(self) -> str:
        """What the instance calls it: another name each time, so that late news of an earlier stay are known as such."""
        return self._name(len(self.stages) - 1)

    def _name(self, stage: int) -> str:
        return self.id if stage <= 0 else f"{self.id}~{stage}"

    def ask(self) -> Ask:
        """What the next instance that gets it has to compute and to hold, under the name that it will have there."""
        submit = self.submit
        ids = [*submit.prompt_token_ids, *self.tokens]
        longest = submit.params.max_tokens
        left = OUTPUT if longest is None else max(1, min(OUTPUT, longest - len(self.tokens)))
        return dataclasses.replace(
            Ask.of(self._name(len(self.stages)), ids, self.block_size, submit.cache_salt), expected_output=left,
            priority=submit.priority, ttft_s=submit.ttft_s, tpot_s=submit.tpot_s, avoid=self.avoid,
        )  # fmt: skip

    def begin(
        self, at: Incarnation, choice: Choice, now: float, helped: tuple[KvFrom, Pairing] | None = None
    ) -> Submit:
        """It goes to `at`, which has somebody to ask for KV. -> what is sent there."""
        kv_from, pairing = helped or (None, None)
        self.stages.append(Stage(at, choice, self.why, now, had=len(self.tokens), pairing=pairing))
        self.lost_at = None
        submit = replace(self.submit, kv_from=kv_from)
        waited_s = now - self.arrived
        if len(self.stages) == 1:
            return submit
        deadline_s = None if submit.deadline_s is None else submit.deadline_s - waited_s
        return replace(
            submit, request_id=self.name, output_token_ids=list(self.tokens), deadline_s=deadline_s,
            num_prompt_logprobs=self.num_prompt_logprobs, waited_s=submit.waited_s + waited_s,
        )  # fmt: skip

    def take(self, news: SequenceOutput, now: float) -> SequenceOutput:
        """News of it, under the name that it has here."""
        stage = self.stages[-1]
        if news.token_ids:
            if stage.first is None:
                stage.first = now
            stage.tokens += len(news.token_ids)
            self.tokens += news.token_ids
        if news.prompt_logprobs:
            self.num_prompt_logprobs += len(news.prompt_logprobs)
        if news.fetch_s:
            stage.fetched, stage.fetch_s = news.fetched_tokens, news.fetch_s
        if news.queued_s is not None:
            stage.queued_s, stage.prefill_s = news.queued_s, news.prefill_s
            stage.cached = news.num_cached_tokens
        if news.finish is not None:
            stage.ended = now
        return news if len(self.stages) == 1 else replace(news, request_id=self.id)

    def leave(self, why: str, now: float) -> None:
        """Its instance does not go on with it."""
        self.stages[-1].ended = now
        self.lost_at = now
        self.why = why

    def end(self) -> None:
        """Nobody goes on with it. What that would take is given up, as the story of some thousand requests is kept (`Decisions`)
        and their prompts together are large."""
        self.submit = replace(self.submit, prompt_token_ids=(), output_token_ids=())
        self.tokens = []
        for stage in self.stages:
            reasons = dict(islice(stage.choice.reasons.items(), CANDIDATES))
            stage.choice = dataclasses.replace(stage.choice, reasons=reasons)
