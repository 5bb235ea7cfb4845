"""A front end over modelled instances: what it asks, what it is answered, and whether that is right."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from xllm.cluster.client import ClusterClient
from xllm.cluster.status import InstanceStatus
from xllm.core.output import Finish, SequenceOutput
from xllm.core.sampling import SamplingParams
from xllm.engine.modelled import ModelledInstance, Shape
from xllm.engine.modelled_runner import Speed, answer
from xllm.wire.messages import Abort, Outputs, Reply, Submit

QUICK = Speed(base_s=0.003, token_s=0.0)
NOTICED_S = 3.0  # that an instance does not answer


class Front:
    """Whoever waits here (`until`) receives meanwhile; nobody else does."""

    def __init__(self, *instances: ModelledInstance, policy: str = "round_robin"):
        self.client = ClusterClient(policy, name="front")
        self.asked: dict[str, Submit] = {}
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.ends: dict[str, SequenceOutput] = {}
        self.replies: list[Reply] = []
        for one in instances:
            self.client.joined(one.info)
        if instances:
            self.until(
                lambda: all(self.state(one.id) == "serving" for one in instances), "all instances serve"
            )

    def ask(self, id: str, prompt: Iterable[int], max_tokens: int = 100, **more: Any) -> str:
        """An `id` that can be waited for: "r/0" is a completion of request "r"."""
        submit = Submit(
            request_id=id, prompt_token_ids=list(prompt),
            params=SamplingParams(max_tokens=max_tokens, temperature=0.0), **more,
        )  # fmt: skip
        self.client.send(submit)
        self.asked[id] = submit
        return id

    def ask_many(self, number: int, max_tokens: int = 100, name: str = "r") -> list[str]:
        """Prompts that have nothing in common."""
        return [
            self.ask(f"{name}{n}/0", [20 + n, len(self.asked), *range(100, 110)], max_tokens)
            for n in range(number)
        ]

    def abort(self, *ids: str) -> None:
        self.client.send(Abort(request_ids=ids))

    def hear(self, timeout_s: float = 0.05) -> None:
        message = self.client.receive(timeout_s)
        if isinstance(message, Outputs):
            for output in message.outputs:
                assert output.request_id in self.asked, f"nobody asked for {output.request_id}"
                assert output.request_id not in self.ends, "news after the end"
                self.tokens[output.request_id] += output.token_ids
                if output.finish is not None:
                    self.ends[output.request_id] = output
        elif isinstance(message, Reply):
            self.replies.append(message)

    def until(self, condition: Callable[[], object], what: str, timeout_s: float = 15.0) -> float:
        """Receives until it holds; how many seconds that took."""
        begin = time.monotonic()
        while not condition():
            assert time.monotonic() - begin < timeout_s, (
                f"not within {timeout_s} s: {what}; {self.client.instances()}"
            )
            self.hear()
        return time.monotonic() - begin

    def until_ended(self, *ids: str, timeout_s: float = 20.0) -> None:
        self.until(lambda: self.ends.keys() >= set(ids), "all have ended", timeout_s)

    def until_flowing(self, *ids: str, tokens: int = 3) -> None:
        self.until(lambda: all(len(self.tokens[id]) >= tokens for id in ids), "all have tokens")

    def check(self, *ids: str) -> None:
        """That these have ended with all of their right tokens."""
        for id in ids:
            submit, count = self.asked[id], self.asked[id].params.max_tokens
            assert self.ends[id].finish is Finish.LENGTH, self.ends[id]
            assert count is not None and self.tokens[id] == answer(submit.prompt_token_ids, count), id

    def status(self, id: str) -> InstanceStatus | None:
        """Of the latest incarnation."""
        found = [status for status in self.client.instances() if status.id == id]
        return found[-1] if found else None

    def state(self, id: str) -> str | None:
        return None if (status := self.status(id)) is None else status.state

    def cached(self, id: str) -> int:
        return 0 if (status := self.status(id)) is None else status.cached_blocks[0]

    def been(self, id: str) -> list[str]:
        """Where a completion has been."""
        return self.client.instances_of(id.rpartition("/")[0])

    def close(self) -> None:
        self.client.close()


def modelled(id: str, speed: Speed = QUICK, **shape: Any) -> ModelledInstance:
    return ModelledInstance(id, speed, Shape(**shape)).start()
