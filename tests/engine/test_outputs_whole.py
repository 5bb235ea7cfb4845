"""Requests that do not stream: one output at the end, the same as all deltas of a stream put together."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text import trained
from xllm.core.output import Finish, RequestOutput, SequenceOutput
from xllm.core.plan import TokenLogprobs
from xllm.core.sampling import SamplingParams
from xllm.engine import outputs as module
from xllm.engine.outputs import OutputProcessor, collect
from xllm.text.tokenizer import Tokenizer

TOKENIZERS = [Tokenizer(trained.backend(kind)) for kind in ("byte-level", "metaspace")]
BYTES = TOKENIZERS[0]
PROMPT = BYTES.encode("The prompt")


@dataclass
class Asked:
    """A request, and per completion the steps in which its tokens come, each with the preemptions before it."""

    params: SamplingParams
    steps: list[list[tuple[list[int], int]]]
    finishes: list[Finish | None]  # None: runs until somebody ends it

    def news(self, id: str) -> list[list[SequenceOutput]]:
        """As the scheduler tells it, by completion."""
        return [self._news(f"{id}/{i}", i, steps) for i, steps in enumerate(self.steps)]

    def _news(self, id: str, index: int, steps: list[tuple[list[int], int]]) -> list[SequenceOutput]:
        news, finish = [], self.finishes[index]
        owed = [] if index or self.params.prompt_logprobs is None else scores(PROMPT[1:])
        if owed:
            news.append(SequenceOutput(id, prompt_logprobs=owed[:2]))
        for number, (ids, preemptions) in enumerate(steps):
            at_first: dict[str, Any] = {}
            if number == 0:
                at_first = {
                    "prompt_logprobs": owed[2:],
                    "num_cached_tokens": 3,
                    "queued_s": 0.5,
                    "prefill_s": 0.25,
                }
            last = finish if number == len(steps) - 1 and finish in (Finish.STOP, Finish.LENGTH) else None
            news.append(
                SequenceOutput(
                    id, ids, () if self.params.logprobs is None else scores(ids), finish=last,
                    stop_reason=ids[-1] if last is Finish.STOP else None, num_preemptions=preemptions, **at_first,
                )
            )  # fmt: skip
        if finish in (Finish.ABORT, Finish.ERROR):
            error = "no finite logits" if finish is Finish.ERROR else None
            news.append(
                SequenceOutput(
                    id, num_cached_tokens=3, finish=finish, error=error, num_preemptions=steps[-1][1]
                )
            )
        return news


def scores(ids: Sequence[int]) -> list[TokenLogprobs]:
    return [TokenLogprobs([id, id + 1, 5], [-0.1 * (id % 7), -0.5, -2.0], 1 + id % 3) for id in ids]


@st.composite
def asked(draw: st.DrawFn) -> Asked:
    n = draw(st.integers(1, 3))
    params = SamplingParams(
        n=n,
        stop=draw(st.lists(st.text("ab 好o", min_size=1, max_size=3), max_size=2)),
        include_stop_str_in_output=draw(st.booleans()),
        min_tokens=draw(st.integers(0, 4)),
        max_tokens=64,
        logprobs=draw(st.none() | st.integers(0, 2)),
        prompt_logprobs=draw(st.none() | st.just(0)),
        skip_special_tokens=draw(st.booleans()),
    )
    ids = st.integers(0, 430) | st.sampled_from(BYTES.encode("a b好😀oab"))
    step = st.tuples(st.lists(ids, min_size=1, max_size=3), st.integers(0, 1))
    steps, finishes = [], []
    for _ in range(n):
        mine = draw(st.lists(step, min_size=1, max_size=12))
        preempted = itertools.accumulate(times for _, times in mine)
        steps.append([(tokens, times) for (tokens, _), times in zip(mine, preempted, strict=True)])
        finishes.append(draw(st.none() | st.sampled_from(Finish)))
    return Asked(params, steps, finishes)


Event = tuple[str, str | list[SequenceOutput]]  # what to call on the processor, and with what


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Asked], list[Event]]:
    """Requests whose news come interleaved, several in one `process`, with aborts and cancels in between."""
    requests = draw(st.lists(asked(), min_size=1, max_size=3))
    queues = [queue for i, one in enumerate(requests) for queue in one.news(str(i))]
    dice = random.Random(draw(st.integers(0, 2**32)))
    events: list[Event] = []
    while queues:
        batch = []
        for queue in list(queues):
            if dice.random() < 0.8:
                batch.append(queue.pop(0))
            if not queue:
                queues.remove(queue)
        events.append(("process", batch))
        if dice.random() < 0.1:
            events.append((dice.choice(["abort", "cancel"]), str(dice.randrange(3))))
    return requests, [*events, ("fail_all", "gone")]


def play(
    tokenizer: Tokenizer | None, requests: list[Asked], events: list[Event], *, stream: bool
) -> tuple[dict[str, list[RequestOutput]], list[list[str]]]:
    """-> what came by request, and what was to be aborted by event."""
    outputs = OutputProcessor(tokenizer, clock=itertools.count(100).__next__)
    for i, one in enumerate(requests):
        outputs.add(str(i), "The prompt", PROMPT, one.params, arrival=1.0, stream=stream)
    came: dict[str, list[RequestOutput]] = {}
    aborts: list[list[str]] = []
    for name, argument in events:
        answer = getattr(outputs, name)(argument)
        deltas, ids = {"abort": ([], answer), "fail_all": (answer, [])}.get(name, answer)
        aborts.append(ids)
        for delta in deltas:
            came.setdefault(delta.request_id, []).append(delta)
    assert len(outputs) == 0 and outputs.child_ids() == [] and not outputs._held
    return came, aborts


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte-level", "metaspace"])
@settings(max_examples=150, deadline=None)
@given(history=histories(), first=st.integers(1, 3))
def test_the_whole_is_the_collected_stream(
    tokenizer: Tokenizer, history: tuple[list[Asked], list[Event]], first: int
):
    requests, events = history
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "HELD_TOKENS", range(first, first + 4))
        streamed, streamed_aborts = play(tokenizer, requests, events, stream=True)
        whole, aborts = play(tokenizer, requests, events, stream=False)
    assert aborts == streamed_aborts
    ended = {id: deltas for id, deltas in streamed.items() if deltas[-1].finished}  # others were aborted
    assert whole == {id: [collect(deltas)] for id, deltas in ended.items()}


def test_tokens_are_looked_at_many_at_a_time():
    outputs = OutputProcessor(BYTES)
    outputs.add("r", None, PROMPT, SamplingParams(max_tokens=500), arrival=1.0, stream=False)
    child = outputs._owners["r/0"].children["r/0"]
    looks = 0
    advance = child.advance

    def count(output: SequenceOutput):
        nonlocal looks
        looks += 1
        return advance(output)

    child.advance = count  # type: ignore[method-assign]
    ids = BYTES.encode("a fox " * 100)
    for id in ids[:-1]:
        assert outputs.process([SequenceOutput("r/0", [id])]) == ([], [])
    [whole], _ = outputs.process([SequenceOutput("r/0", ids[-1:], finish=Finish.LENGTH)])
    assert (whole.outputs[0].text, whole.outputs[0].token_ids) == ("a fox " * 100, ids)
    assert looks < 2 + len(ids) / module.HELD_TOKENS.start


def test_sequences_that_start_together_are_looked_at_in_different_steps():
    outputs = OutputProcessor(BYTES)
    for i in range(64):
        outputs.add(str(i), None, PROMPT, SamplingParams(max_tokens=500), arrival=1.0, stream=False)
    most = 0
    for step in range(200):
        lengths = {id: len(held.token_ids) for id, held in outputs._held.items()}
        outputs.process([SequenceOutput(f"{i}/0", [70]) for i in range(64)])
        looked = sum(len(outputs._held[id].token_ids) < length for id, length in lengths.items())
        most = max(most, looked if step else 0)
    assert 0 < most <= 16


def test_a_broken_text_still_ends_its_request_once(monkeypatch: pytest.MonkeyPatch):
    outputs = OutputProcessor(BYTES)
    outputs.add("r", None, PROMPT, SamplingParams(n=2), arrival=1.0, stream=False)
    outputs.process([SequenceOutput("r/0", [70]), SequenceOutput("r/1", [70])])
    outputs.process([SequenceOutput("r/0", [71]), SequenceOutput("r/1", [72])])
    honest = BYTES.pieces.later
    monkeypatch.setattr(BYTES.pieces, "later", lambda id: 1 / 0 if id == 71 else honest(id))
    [whole], aborts = outputs.process([SequenceOutput("r/0", [73], finish=Finish.LENGTH)])
    assert whole.finished and "internal error" in (whole.error or "")
    assert [(c.index, c.finish_reason, c.token_ids) for c in whole.outputs] == [
        (0, "error", [70]),
        (1, "error", [70, 72]),
    ]
    assert aborts == ["r/1"] and not outputs._held
