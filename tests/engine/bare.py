"""An engine core in this process without a front end: what it is told and what it says of each sequence."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.engine.test_equality import BACKENDS
from xllm.config.options import EngineOptions
from xllm.core.output import Finish, SequenceOutput
from xllm.core.plan import TokenLogprobs
from xllm.engine.build import decide
from xllm.engine.client import InlineClient
from xllm.wire.messages import Outputs, Submit, SubmitMany


@dataclass
class Heard:
    """All that an engine has said of one sequence."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    last: SequenceOutput | None = None

    def add(self, output: SequenceOutput) -> None:
        self.tokens += output.token_ids
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        self.last = output

    @property
    def end(self) -> tuple[Finish | None, int | None]:
        assert self.last is not None
        return self.last.finish, self.last.stop_reason


class Engine:
    def __init__(self, client: InlineClient):
        self.client = client

    def news(self) -> Sequence[SequenceOutput]:
        message = self.client.receive(0.0)
        return message.outputs if isinstance(message, Outputs) else ()

    def run(self, requests: Sequence[Submit]) -> dict[str, Heard]:
        heard = {one.request_id: Heard() for one in requests}
        self.client.send(SubmitMany(requests=requests))
        left = set(heard)
        while left:
            for output in self.news():
                heard[output.request_id].add(output)
                if output.finish is not None:
                    left.remove(output.request_id)
        return heard


def options_for(model, backend: str, **changes: Any) -> EngineOptions:
    options = {"max_model_len": 64, "block_size": 8, "max_num_seqs": 8, "threads": 1, **changes}
    return EngineOptions(model=str(model), dtype="float32", **options, **BACKENDS[backend])


@contextlib.contextmanager
def open_engine(model, backend: str, **changes: Any) -> Iterator[Engine]:
    client = InlineClient(decide(options_for(model, backend, **changes)))
    try:
        yield Engine(client)
    finally:
        client.close()
