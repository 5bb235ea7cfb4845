"""The providing side of KV between engines: what peers ask for goes to the scheduler, what it has ready is offered to them.

Checksums of what is offered are made in a thread of their own, which also sends the offers: the loop waits for neither.
"""

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from xllm.core.errors import XllmError
from xllm.core.output import SequenceOutput
from xllm.core.peers import Offering
from xllm.core.sampling import SamplingParams
from xllm.engine.admission import Admission
from xllm.executor.transports.base import Transport
from xllm.scheduler.scheduler import Scheduler
from xllm.wire.messages import FirstToken, FromEngine, Offer, Provide, Provided, Submit, Taken

log = logging.getLogger(__name__)
GIVE_UP_S = 10.0  # what a peer does not take for so long, and says nothing, is kept no longer
CLOSE_S = 5.0
UNSEEN = SamplingParams(
    max_tokens=1, temperature=0.0, ignore_eos=True
)  # whoever computes samples one token at the end


def _one_token(params: SamplingParams) -> SamplingParams:
    """To sample the first as these say. What ends an answer is for whoever answers to say, and this may not yet."""
    return replace(params, max_tokens=1, min_tokens=min(1, params.min_tokens))


class Provider:
    """All calls belong to the engine's loop; `send` and `notify` are called by the thread, too."""

    def __init__(
        self, scheduler: Scheduler, admission: Admission, transport: Transport,
        sums: Callable[[Sequence[int]], Sequence[int]], fingerprint: str, send: Callable[[FromEngine], object], *, give_up_s: float = GIVE_UP_S, notify: Callable[[], object] = lambda: None,
    ):  # fmt: skip
        self._scheduler = scheduler
        self._provisions = scheduler.provisions
        self._admission = admission
        self._descriptor = transport.descriptor()
        self._sums = sums
        self._fingerprint = fingerprint
        self._send = send
        self._give_up_s = give_up_s
        self._notify = notify
        self._computing: set[str] = set()  # requests of ours whose output nobody is to see
        self._opening: set[str] = set()  # but for their first token, which the peer is to be told
        self._heard: dict[
            str, float
        ] = {}  # by provision: when its peer last said something, or was told something
        self._work: queue.SimpleQueue[Offering | None] = queue.SimpleQueue()
        self._made: deque[tuple[str, str | None]] = deque()  # ids of offers that were sent, or why not
        self._thread = threading.Thread(target=self._run, name="xllm-kv-offer", daemon=True)
        self._thread.start()

    def provide(self, message: Provide, now: float) -> None:
        id = message.request_id
        why = self._refusal(message)
        if why is None:
            try:
                self._begin(message, now)
            except (XllmError, ValueError) as e:
                why = str(e)
        if why is not None:
            self._send(Provided(request_id=id, count=0, error=why))

    def taken(self, message: Taken, now: float) -> None:
        if message.request_id in self._heard:
            self._heard[message.request_id] = now
            self._provisions.taken(message.request_id, message.upto)

    def abort(self, id: str) -> bool:
        """False where no provision is called so."""
        if id not in self._heard:
            return False
        self._provisions.end(id, "the peer wants it no longer")
        return True

    def hidden(self, outputs: list[SequenceOutput]) -> list[SequenceOutput]:
        """Without those that nobody is to see."""
        if not self._computing:
            return outputs
        seen = []
        for output in outputs:
            if output.request_id not in self._computing:
                seen.append(output)
            elif output.finish is not None:
                self._computing.discard(output.request_id)
                if output.error is not None:
                    self._provisions.end(output.request_id, output.error)
                elif output.request_id in self._opening:
                    self._opened(output)
        return seen

    def _opened(self, output: SequenceOutput) -> None:
        self._opening.discard(output.request_id)
        if output.token_ids:
            self._send(FirstToken(request_id=output.request_id, token_id=output.token_ids[0]))
        self._provisions.opened(output.request_id)

    def turn(self, now: float) -> None:
        """What has changed since the last time goes out."""
        for _ in range(len(self._made)):
            id, failed = self._made.popleft()
            if failed is not None:
                self._provisions.end(id, failed)
            elif id in self._heard:
                self._heard[id] = now
            self._provisions.looked(id)
        for offer in self._provisions.offers():
            self._heard[offer.id] = now
            self._work.put(offer)
        for id in self._provisions.waiting_for_peers if self._provisions else ():
            if now - self._heard[id] > self._give_up_s:
                self._provisions.end(id, f"nothing was taken for {self._give_up_s:g} s")
        for id, count, why in self._provisions.ends():
            self._heard.pop(id, None)
            self._opening.discard(id)
            if id in self._computing:
                self._scheduler.abort(id)
                self._computing.discard(id)
            self._send(Provided(request_id=id, count=count, error=why))

    @property
    def busy(self) -> bool:
        """Blocks are held that may become free without a step."""
        return bool(self._provisions)

    def close(self) -> None:
        self._work.put(None)
        self._thread.join(CLOSE_S)

    def _refusal(self, message: Provide) -> str | None:
        size = self._scheduler.pool.block_size
        if message.block_size != size:
            return f"its blocks are of {message.block_size} tokens, those here of {size}"
        if message.fingerprint != self._fingerprint:
            return "its KV is of another model, other weights or another layout"
        if (
            len(message.prompt_token_ids) % size
            or len(message.tail_token_ids) >= size
            or not 0 <= message.first_block < len(message.prompt_token_ids) // size
        ):
            return "that is no whole blocks"
        if message.request_id in self._provisions or message.request_id in self._computing:
            return f"something called {message.request_id!r} is under way"
        return None

    def _begin(self, message: Provide, now: float) -> None:
        opening = message.params is not None and message.compute
        wanted = Submit(
            request_id=message.request_id,
            prompt_token_ids=[*message.prompt_token_ids, *message.tail_token_ids],
            params=UNSEEN if message.params is None else _one_token(message.params),
            priority=message.priority,
            deadline_s=message.deadline_s,
            cache_salt=message.cache_salt,
            seed=message.seed,
        )
        request = self._admission.request(wanted, now)
        self._heard[request.id] = now
        try:
            if self._scheduler.provide(request, message.first_block, message.compute, opening):
                self._computing.add(request.id)
                if opening:
                    self._opening.add(request.id)
        except BaseException:
            del self._heard[request.id]
            raise

    # the thread

    def _run(self) -> None:
        while (offer := self._work.get()) is not None:
            failed = None
            try:
                self._offer(offer)
            except Exception as e:
                log.warning("KV for %s could not be offered: %s", offer.id, e, exc_info=e)
                failed = f"its KV could not be read: {type(e).__name__}"
            self._made.append((offer.id, failed))
            self._notify()

    def _offer(self, offer: Offering) -> None:
        self._send(
            Offer(
                request_id=offer.id,
                descriptor=self._descriptor,
                first=offer.first,
                blocks=offer.blocks,
                sums=list(self._sums(offer.blocks)),
                total=offer.total,
            )
        )
