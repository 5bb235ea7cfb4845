"""A front end whose requests go from one engine to another in the middle: readers see no seam."""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest

from tests import checkpoints
from tests.engine.bare import Engine, Heard, open_engine, options_for
from xllm.core.output import RequestOutput
from xllm.core.sampling import SamplingParams
from xllm.core.seeds import SeedSource
from xllm.engine.async_llm import AsyncLLM
from xllm.engine.build import decide
from xllm.engine.checkpoint import open_tokenizer
from xllm.engine.client import InlineClient
from xllm.engine.outputs import OutputProcessor, collect
from xllm.text.tokenizer import Tokenizer
from xllm.wire.messages import Abort, Message, Submit, SubmitMany

LENGTH = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.save_qwen3(tmp_path_factory.mktemp("qwen3"))


class Moving:
    """One front end over two engines: what the first has begun goes on at the second after so many outputs."""

    def __init__(self, first: Engine, second: Engine, tokenizer: Tokenizer):
        self.first, self.second, self.tokenizer = first, second, tokenizer

    def generate(self, prompt: list[int], params: SamplingParams, cut: int, *, stream: bool) -> RequestOutput:
        front = OutputProcessor(self.tokenizer)
        seeds = SeedSource(7)
        running = {
            id: Submit(request_id=id, prompt_token_ids=prompt, params=child, seed=None if child.seed is not None else seeds.draw())
            for id, child in front.add("r", None, prompt, params, 0.0, stream=stream)
        }  # fmt: skip
        heard = {id: Heard() for id in running}
        self.first.client.send(SubmitMany(requests=list(running.values())))
        deltas: list[RequestOutput] = []
        at = self.first
        while len(front):
            news = at.news()
            for output in news:
                if output.request_id in running:
                    heard[output.request_id].add(output)
                    if output.finish is not None:
                        del running[output.request_id]
            found, aborted = front.process(news)
            deltas += found
            at.client.send(Abort(request_ids=aborted))
            running = {id: one for id, one in running.items() if id not in aborted}
            if at is self.first and any(self._came_far(one, cut) for one in heard.values()):
                at.client.send(Abort(request_ids=list(running)))
                at = self.second
                at.client.send(
                    SubmitMany(requests=[self._rest(one, heard[id]) for id, one in running.items()])
                )
        for engine in (self.first, self.second):
            while engine.client.pulse()[0].busy:
                engine.news()
        return collect(deltas)

    def _came_far(self, heard: Heard, cut: int) -> bool:
        return len(heard.tokens) >= max(cut, 1) or (cut == 0 and bool(heard.prompt_logprobs))

    def _rest(self, one: Submit, heard: Heard) -> Submit:
        return msgspec.structs.replace(
            one, output_token_ids=heard.tokens, num_prompt_logprobs=len(heard.prompt_logprobs)
        )


@pytest.fixture(scope="module")
def moving(model) -> Iterator[Moving]:
    options: dict[str, Any] = {"long_prefill_token_threshold": 3, "enable_prefix_caching": False}
    with open_engine(model, "graphs", **options) as first, open_engine(model, "cpu", **options) as second:
        asked = options_for(model, "cpu")
        yield Moving(first, second, open_tokenizer(asked, decide(asked)))


SHOWN: dict[str, dict[str, Any]] = {
    "several": {"n": 3, "temperature": 1.0, "logprobs": 1},
    "several with seeds": {"n": 3, "temperature": 1.0, "seed": 5},
    "stop string": {"temperature": 1.0, "seed": 3, "stop": ["e"], "min_tokens": 4},
    "stop string shown": {"temperature": 1.0, "seed": 4, "stop": ["a"], "include_stop_str_in_output": True},
    "bad words": {"temperature": 1.0, "seed": 6, "bad_words": ["the", "e"]},
    "prompt scores": {"temperature": 0.0, "prompt_logprobs": 1, "logprobs": 2},
}


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("case", SHOWN)
def test_a_reader_sees_no_seam(moving, case, stream):
    params = SamplingParams(**{"max_tokens": LENGTH, "ignore_eos": True, **SHOWN[case]})
    prompt = moving.tokenizer.encode("one two three four the cat and the hat")
    exact = moving.generate(prompt, params, 10**6, stream=stream)
    for cut in (0, 1, 2, 7, LENGTH - 1):
        found = moving.generate(prompt, params, cut, stream=stream)
        assert found.finished and found.error is None
        for ours, theirs in zip(found.outputs, exact.outputs, strict=True):
            assert (ours.index, ours.text, ours.token_ids) == (theirs.index, theirs.text, theirs.token_ids)
            assert (ours.finish_reason, ours.stop_reason) == (theirs.finish_reason, theirs.stop_reason)
            assert _ids(ours.logprobs) == _ids(theirs.logprobs)
            assert ours.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, abs=1e-3)
        assert _ids(found.prompt_logprobs) == _ids(exact.prompt_logprobs)


def _ids(entries: Sequence[dict[int, Any] | None] | None) -> list[list[int] | None] | None:
    return None if entries is None else [None if entry is None else list(entry) for entry in entries]


async def test_the_front_end_draws_the_seeds_that_the_engine_would_have(model):
    """So a client may let another engine go on, and users see what they have always seen."""

    sent: list[Message] = []

    class Recording(InlineClient):
        def send(self, message: Message) -> None:
            sent.append(message)
            super().send(message)

    config = decide(options_for(model, "cpu", seed=9))
    params = SamplingParams(temperature=1.0, max_tokens=LENGTH, ignore_eos=True, n=2)
    asked = options_for(model, "cpu", seed=9)
    llm = AsyncLLM(asked, config, Recording(config), open_tokenizer(asked, config))
    try:
        deltas = [delta async for delta in llm.generate("the cat", params)]
    finally:
        await llm.shutdown()
    submits = [message for message in sent if isinstance(message, Submit)]
    assert None not in [one.seed for one in submits]
    plain = [msgspec.structs.replace(one, seed=None) for one in submits]
    with open_engine(model, "cpu", seed=9) as engine:
        found = engine.run(plain)
    shown = collect(deltas).outputs
    assert [one.token_ids for one in shown] == [found[one.request_id].tokens for one in submits]
