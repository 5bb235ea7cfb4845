"""A router's connection to one incarnation of an instance: its session, what it has told, whether its work advances.

Sessions end and are begun anew for as long as the instance is wanted. What a link hears is handed on by `take`; what it
finds out of its own accord (`check`) is whether the instance can be counted on.
"""

import logging
from collections.abc import Callable
from enum import StrEnum

import zmq

from xllm.cluster.instance import InstanceInfo
from xllm.cluster.journey import Incarnation
from xllm.cluster.lease import Backoff
from xllm.config.decided import EngineConfig
from xllm.core.stats import SchedulerStats
from xllm.wire.dial import Dial, State
from xllm.wire.messages import Fault, FollowKv, Heartbeat, Message, Ready, ToEngine, WireError
from xllm.wire.session import away_s

log = logging.getLogger(__name__)

STALLED_S = 2.5  # with work, and not one layer computed: its requests go elsewhere
CONNECT_S = (
    5.0  # for a session to begin; what was sent may have been lost on the way, so then it is said again
)
FOLLOW = 1  # the call that asks for what is cached; a session has one at a time


class Standing(StrEnum):
    """`AWAY`: no session, or the engine still loads. `WELL`: it serves. `STALLED`: it answers, and its work does not advance."""

    AWAY = "away"
    WELL = "well"
    STALLED = "stalled"


class Link:
    """Everything here happens in the thread that owns it, but for `notify`, which is called by the session's own."""

    def __init__(
        self, info: InstanceInfo, *, token: str, name: str, context: "zmq.Context[zmq.Socket[bytes]]",
        notify: Callable[[], object],
    ):  # fmt: skip
        self.info = info
        self.at = Incarnation(info.id, info.epoch)
        self.standing = Standing.AWAY
        self.config: EngineConfig | None = None  # once it is ready
        self.stats: SchedulerStats | None = None
        self.why = "it has not answered yet"  # it does not stand well
        self.leaving = False  # it is not in the cluster any more: this session is the last
        self._arguments = {"token": token, "name": name, "context": context, "notify": notify}
        self._backoff = Backoff()
        self._progress = -1
        self._moved_at = self._checked = 0.0
        self._dial_at = 0.0  # when another session may begin, or the last one was begun
        self._dial: Dial | None = None

    def connect(self, now: float) -> None:
        """Begin a session unless there is one, or it is too early for another."""
        if self._dial is None and not self.leaving and now >= self._dial_at:
            self._dial = Dial(self.info.address, **self._arguments)  # type: ignore[arg-type]
            self._dial_at = now

    def send(self, message: ToEngine) -> bool:
        """False where there is no session: what was sent in it is lost."""
        try:
            if self._dial is None:
                return False
            self._dial.send(message)
        except WireError:
            return False
        return True

    def receive(self, most: int) -> list[Message]:
        """What has come, at most so many; with less than that nothing is left."""
        found: list[Message] = []
        while (
            self._dial is not None and len(found) < most and (message := self._dial.receive(0.0)) is not None
        ):
            found.append(message)
        return found

    def take(self, message: Message, now: float) -> SchedulerStats | None:
        """What the link itself wants to know of. -> the stats before these, with a heartbeat."""
        if isinstance(message, Ready):
            self.config = message.config
            self.standing, self._moved_at = Standing.WELL, now
            self._backoff.reset()
            self.follow()
        elif isinstance(message, Fault):
            self.why = message.reason
        elif isinstance(message, Heartbeat):
            if message.progress != self._progress or not message.busy:
                self._progress, self._moved_at = message.progress, now
            before, self.stats = self.stats, message.stats
            return before
        return None

    def follow(self) -> None:
        self.send(FollowKv(call_id=FOLLOW))

    def check(self, now: float, busy: bool) -> None:
        """`busy`: requests of ours are there. Sets `standing`, and `why` where it is not well."""
        before = self.standing
        self._check(now, busy)
        if self.standing is not before:
            if self.standing is Standing.WELL:
                log.info("instance %s serves again", self.at.id)
            elif not self.leaving:
                log.warning("instance %s is %s: %s", self.at.id, self.standing, self.why)

    def _check(self, now: float, busy: bool) -> None:
        self._moved_at += away_s(now - self._checked)  # nobody is silent while nobody listens
        self._checked = now
        dial = self._dial
        slow = dial is not None and dial.state is State.CONNECTING and now - self._dial_at > CONNECT_S
        if dial is None or slow or dial.state is State.LOST:
            if dial is not None:
                self.why = dial.reason or ("it does not answer" if slow else "the connection has ended")
                self._dial_at = now + self._backoff.next()
                dial.close()
                self._dial = None
            self.standing, self._progress, self.stats = Standing.AWAY, -1, None
        elif self.standing is not Standing.AWAY:
            stalled_s = now - self._moved_at
            if stalled_s > STALLED_S and busy:
                self.standing, self.why = Standing.STALLED, f"it made no progress for {stalled_s:.1f} s"
            elif stalled_s <= STALLED_S:
                self.standing = Standing.WELL

    def close(self) -> None:
        if self._dial is not None:
            self._dial.close()
            self._dial = None
