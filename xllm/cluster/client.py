"""Many engines behind the face of one: what a front end sends goes to the instance that a policy chooses, and on to
another one where that instance dies, hangs or leaves.

One lock guards all that is known; whoever sends, receives or tells of members holds it for moments. Work that nobody
waits for (sessions that ended, requests without an instance) is done by the thread that receives.
"""

import threading
import time
from collections import deque
from typing import Any

import zmq

from xllm.cluster.decisions import Decisions
from xllm.cluster.dispatch import Counts, Dispatcher, Sending
from xllm.cluster.instance import InstanceInfo
from xllm.cluster.journey import Incarnation
from xllm.cluster.link import FOLLOW, Link, Standing
from xllm.cluster.status import InstanceStatus, standing, status
from xllm.cluster.summary import total
from xllm.cluster.view import Load
from xllm.config.decided import EngineConfig
from xllm.core.clock import monotonic
from xllm.core.errors import Unavailable
from xllm.core.output import SequenceOutput
from xllm.core.stats import SchedulerStats
from xllm.wire.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch
from xllm.wire.messages import (
    Abort,
    Heartbeat,
    KvChanges,
    Message,
    Outputs,
    Ready,
    Reply,
    ResetPrefixCache,
    Submit,
    SubmitMany,
)

TICK_S = 0.2  # between two looks at sessions and at requests without an instance
MESSAGES_A_ROUND = 256  # of one instance, before others have their turn


class ClusterClient:
    """An `EngineClient` (`xllm.engine.client`). Members are told by `joined`, `changed` and `left`, from any thread."""

    def __init__(self, policy: str = "prefix_aware", *, token: str = "", name: str = ""):
        """`ConfigError` for an unknown policy."""
        self.startup_s: dict[str, float] = {}
        self.decisions = Decisions()
        self._dispatcher = Dispatcher(policy)
        self._token, self._name = token, name
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._lock = threading.RLock()
        self._links: dict[Incarnation, Link] = {}
        self._draining: set[Incarnation] = set()
        self._config: EngineConfig | None = None
        self._rung: deque[Incarnation] = deque()  # whose sessions have news
        self._news = threading.Event()
        self._out: deque[Message] = deque()
        self._outputs: list[SequenceOutput] = []  # for the next message
        self._tick_at = 0.0
        self._stats = total([])
        self._progress = 0
        self._resets: dict[int, set[Incarnation]] = {}  # prefix caches that are still to be emptied, by call
        self._closed = False

    # ---- members, from any thread

    def joined(self, info: InstanceInfo) -> None:
        with self._lock:
            at = self._dispatcher.joined(info)
            if (known := self._links.get(at)) is not None:
                known.leaving = False
            else:
                self._links[at] = Link(
                    info, token=self._token, name=self._name, context=self._context,
                    notify=lambda: self._ring(at),
                )  # fmt: skip
            self._settle(at, info)
        self._wake()

    def changed(self, info: InstanceInfo) -> None:
        with self._lock:
            at = Incarnation(info.id, info.epoch)
            if at in self._links:
                self._dispatcher.joined(info)
                self._settle(at, info)
        self._wake()

    def left(self, id: str, epoch: int | None = None) -> None:
        """Its session goes on until its last request has ended, or the session does."""
        with self._lock:
            for at, link in self._links.items():
                if at.id == id and epoch in (None, at.epoch):
                    link.leaving = True
                    self._dispatcher.left(at)
        self._wake()

    def _settle(self, at: Incarnation, info: InstanceInfo) -> None:
        self._links[at].info = info
        (self._draining.add if info.draining else self._draining.discard)(at)
        self._serve(self._links[at])

    # ---- the front end's side (`EngineClient`)

    @property
    def config(self) -> EngineConfig:
        """Of the first instance that was ready."""
        assert self._config is not None, "wait_ready comes first"
        return self._config

    def wait_ready(self, timeout_s: float) -> bool:
        """Whether an instance has been ready; receives meanwhile."""
        until = time.monotonic() + timeout_s
        while self._config is None and (left := until - time.monotonic()) > 0:
            self._await_news(min(left, TICK_S))
            with self._lock:
                self._work(monotonic())
        return self._config is not None

    def send(self, message: Message) -> None:
        """Raises Overloaded or Unavailable where nobody can take a request."""
        now = monotonic()
        with self._lock:
            match message:
                case Submit():
                    self._submit(message, now)
                case SubmitMany(requests=requests):
                    for one in requests:
                        self._submit(one, now)
                case Abort(request_ids=ids):
                    for at, names in self._dispatcher.abort(ids, now).items():
                        if (link := self._links.get(at)) is not None:
                            link.send(Abort(request_ids=names))
                case ResetPrefixCache(call_id=call_id):
                    self._reset(call_id)
                case _:
                    raise Unavailable("only the instance itself can be asked for this", retry_after_s=60)

    def receive(self, timeout_s: float) -> Message | None:
        if not self._out:
            self._await_news(min(timeout_s, TICK_S))
            with self._lock:
                self._work(monotonic())
        return self._out.popleft() if self._out else None

    def pulse(self) -> tuple[Heartbeat, float]:
        """A router without instances is well; it is the instances that are not there."""
        return Heartbeat(progress=self._progress, busy=False, stats=self.stats()), 0.0

    def dead(self) -> str | None:
        return None

    def missing(self) -> str | None:
        """Why nothing can be taken at present."""
        with self._lock:
            if any(view.serving for view in self._dispatcher.fleet):
                return None
            if not self._links:
                return "no instance is registered"
            found = (
                (link.at.id, standing(link, link.at in self._draining)[1]) for link in self._links.values()
            )
            return "; ".join(f"{id}: {why}" for id, why in found)

    def dump_stacks(self) -> None:
        """Nobody's but an instance's own server's."""

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for link in self._links.values():
                link.close()
            self._links.clear()
        self._context.term()

    # ---- what can be asked

    @property
    def counts(self) -> Counts:
        return self._dispatcher.counts

    @property
    def policy(self) -> str:
        return self._dispatcher.policy

    def decision(self, request: str) -> dict[str, Any] | None:
        """See `Decisions.of`."""
        with self._lock:
            return self.decisions.of(request)

    def instances_of(self, request: str) -> list[str]:
        with self._lock:
            return self.decisions.instances(request)

    def instances(self) -> list[InstanceStatus]:
        with self._lock:
            links = sorted(self._links.values(), key=lambda link: link.at)
            return [status(link, self._dispatcher, link.at in self._draining) for link in links]

    def stats(self) -> SchedulerStats:
        """All instances together, as of their last reports."""
        return self._stats

    # ---- under the lock

    def _submit(self, submit: Submit, now: float) -> None:
        journey, sending = self._dispatcher.submit(submit, now)
        self.decisions.add(journey)
        self._send(sending, now)

    def _send(self, sending: Sending, now: float) -> None:
        link = self._links.get(sending.to)
        if link is None or not link.send(sending.submit):
            self._lose(sending.to, "its session has just ended", now)
            self._wake()  # somebody else gets it at once

    def _lose(self, at: Incarnation, why: str, now: float, *, failed: bool = True) -> None:
        self._dispatcher.serves(at, False)
        self._dispatcher.lost(at, why, now, failed=failed)

    def _serve(self, link: Link) -> None:
        well = link.standing is Standing.WELL and not link.leaving
        self._dispatcher.serves(link.at, well and link.at not in self._draining)

    def _reset(self, call_id: int) -> None:
        asked = {
            at for at, link in self._links.items()
            if link.standing is Standing.WELL and link.send(ResetPrefixCache(call_id=FOLLOW + 1 + call_id))
        }  # fmt: skip
        self._resets[call_id] = asked
        self._finish_resets()

    # ---- the receiving thread

    def _ring(self, at: Incarnation) -> None:
        """From a session's thread."""
        self._rung.append(at)
        self._news.set()

    def _wake(self) -> None:
        self._tick_at = 0.0
        self._news.set()

    def _await_news(self, timeout_s: float) -> None:
        self._news.wait(timeout_s)
        self._news.clear()

    def _work(self, now: float) -> None:
        if self._closed:
            return
        for at in {self._rung.popleft() for _ in range(len(self._rung))}:
            if (link := self._links.get(at)) is not None:
                self._hear(link, now)
                self._look(link, now)
        if now >= self._tick_at:
            self._tick_at = now + TICK_S
            self._stats = total([link.stats for link in self._links.values() if link.stats is not None])
            for link in list(self._links.values()):
                link.connect(now)
                self._look(link, now)
            self._place_homeless(now)
        if self._outputs:
            self._progress += 1
            self._out.append(Outputs(outputs=self._outputs, stats=self._stats))
            self._outputs = []

    def _hear(self, link: Link, now: float) -> None:
        messages = link.receive(MESSAGES_A_ROUND)
        if len(messages) == MESSAGES_A_ROUND:
            self._ring(link.at)
        for message in messages:
            before = link.take(message, now)
            match message:
                case Outputs(outputs=outputs):
                    homeless = self._dispatcher.homeless
                    self._outputs += self._dispatcher.heard(link.at, outputs, now)
                    if self._dispatcher.homeless > homeless:  # it ended one with an error
                        self._tick_at = 0.0
                case Ready():
                    self._tick_at = 0.0  # somebody may wait for it
                case Heartbeat(stats=SchedulerStats() as stats):
                    self._dispatcher.told(link.at, Load.between(before, stats), now)
                case KvChanges():
                    if not self._dispatcher.cached(link.at, message.number, _batch(message, link.at.epoch)):
                        link.follow()
                case Reply(call_id=call_id, value=value) if call_id == FOLLOW and isinstance(value, dict):
                    self._dispatcher.cached_from(link.at, value["number"], value["blocks"])
                case Reply(call_id=call_id):
                    self._resets.get(call_id - FOLLOW - 1, set()).discard(link.at)
                    self._finish_resets()
        if self._config is None and link.config is not None:
            self._config = link.config

    def _look(self, link: Link, now: float) -> None:
        """How it stands; what follows for its requests."""
        at = link.at
        link.check(now, busy=self._dispatcher.running(at) > 0)
        if link.standing is not Standing.WELL and self._dispatcher.running(at):
            if link.standing is Standing.STALLED:  # it may come back, and is to stop what others do by then
                link.send(Abort(request_ids=self._dispatcher.names(at)))
            self._lose(at, link.why, now, failed=at not in self._draining)
            self._tick_at = 0.0
        if link.standing is Standing.AWAY:
            self._dispatcher.uncached(at)
            self._answers_no_more(at)
        self._serve(link)
        if link.leaving and not self._dispatcher.running(at):
            link.close()
            self._answers_no_more(at)
            del self._links[at]
            self._draining.discard(at)

    def _place_homeless(self, now: float) -> None:
        if not self._dispatcher.homeless:
            return
        sendings, ends = self._dispatcher.retry(now)
        self._outputs += ends
        for sending in sendings:
            self._send(sending, now)

    def _answers_no_more(self, at: Incarnation) -> None:
        for asked in self._resets.values():
            asked.discard(at)
        self._finish_resets()

    def _finish_resets(self) -> None:
        for call_id in [call_id for call_id, asked in self._resets.items() if not asked]:
            del self._resets[call_id]
            self._out.append(Reply(call_id=call_id, value=True))


def _batch(changes: KvChanges, epoch: int) -> KVEventBatch:
    events: list[BlockStored | BlockRemoved | AllBlocksCleared] = []
    for change in changes.changes:
        match change.kind:
            case "stored":
                events.append(BlockStored(change.hashes, None, (), 0, None, change.medium, None, None, epoch))
            case "removed":
                events.append(BlockRemoved(change.hashes, change.medium, epoch))
            case "cleared":
                events.append(AllBlocksCleared(epoch))
    return KVEventBatch(0.0, events)
