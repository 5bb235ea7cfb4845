"""A rig with peers: KV comes from an engine that computes the same, late and not always; and others ask for KV here."""

from collections import deque
from collections.abc import Callable
from typing import Any

from tests.scheduler.fake_executor import alone, history, sample
from tests.scheduler.rig import Rig, request
from xllm.core.output import Finish, SequenceOutput
from xllm.core.peers import Failure, Fetch, Fetched, GiveUp, KvFrom, Offering
from xllm.core.plan import StepPlan
from xllm.core.request import Request

PEER = KvFrom("tcp://peer:1")


class PeerRig(Rig):
    def __init__(self, **changes: Any):
        super().__init__(peers=True, **changes)
        self.fetches: dict[int, Fetch] = {}
        self.arrived: dict[int, int] = {}  # by ticket: blocks
        self.fetched: list[Fetched] = []
        self.fails: Callable[[], bool] = lambda: False
        self.samples = True  # whether peers sample first tokens where they are asked to
        self.patient = False  # whether what is offered waits for peers for ever
        self.computing: set[str] = set()
        self.opening: dict[str, Request] = {}
        self.first: dict[str, int] = {}  # tokens, by provision
        self.asked: dict[str, tuple[list[int], int]] = {}  # by provision: prompt and first block
        self.offers: deque[Offering] = deque()  # that are being looked at
        self.offered: dict[str, list[int]] = {}  # blocks that may be read
        self.ended: dict[str, tuple[int, str | None]] = {}

    # fetching

    def plan(self) -> StepPlan | None:
        self.hear()
        plan = super().plan()
        self.tell()
        return plan

    def hear(self) -> None:
        news, self.fetched = self.fetched, []
        self.take(self.scheduler.take_fetched(news, self.now))
        self.check()

    def tell(self) -> None:
        for order in self.scheduler.peers.orders():
            if isinstance(order, GiveUp):
                if order.ticket in self.fetches:
                    self.end_fetch(order.ticket, Failure.GIVEN_UP)
            else:
                assert order.first + len(order.blocks) == len(order.token_ids) // self.pool.block_size
                self.fetches[order.ticket] = order
                self.arrived[order.ticket] = 0

    def work(self) -> bool:
        """The oldest fetch gets one block, or has ended."""
        if not self.fetches:
            return False
        ticket, order = next(iter(self.fetches.items()))
        done = self.arrived[ticket]
        if done == len(order.blocks):
            self.end_fetch(ticket, None)
        elif self.fails():
            self._fill(order, done, sound=False)
            self.end_fetch(ticket, Failure.CHECKSUM)
        else:
            self._fill(order, done, sound=True)
            self.arrived[ticket] += 1
        return True

    def _fill(self, order: Fetch, i: int, sound: bool) -> None:
        size = self.pool.block_size
        first = (order.first + i) * size
        found = history(order.cache_salt, order.token_ids)[first : first + size]
        assert not self.pool.is_available(order.blocks[i]), "what is being filled is somebody's"
        for offset, fingerprint in enumerate(found):
            self.executor.memory[order.blocks[i], offset] = fingerprint if sound else -1

    def end_fetch(self, ticket: int, failure: Failure | None) -> None:
        order = self.fetches.pop(ticket)
        token = None
        if failure is None and order.opening is not None and self.samples:
            known = history(order.cache_salt, [*order.token_ids, *order.opening.tail])
            token = sample(known[-1], order.opening.seed)
        self.fetched.append(Fetched(ticket, self.arrived.pop(ticket), 0.01, failure, token))

    # providing

    def provide(self, id: str, prompt: list[int], first: int, compute: bool = True, salt: str = "", opening: bool = False) -> None:  # fmt: skip
        size = self.pool.block_size
        whole = prompt if opening else prompt[: len(prompt) // size * size]
        one = request(id, whole, 1, arrival=self.now, cache_salt=salt, max_total_tokens=len(whole) + 1)
        self.executor.salts[id] = salt
        self.asked[id] = (history(salt, whole), first)
        self.offered[id] = []
        if self.scheduler.provide(one, first, compute, opening and compute):
            self.computing.add(id)
            if opening:
                self.opening[id] = one
        self.provider_turn()

    def provider_turn(self) -> None:
        provisions = self.scheduler.provisions
        for offer in provisions.offers():
            self.offers.append(offer)
            self.offered[offer.id] += offer.blocks
        for id, count, why in provisions.ends():
            assert id not in self.ended
            self.ended[id] = (count, why)
            if id in self.computing:
                self.scheduler.abort(id)
                self.computing.remove(id)
        self.check()

    def look(self) -> bool:
        """The checksums of an offer are made."""
        if not self.offers:
            return False
        offer = self.offers.popleft()
        self._check_offer(offer)
        self.scheduler.provisions.looked(offer.id)
        self.provider_turn()
        return True

    def _check_offer(self, offer: Offering) -> None:
        if offer.id in self.ended:
            return
        fingerprints, first = self.asked[offer.id]
        size = self.pool.block_size
        for i, block in enumerate(offer.blocks):
            begin = (first + offer.first + i) * size
            found = [self.executor.memory.get((block, offset)) for offset in range(size)]
            assert found == fingerprints[begin : begin + size], "what is offered is what was asked for"

    def check(self) -> None:
        super().check()
        for id, blocks in getattr(self, "offered", {}).items():
            if id not in self.ended and id in self.scheduler.provisions:
                taken = self.scheduler.provisions._all[id].taken
                assert not any(self.pool.is_available(block) for block in blocks[taken:]), (
                    "offered blocks stay"
                )

    # the loop

    def take(self, outputs: list[SequenceOutput]) -> list[SequenceOutput]:
        for output in outputs:
            if output.request_id in self.computing and output.finish is not None:
                self.computing.discard(output.request_id)
                if output.finish is Finish.ERROR:
                    self.scheduler.provisions.end(output.request_id, output.error)
                elif output.request_id in self.opening:
                    one = self.opening.pop(output.request_id)
                    assert list(output.token_ids) == alone(one)[0]
                    self.first[one.id] = output.token_ids[0]
                    self.scheduler.provisions.opened(one.id)
        seen = super().take([output for output in outputs if output.request_id not in self.asked])
        self.provider_turn()
        return seen

    def turn(self) -> list[SequenceOutput]:
        outputs = super().turn()
        if not self.executor.queue:
            self.others_move()
        return outputs

    def others_move(self) -> bool:
        """Peers go on as well; what nobody takes is given up."""
        for _ in range(3):
            if not (self.work() or self.look()) and not self.fetched and not self.patient:
                for id in self.scheduler.provisions.waiting_for_peers:
                    self.scheduler.provisions.end(id, "nothing was taken")
                    self.provider_turn()
                    return True
        return bool(self.fetches or self.fetched or self.offers or self.computing)

    def end_others(self) -> None:
        for id in list(self.scheduler.provisions._all):
            self.scheduler.provisions.end(id, "the end")
        self.provider_turn()
        while self.look():
            pass
        self.tell()
        while self.work():
            pass
        self.hear()
        assert not self.scheduler.peers.busy
        assert not self.scheduler.provisions
