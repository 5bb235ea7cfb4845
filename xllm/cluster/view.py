"""What a router knows of its instances, and what a policy is asked and answers.

An instance tells its load a few times a second. In between the router adds what it has sent itself and the instance
cannot have counted yet, so that a burst between two reports spreads instead of falling on whoever looked idle in the
last one. All of it is written by `xllm.cluster.fleet.Fleet`; policies only read. Times are seconds of one monotonic
clock. Not thread-safe: it belongs to the router's loop.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from xllm.cluster.kv_index import Blocks
from xllm.cluster.speed import Correction, StepTimes
from xllm.core.stats import SchedulerStats
from xllm.kv import hashing
from xllm.wire.kv_events import block_hash

KEPT = 0.25  # share of a queue that is kept for requests of priority 0 and more urgent
# who answers requests; an instance that only prefills is asked by these, not by routers
ROLES = ("both", "decode")


@dataclass(frozen=True, slots=True)
class Ask:
    """What one request needs."""

    request_id: str
    prompt_tokens: int
    hashes: tuple[int, ...] = ()  # names on the wire of the blocks that may be cached, see `Ask.of`
    expected_output: int = 0  # tokens; 0: nobody knows
    priority: int = 0  # lower is more urgent
    ttft_s: float | None = None  # target: seconds to the first token
    tpot_s: float | None = None  # target: seconds per token after it
    avoid: frozenset[str] = frozenset()  # instances that have failed this request

    @classmethod
    def of(cls, request_id: str, token_ids: list[int], block_size: int, salt: str = "") -> "Ask":
        """Hashes the prompt, once. The last token is always computed, so its block is not looked up."""
        names = hashing.chain(hashing.root(salt), token_ids[:-1], block_size)
        return cls(request_id, len(token_ids), tuple(map(block_hash, names)))


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a request goes, and why: for every candidate the numbers that the policy compared, best first."""

    instance: str
    policy: str
    reasons: Mapping[str, Mapping[str, float]]
    cached_tokens: int = 0  # of the prompt, that the chosen instance is expected to hold


@dataclass(frozen=True, slots=True)
class Capacity:
    max_num_seqs: int
    num_blocks: int  # of the KV cache
    block_size: int  # tokens
    max_model_len: int = 2**31 - 1  # tokens, prompt and output
    max_num_queued: int | None = None  # requests beyond max_num_seqs; None: as many as come
    step_budget: int = 2048  # tokens that one step computes at most


@dataclass(frozen=True, slots=True)
class Load:
    """As an instance tells it; `step_*` are means over the steps since the report before, 0 where there were none."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0  # share of the blocks that is held, 0 to 1
    step_tokens: float = 0.0  # tokens computed in a step
    step_s: float = 0.0  # seconds of a step

    @classmethod
    def between(cls, before: SchedulerStats | None, now: SchedulerStats) -> "Load":
        """The load of an engine that told `before` and then `now`."""
        load = cls(now.running, now.waiting, now.kv_usage)
        if before is None or (steps := now.executor.steps - before.executor.steps) <= 0:
            return load
        tokens = now.prompt_tokens + now.generation_tokens - before.prompt_tokens - before.generation_tokens
        seconds = now.executor.device_s - before.executor.device_s
        return replace(load, step_tokens=max(tokens / steps, 0.0), step_s=max(seconds / steps, 0.0))


@dataclass(slots=True)
class Sent:
    """A request of this router that has not ended."""

    at: float
    tokens: int  # of the prompt, that were not cached
    blocks: int  # for the whole prompt
    predicted_ttft_s: float  # uncorrected; 0: could not be told
    predicted_tpot_s: float
    first: float | None = None  # when its first token came
    counted: bool = False  # in the instance's last report


@dataclass(slots=True)
class Tally:
    """This router's own requests on one instance."""

    outstanding: dict[str, Sent] = field(default_factory=dict)
    # sums over them, and what has ended since the last report
    uncounted: int = 0  # requests that the last report cannot have counted
    uncounted_blocks: int = 0
    unanswered: int = 0  # requests without a first token
    unanswered_tokens: int = 0
    unanswered_counted: int = 0
    gone: int = 0  # requests that the last report counted
    gone_blocks: int = 0
    # running means over our requests
    mean_tokens: float = 0.0  # that a request had to compute; taken for those of other routers
    mean_output: float = 0.0  # tokens that a request answered with


@dataclass(slots=True)
class InstanceView:
    """One instance as this router sees it."""

    id: str
    epoch: int
    capacity: Capacity
    role: str = "both"
    transport: str | None = None  # by which others read its KV
    serving: bool = True  # False: drains, or is not heard of; it gets nothing new
    load: Load = Load()  # as last told
    turn: int = 0  # when it last got a request, as a count of all that were sent; 0: never
    steps: StepTimes = field(default_factory=StepTimes)
    ttft: Correction = field(default_factory=Correction)
    tpot: Correction = field(default_factory=Correction)
    ours: Tally = field(default_factory=Tally)

    @property
    def active(self) -> int:
        """Requests it has, running or waiting."""
        return max(
            self.load.running + self.load.waiting + self.ours.uncounted - self.ours.gone,
            len(self.ours.outstanding),
        )

    @property
    def queued_tokens(self) -> float:
        """Prompt tokens it has yet to compute: of our requests, and about as many for each that others have waiting."""
        others = max(0, self.load.waiting - self.ours.unanswered_counted)
        return self.ours.unanswered_tokens + others * self.ours.mean_tokens

    @property
    def free_blocks(self) -> float:
        """KV blocks that nobody holds."""
        told = self.capacity.num_blocks * (1 - self.load.kv_usage)
        return min(told - self.ours.uncounted_blocks + self.ours.gone_blocks, float(self.capacity.num_blocks))

    def takes(self, ask: Ask) -> bool:
        """It serves, the request fits into it, and its queue has room; the less urgent are shed first."""
        capacity = self.capacity
        room = float("inf")
        if capacity.max_num_queued is not None:
            kept = KEPT * capacity.max_num_queued if ask.priority > 0 else 0
            room = capacity.max_num_seqs + capacity.max_num_queued - kept
        return (
            self.serving
            and self.role in ROLES
            and self.id not in ask.avoid
            and ask.prompt_tokens < capacity.max_model_len
            and self.blocks_for(ask.prompt_tokens + 1) <= capacity.num_blocks
            and self.active < room
        )

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.capacity.block_size)

    # ---- predictions, uncorrected; 0 where no step times are known

    def predict_ttft_s(self, tokens: float) -> float:
        """Seconds until the first token of a request that comes now with `tokens` to compute: what is queued goes
        through in steps that decode as well, and beyond `max_num_seqs` somebody has to end first."""
        base_s, token_s = self.steps.line()
        places, active = self.capacity.max_num_seqs, self.active
        todo = self.queued_tokens + tokens
        decoding = max(0, min(active, places) - self.ours.unanswered)
        steps = max(1.0, todo / max(1, self.capacity.step_budget - decoding))
        ends = max(0, active + 1 - places) / places * self.ours.mean_output
        return steps * (base_s + decoding * token_s) + todo * token_s + ends * self.predict_tpot_s()

    def predict_tpot_s(self) -> float:
        """Seconds per token of a request that comes now, once it decodes beside all that are here."""
        base_s, token_s = self.steps.line()
        return base_s + token_s * min(self.active + 1, self.capacity.max_num_seqs)


def candidates(ask: Ask, views: Iterable[InstanceView]) -> list[InstanceView]:
    """Who can take the request, whoever waited longest for one first: ties go to the first of equals, so that equals
    share. Instances that never had one come in the order of their ids."""
    return sorted((view for view in views if view.takes(ask)), key=lambda view: (view.turn, view.id))


def cached_tokens(ask: Ask, view: InstanceView, held: Blocks) -> int:
    """Of the prompt, with `held` blocks of it there. The last token is computed all the same."""
    return max(0, min(view.capacity.block_size * sum(held), ask.prompt_tokens - 1))
