"""From whom an instance gets KV that it has not got: a prefill instance that computes the prompt for it, or another one that
has its beginning in its cache.

All is weighed in seconds. On the instance itself a prompt costs its own time and that of every sequence that decodes
there meanwhile; elsewhere it costs the wait in the other's queue, the computing there, and what of the transfer does
not happen beside that. Where nobody has measured steps yet, `TOKEN_S` stands for them: only ratios matter then.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from xllm.cluster.fleet import Fleet
from xllm.cluster.instance import InstanceInfo
from xllm.cluster.kv_index import NOTHING, KvIndex
from xllm.cluster.speed import StepTimes
from xllm.cluster.view import Ask, Choice, InstanceView, cached_tokens
from xllm.core.output import SequenceOutput
from xllm.core.peers import KvFrom

TOKEN_S = 1e-4  # of prefill, before anything was measured
MOVED = 0.1  # of the time to compute a token, that it takes to move its KV, before that was measured
HELD = 0.5  # of the time that a prompt takes, every sequence that decodes beside it is held up
ASKED_S = 0.002  # to ask a peer and to be answered
FAR = 8  # times the tokens of the steps that were seen: so far a line through them tells nothing
FEWEST_BLOCKS = 2  # below that it is not worth the question
SHUNNED_S = 20.0  # a pair of which nothing comes is not tried again for a second, then for two, up to this


@dataclass(frozen=True, slots=True)
class Pairing:
    peer: str  # instance
    compute: bool  # it computes what it has not got; else it gives what it has
    reasons: Mapping[str, float]  # seconds, for who asks why


def pair(
    ask: Ask, chosen: InstanceView, views: Iterable[InstanceView], index: KvIndex, moves: StepTimes
) -> Pairing | None:
    """Who helps `chosen` with `ask`; None where it does better alone. `moves`: tokens and seconds of transfers seen."""
    helpers = [view for view in views if _can_help(view, chosen)]
    if not helpers:
        return None
    held = index.longest(ask.hashes)
    here = cached_tokens(ask, chosen, held.get(chosen.id, NOTHING))
    missing = ask.prompt_tokens - 1 - here
    if missing < FEWEST_BLOCKS * chosen.capacity.block_size:
        return None
    token_s = _token_s(chosen, missing, helpers)
    local_s = _local_s(chosen, missing, token_s)
    best: tuple[float, Pairing] | None = None
    for view in helpers:
        there = cached_tokens(ask, view, held.get(view.id, NOTHING))
        if view.role == "prefill":
            cost_s = _computed_s(view, ask.prompt_tokens - there, missing, moves, chosen, token_s)
            compute = True
        elif there - here >= FEWEST_BLOCKS * chosen.capacity.block_size:
            cost_s = (
                ASKED_S
                + _moved_s(moves, there - here, token_s)
                + _local_s(chosen, missing - (there - here), token_s)
            )
            compute = False
        else:
            continue
        if cost_s < local_s and (best is None or cost_s < best[0]):
            reasons = {
                "alone_s": local_s,
                "paired_s": cost_s,
                "missing_tokens": float(missing),
                "cached_there": float(there),
            }
            best = cost_s, Pairing(view.id, compute, reasons)
    return None if best is None else best[1]


def _can_help(view: InstanceView, chosen: InstanceView) -> bool:
    return (
        view.id != chosen.id and view.serving and bool(view.transport) and view.transport == chosen.transport
        and view.capacity.block_size == chosen.capacity.block_size
    )  # fmt: skip


def _token_s(view: InstanceView, tokens: int, others: Iterable[InstanceView]) -> float:
    """What a token of a prompt takes there. Whose steps were all small cannot tell: no less than it takes others."""
    _, token_s = view.steps.line()
    if FAR * view.steps.mean_tokens < tokens:
        token_s = max(token_s, *(other.steps.line()[1] for other in others))
    return token_s or TOKEN_S


def _local_s(view: InstanceView, tokens: int, token_s: float) -> float:
    """Until the first token, and what the others there lose."""
    predicted_s = view.ttft.factor * view.predict_ttft_s(max(1, tokens)) if view.steps.known else 0.0
    own_s = max(predicted_s, tokens * token_s)
    decoding = max(0, view.active - view.ours.unanswered)
    if view.role == "decode":  # who comes to it meanwhile is held up too: others are there to compute prompts
        decoding = max(1, decoding)
    return own_s + HELD * decoding * tokens * token_s


def _computed_s(view: InstanceView, todo: int, missing: int, moves: StepTimes, chosen: InstanceView, chosen_token_s: float) -> float:  # fmt: skip
    """A prefill instance computes `todo` tokens and `missing` are moved, most of them meanwhile."""
    _, token_s = view.steps.line()
    queued_s = view.queued_tokens * (token_s or TOKEN_S)
    own_s = view.ttft.factor * view.predict_ttft_s(max(1, todo)) if token_s else queued_s + todo * TOKEN_S
    chunk = min(missing, view.capacity.step_budget)  # the last one's transfer is waited for
    beside_s = max(0.0, _moved_s(moves, missing - chunk, chosen_token_s) - own_s)
    return (
        ASKED_S
        + own_s
        + beside_s
        + _moved_s(moves, chunk, chosen_token_s)
        + _local_s(chosen, chosen.capacity.block_size, chosen_token_s)
    )


def _moved_s(moves: StepTimes, tokens: int, computed_s: float) -> float:
    if tokens <= 0:
        return 0.0
    base_s, token_s = moves.line()
    if moves.known:
        return base_s + tokens * token_s
    return MOVED * tokens * computed_s


@dataclass(slots=True)
class _Shunned:
    seconds: float = 0.0  # the last time
    until: float = 0.0

    def again(self, now: float) -> None:
        if now >= self.until:  # what was begun before counts as one
            self.seconds = min(SHUNNED_S, max(1.0, 2 * self.seconds))
            self.until = now + self.seconds


class Pairs:
    """Which requests are helped by whom, and what that has taught. Belongs to a `Dispatcher`."""

    def __init__(self, fleet: Fleet, index: KvIndex):
        self._fleet, self._index = fleet, index
        self._infos: dict[str, InstanceInfo] = {}
        # by the name of the request at the instance that has it: which that is, and who helps
        self._helped: dict[str, tuple[str, Pairing]] = {}
        self._shunned: dict[tuple[str, str], _Shunned] = {}  # pairs of which nothing came the last time
        self.moves = StepTimes()

    def joined(self, info: InstanceInfo) -> None:
        known = self._infos.get(info.id)
        if known is None or known.epoch != info.epoch:  # another process: nothing has been tried with it
            self._shunned = {pair: one for pair, one in self._shunned.items() if info.id not in pair}
        self._infos[info.id] = info

    def left(self, id: str) -> None:
        self._infos.pop(id, None)

    def find(self, ask: Ask, choice: Choice, now: float) -> tuple[KvFrom, Pairing] | None:
        """Who helps with `ask`, which goes to where `choice` says; counted there as work until the first token comes."""
        chosen = self._fleet.views[choice.instance]
        views = [view for view in self._fleet if not self._shuns(chosen.id, view.id, now)]
        found = pair(ask, chosen, views, self._index, self.moves)
        info = None if found is None else self._infos.get(found.peer)
        if found is None or info is None:
            return None
        self._helped[ask.request_id] = chosen.id, found
        if found.compute:
            there = int(found.reasons["cached_there"])
            self._fleet.sent(Choice(found.peer, "pairing", {}, there), replace(ask, expected_output=1), now)
        return KvFrom(info.address, info.id, info.epoch, found.compute), found

    def answered(self, name: str, news: SequenceOutput, now: float) -> None:
        """The first token of a request has come."""
        if name not in self._helped:
            return
        chosen, helped = self._helped[name]
        if not news.fetched_tokens and news.fetch_s:
            self._shunned.setdefault((chosen, helped.peer), _Shunned()).again(now)
        elif news.fetched_tokens:
            self._shunned.pop((chosen, helped.peer), None)
            if not helped.compute:
                self.moves.seen(news.fetched_tokens, news.fetch_s)
        self._fleet.first_token(helped.peer, name, now)
        self.over(name, now)

    def over(self, name: str, now: float) -> None:
        """Nobody works for it any more, or for its sake. A second call does nothing."""
        if name in self._helped:
            _, helped = self._helped.pop(name)
            self._fleet.ended(helped.peer, name, now)

    def _shuns(self, chosen: str, peer: str, now: float) -> bool:
        shunned = self._shunned.get((chosen, peer))
        return shunned is not None and now < shunned.until
