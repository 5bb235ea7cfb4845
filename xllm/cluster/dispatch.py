"""Who gets which request, and who goes on with it: the routing policy carried out, without any I/O.

It belongs to one thread at a time. `submit`, `lost`, `retry` answer what is to be sent where; whoever sends it says so
at once when that fails (`lost`). Every request that `submit` took ends with exactly one terminal output out of `heard`
or `retry`, or with `abort`.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from xllm.cluster import policies
from xllm.cluster.fleet import Fleet
from xllm.cluster.instance import InstanceInfo
from xllm.cluster.journey import Incarnation, Journey
from xllm.cluster.kv_index import KvIndex
from xllm.cluster.pairing import Pairs
from xllm.cluster.view import Capacity, Load
from xllm.core.clock import Clock, monotonic
from xllm.core.errors import Overloaded, Unavailable
from xllm.core.output import Finish, SequenceOutput
from xllm.wire.kv_events import KVEventBatch
from xllm.wire.messages import Submit

log = logging.getLogger(__name__)

MOST_FAILURES = 4  # of instances under one request; then it may be the request that ends them
HOMELESS_S = 30.0  # so long a request waits for an instance that can go on with it


@dataclass(frozen=True, slots=True)
class Sending:
    to: Incarnation
    submit: Submit


@dataclass(slots=True)
class Counts:
    """Since the start."""

    requests: int = 0
    moves: int = 0
    paired: int = 0  # another instance was to compute or to give KV
    refused: int = 0  # turned away: nobody could take them
    failed: int = 0  # ended with an error
    by_instance: Counter[str] = field(default_factory=Counter)  # sent there


class Dispatcher:
    def __init__(self, policy: str, *, clock: Clock = monotonic):
        """`ConfigError` for an unknown policy."""
        self.policy = policy
        self.fleet = Fleet()
        self.index = KvIndex()
        self.pairs = Pairs(self.fleet, self.index)
        self.counts = Counts()
        self._choose = policies.load(policy)
        self._clock = clock
        self._journeys: dict[str, Journey] = {}  # by request id
        self._names: dict[str, Journey] = {}  # by what instances call them
        self._at: dict[Incarnation, set[Journey]] = defaultdict(set)
        self._homeless: list[Journey] = []

    def __len__(self) -> int:
        """Requests that have not ended."""
        return len(self._journeys)

    # ---- instances

    def joined(self, info: InstanceInfo) -> Incarnation:
        """It gets nothing before `serves` says so."""
        capacity = Capacity(
            max_num_seqs=info.max_num_seqs, num_blocks=info.kv.num_blocks, block_size=info.kv.block_size,
            max_model_len=info.max_model_len, max_num_queued=info.max_num_queued,
            step_budget=info.max_num_batched_tokens,
        )  # fmt: skip
        if self.fleet.joined(info.id, info.epoch, capacity, info.role, info.transport):
            self.pairs.joined(info)
        return Incarnation(info.id, info.epoch)

    def serves(self, at: Incarnation, serving: bool) -> None:
        if self._current(at):
            self.fleet.serves(at.id, serving)

    def left(self, at: Incarnation) -> None:
        """Nothing new goes there. What it has stays until it is `lost`."""
        if self._current(at):
            self.fleet.left(at.id)
            self.index.drop(at.id)
            self.pairs.left(at.id)

    def told(self, at: Incarnation, load: Load, now: float) -> None:
        if self._current(at):
            self.fleet.told(at.id, load, now)

    def cached(self, at: Incarnation, number: int, batch: KVEventBatch) -> bool:
        """News of what it has cached. False where some before it are missing: ask for all of it."""
        return not self._current(at) or self.index.apply(at.id, number, batch)

    def cached_from(self, at: Incarnation, number: int, blocks: Mapping[str, Iterable[int]]) -> None:
        """All that it has cached, by medium; news from `number` on follow."""
        if self._current(at):
            self.index.reset(at.id, at.epoch, number, blocks)

    def uncached(self, at: Incarnation) -> None:
        """Nobody knows what it has cached."""
        if self._current(at):
            self.index.drop(at.id)

    def running(self, at: Incarnation) -> int:
        """Requests that are there."""
        return len(self._at.get(at, ()))

    def names(self, at: Incarnation) -> list[str]:
        """What it calls them."""
        return [journey.name for journey in self._at.get(at, ())]

    def _current(self, at: Incarnation) -> bool:
        view = self.fleet.views.get(at.id)
        return view is not None and view.epoch == at.epoch

    # ---- requests

    def submit(self, submit: Submit, now: float) -> tuple[Journey, Sending]:
        """Raises Overloaded where those that serve are full, Unavailable where nobody serves."""
        block_size = next((view.capacity.block_size for view in self.fleet), 16)
        journey = Journey(submit, now, block_size)
        sending = self._place(journey, now)
        if sending is None:
            self.counts.refused += 1
            if any(view.serving for view in self.fleet):
                raise Overloaded("all instances are full", retry_after_s=1)
            raise Unavailable("there is no instance that takes requests", retry_after_s=2)
        self.counts.requests += 1
        self._journeys[journey.id] = journey
        return journey, sending

    def heard(self, at: Incarnation, outputs: Iterable[SequenceOutput], now: float) -> list[SequenceOutput]:
        """What of an instance's news is for the front end. Late news of requests that have left are dropped."""
        found: list[SequenceOutput] = []
        for news in outputs:
            journey = self._names.get(news.request_id)
            if journey is None or journey.at != at:
                continue
            if news.finish is Finish.ERROR and self._failed(
                journey, at, news.error or "it gave no reason", now
            ):
                continue
            first = journey.stages[-1].first is None and bool(news.token_ids)
            found.append(journey.take(news, now))
            if first:
                self.pairs.answered(journey.name, news, now)
                if self._current(at):
                    self.fleet.first_token(at.id, journey.name, now)
            if news.finish is not None:
                self.counts.failed += news.finish is Finish.ERROR
                self._leave(journey, journey.stages[-1].tokens, now)
                self._end(journey)
        return found

    def abort(self, ids: Iterable[str], now: float) -> dict[Incarnation, list[str]]:
        """-> the names under which instances are to stop them."""
        found: dict[Incarnation, list[str]] = defaultdict(list)
        for id in ids:
            journey = self._journeys.get(id)
            if journey is None:
                continue
            if journey.at is None:
                self._homeless.remove(journey)
            else:
                found[journey.at].append(journey.name)
                journey.stages[-1].ended = now
                self._leave(journey, 0, now)
            self._end(journey)
        return found

    def lost(self, at: Incarnation, why: str, now: float, *, failed: bool = True) -> int:
        """Nothing comes from there any more; `retry` says where its requests go. `failed`: it did not leave in good order.
        -> how many there are."""
        moving = self._at.pop(at, set())
        for journey in moving:
            journey.failures += failed
            self._leave(journey, 0, now)
            journey.leave(f"{at.id}: {why}", now)
            self._homeless.append(journey)
        return len(moving)

    def retry(self, now: float) -> tuple[list[Sending], list[SequenceOutput]]:
        """Requests without an instance: what is sent where, and the ends of those that nobody can go on with."""
        sendings: list[Sending] = []
        ends: list[SequenceOutput] = []
        waiting, self._homeless = self._homeless, []
        for journey in waiting:
            if journey.failures >= MOST_FAILURES:
                ends.append(
                    self._give_up(
                        journey, f"{journey.failures} instances failed with it, the last: {journey.why}"
                    )
                )
            elif (sending := self._place(journey, now)) is not None:
                self.counts.moves += 1
                sendings.append(sending)
            elif now - (journey.lost_at or now) > HOMELESS_S:
                ends.append(
                    self._give_up(journey, f"nobody could go on with it for {HOMELESS_S:g} s; {journey.why}")
                )
            else:
                self._homeless.append(journey)
        return sendings, ends

    @property
    def homeless(self) -> int:
        return len(self._homeless)

    # ---- inside

    def _place(self, journey: Journey, now: float) -> Sending | None:
        ask = journey.ask()
        choice = self._choose(ask, self.fleet, self.index, self._clock)
        if choice is None and journey.stages and ask.avoid:
            journey.avoid = frozenset()  # better where it failed before than nowhere
            ask = journey.ask()
            choice = self._choose(ask, self.fleet, self.index, self._clock)
        if choice is None:
            return None
        at = Incarnation(choice.instance, self.fleet.views[choice.instance].epoch)
        submit = journey.begin(at, choice, now, self.pairs.find(ask, choice, now))
        self.fleet.sent(choice, ask, now)
        self.counts.by_instance[at.id] += 1
        self.counts.paired += submit.kv_from is not None
        self._names[journey.name] = journey
        self._at[at].add(journey)
        return Sending(at, submit)

    def _leave(self, journey: Journey, output_tokens: int, now: float) -> None:
        """It is over for the instance that has it."""
        at = journey.stages[-1].at
        self._names.pop(journey.name, None)
        self.pairs.over(journey.name, now)
        if (there := self._at.get(at)) is not None:
            there.discard(journey)
            if not there:
                del self._at[at]
        if self._current(at):
            self.fleet.ended(at.id, journey.name, now, output_tokens)

    def _end(self, journey: Journey) -> None:
        del self._journeys[journey.id]
        journey.end()

    def _failed(self, journey: Journey, at: Incarnation, error: str, now: float) -> bool:
        """An instance ended it with an error; whether somebody else is to try. Once: what is wrong with the request is
        wrong everywhere."""
        others = any(view.serving and view.id != at.id for view in self.fleet)
        if journey.avoid or not others:
            return False
        log.warning("request %s: %s said: %s; another instance gets it", journey.id, at.id, error)
        journey.avoid = frozenset({at.id})
        journey.failures += 1
        self._leave(journey, 0, now)
        journey.leave(f"{at.id}: {error}", now)
        self._homeless.append(journey)
        return True

    def _give_up(self, journey: Journey, why: str) -> SequenceOutput:
        log.warning("request %s ends: %s", journey.id, why)
        self.counts.failed += 1
        self._end(journey)
        return SequenceOutput(request_id=journey.id, finish=Finish.ERROR, error=why)
