"""One peer that KV is fetched from: a session with its hub, and a way into its memory."""

import logging
import queue
import threading
import time
from collections.abc import Callable

from xllm.core.peers import Failure, Fetch, Fetched, FetchOrder, KvFrom
from xllm.engine.fetches import Active, Means, Part
from xllm.executor.transports.base import Peer, TransportError
from xllm.wire.dial import Dial, State
from xllm.wire.messages import Abort, FirstToken, Offer, Provide, Provided, Taken, WireError

log = logging.getLogger(__name__)
WAIT_S = 0.002  # for the oldest reading, before others have their turn


class PeerLink(threading.Thread):
    """Ends by itself when it was not used for long. `put` may be called by any thread."""

    def __init__(self, peer: KvFrom, means: Means, tell: Callable[[Fetched], None]):
        super().__init__(name="xllm-kv-peer", daemon=True)
        self.ended = False
        self._to = peer
        self._means = means
        self._patience = means.patience
        self._tell = tell
        self._orders: queue.SimpleQueue[FetchOrder] = queue.SimpleQueue()
        self._door = threading.Lock()  # between an order that comes and a thread that goes
        self._wake = threading.Event()
        self._stopping = False
        # the thread's own
        self._dial: Dial | None = None
        self._peer: Peer | None = None
        self._descriptor: bytes | None = None
        self._active: dict[str, Active] = {}
        self._used = time.monotonic()
        self._dialled = 0.0
        self._paused_until = 0.0

    def put(self, order: FetchOrder) -> bool:
        """False where the thread has ended."""
        with self._door:
            if self.ended:
                return False
            self._orders.put(order)
        self._wake.set()
        return True

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()

    def run(self) -> None:
        while not self._is_over():
            try:
                self._turn()
            except Exception:
                log.exception("KV from %s: what is under way is given up", self._to.address)
                self._break(Failure.TRANSPORT)

    def _is_over(self) -> bool:
        with self._door:
            idle = not self._active and time.monotonic() - self._used > self._patience.idle_s
            self.ended = self._stopping or (idle and self._orders.empty())
        if self.ended:
            self._take_orders()
            self._break(Failure.GIVEN_UP)
        return self.ended

    def _turn(self) -> None:
        self._take_orders()
        self._connect()
        self._hear()
        reading = next((one.parts[0].reading for one in self._active.values() if one.parts), None)
        if reading is None:
            self._wake.wait(self._rest_s())
            self._wake.clear()
        self._read()
        self._expire()

    def _rest_s(self) -> float:
        if not self._active:
            return self._patience.idle_s
        return max(0.0, min(one.moved for one in self._active.values()) + self._limit_s - time.monotonic())

    @property
    def _limit_s(self) -> float:
        ready = self._dial is not None and self._dial.state is State.READY
        return self._patience.progress_s if ready else self._patience.connect_s

    # orders

    def _take_orders(self) -> None:
        while True:
            try:
                order = self._orders.get_nowait()
            except queue.Empty:
                return
            self._used = now = time.monotonic()
            if isinstance(order, Fetch):
                id = f"kv-{order.ticket}"
                self._active[id] = Active(order, now, now, id)
                if now < self._paused_until:
                    self._fail(self._active[id], Failure.UNREACHABLE)
            else:
                for one in list(self._active.values()):
                    if one.order.ticket == order.ticket:
                        self._fail(one, Failure.GIVEN_UP)

    # the session

    def _connect(self) -> None:
        """Dial where there is something to ask for; ask where somebody answers."""
        to_ask = [one for one in self._active.values() if not one.asked and one.failure is None]
        if not to_ask:
            return
        if self._dial is None:
            self._dialled = time.monotonic()
            means = self._means
            try:
                self._dial = Dial(self._to.address, token=means.token, name=means.name, notify=self._wake.set)
            except WireError as e:
                log.warning("KV from %s: %s", self._to.address, e.message)
                self._break(Failure.UNREACHABLE)
                return
        if self._dial.state is not State.READY:
            return
        if self._to.instance and self._dial.peer != self._to.instance:
            log.warning(
                "KV from %s: %s is there, not %s", self._to.address, self._dial.peer, self._to.instance
            )
            self._break(Failure.UNREACHABLE)
            return
        for one in to_ask:
            self._ask(self._dial, one)

    def _ask(self, dial: Dial, one: Active) -> None:
        order, opening = one.order, one.order.opening
        one.asked = True
        one.moved = time.monotonic()
        self._send(
            dial,
            Provide(
                request_id=one.id,
                prompt_token_ids=order.token_ids,
                first_block=order.first,
                block_size=self._means.block_size,
                fingerprint=self._means.fingerprint,
                cache_salt=order.cache_salt,
                compute=order.peer.compute,
                priority=order.priority,
                deadline_s=order.deadline_s,
                tail_token_ids=() if opening is None else opening.tail,
                params=None if opening is None else opening.params,
                seed=0 if opening is None else opening.seed,
            ),
        )

    def _send(self, dial: Dial | None, message: Provide | Taken | Abort) -> None:
        try:
            if dial is not None:
                dial.send(message)
        except WireError:
            pass  # it is lost, as `_hear` will find

    def _hear(self) -> None:
        dial = self._dial
        if dial is None:
            return
        while (message := dial.receive(0.0)) is not None:
            if not isinstance(message, Offer | FirstToken | Provided):
                continue
            if (one := self._active.get(message.request_id)) is not None:
                one.moved = time.monotonic()
                self._heard(one, message)
        if dial.state is State.LOST:
            log.info("KV from %s: %s", self._to.address, dial.reason)
            self._break(
                Failure.LOST if any(one.asked for one in self._active.values()) else Failure.UNREACHABLE
            )

    def _heard(self, one: Active, message: Offer | FirstToken | Provided) -> None:
        match message:
            case Offer():
                self._begin(one, message)
            case FirstToken(token_id=token):
                one.token = token
                self._settle(one)
            case Provided():
                self._provided(one, message)

    def _begin(self, one: Active, offer: Offer) -> None:
        if one.failure is not None:
            return
        first, blocks = one.offered, one.order.blocks
        last = first + len(offer.blocks)
        if (
            offer.first != first
            or not first < last <= min(offer.total, len(blocks))
            or len(offer.sums) != len(offer.blocks)
        ):
            log.warning("KV from %s: an offer that nobody has asked for", self._to.address)
            self._fail(one, Failure.REFUSED)
            return
        try:
            reading = self._way_to(offer.descriptor).read(offer.blocks, blocks[first:last])
        except TransportError as e:
            self._transport_failed(e, one)
            return
        except ValueError as e:
            log.warning("KV from %s: %s", self._to.address, e)
            self._fail(one, Failure.REFUSED)
            return
        one.total = offer.total
        one.offered = last
        one.parts.append(Part(reading, first, tuple(offer.sums)))

    def _way_to(self, descriptor: bytes) -> Peer:
        if self._peer is None or descriptor != self._descriptor:
            self._close_peer()
            self._peer = self._means.transport.connect(descriptor)
            self._descriptor = descriptor
        return self._peer

    def _provided(self, one: Active, end: Provided) -> None:
        """Nothing more is offered, and what was is not kept any longer: what is being read is checked like everything."""
        one.ended = True
        if end.error is not None:
            log.info("KV from %s: %s", self._to.address, end.error)
            self._fail(one, Failure.REFUSED)
        else:
            one.total = one.offered
            self._settle(one)

    # readings

    def _read(self) -> None:
        """Take in what has arrived; of the oldest reading waits for a moment."""
        wait_s = WAIT_S
        for one in list(self._active.values()):
            while one.parts and one.id in self._active:
                part = one.parts[0]
                try:
                    if not part.reading.wait(wait_s):
                        wait_s = 0.0
                        break
                except TransportError as e:
                    one.parts.popleft()
                    self._transport_failed(e, one)
                    break
                one.parts.popleft()
                self._arrived(one, part)

    def _arrived(self, one: Active, part: Part) -> None:
        one.moved = self._used = time.monotonic()
        if one.failure is None:
            ours = one.order.blocks[part.first : part.first + len(part.sums)]
            good = [a == b for a, b in zip(self._means.sums(ours), part.sums, strict=True)]
            one.sound += [*good, False].index(False)
            if all(good):
                self._send(self._dial, Taken(one.id, one.sound))
            else:
                log.warning("KV from %s: a block arrived damaged", self._to.address)
                self._fail(one, Failure.CHECKSUM)
        self._settle(one)

    # endings

    def _settle(self, one: Active) -> None:
        """Tell of it where it has ended and nothing is being read."""
        complete = one.sound == one.total and (
            one.order.opening is None or one.token is not None or one.ended
        )
        if (
            (complete or one.failure is not None)
            and not one.parts
            and self._active.pop(one.id, None) is not None
        ):
            token = one.token if one.failure is None else None
            self._tell(Fetched(one.order.ticket, one.sound, time.monotonic() - one.begun, one.failure, token))

    def _fail(self, one: Active, why: Failure) -> None:
        """The first reason stays. What is being read is waited for."""
        if one.failure is None:
            one.failure = why
            one.moved = time.monotonic()
            if one.asked and not one.ended:
                self._send(self._dial, Abort([one.id]))
        self._settle(one)

    def _transport_failed(self, error: TransportError, one: Active) -> None:
        """The way is of no use to anybody then."""
        log.warning("KV from %s: %s", self._to.address, error)
        self._fail(one, Failure.TRANSPORT)
        self._end_readings(Failure.TRANSPORT)

    def _end_readings(self, why: Failure) -> None:
        self._close_peer()
        for one in list(self._active.values()):
            if one.parts:
                one.parts.clear()
                self._fail(one, why)

    def _expire(self) -> None:
        now, limit = time.monotonic(), self._limit_s
        late = [one for one in self._active.values() if now - one.moved > limit]
        if not late:
            return
        if not all(one.asked for one in late):  # nobody answers
            self._break(Failure.UNREACHABLE)
            return
        if any(one.parts for one in late):
            self._end_readings(Failure.TIMEOUT)
        for one in late:
            self._fail(one, Failure.TIMEOUT)

    def _break(self, why: Failure) -> None:
        """The session is of no use. The next fetch gets another one, after a pause."""
        self._end_readings(why)
        for one in list(self._active.values()):
            one.ended = one.ended or why is not Failure.GIVEN_UP
            self._fail(one, why)
        if self._dial is not None:
            self._dial.close()
            self._dial = None
        if why is not Failure.GIVEN_UP:
            self._paused_until = time.monotonic() + self._patience.pause_s

    def _close_peer(self) -> None:
        peer, self._peer, self._descriptor = self._peer, None, None
        if peer is not None:
            peer.close()
