"""Who asked for what: ids of several clients' requests and calls, as the engine knows them and back."""

import logging
from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from xllm.core.output import Finish, SequenceOutput
from xllm.core.stats import SchedulerStats
from xllm.wire.messages import (
    Abort,
    FirstToken,
    FollowKv,
    FromEngine,
    KvChanges,
    LimitKv,
    Offer,
    Outputs,
    Provide,
    Provided,
    Reply,
    ResetPrefixCache,
    Shutdown,
    Sleep,
    StartTrace,
    StopTrace,
    Submit,
    SubmitMany,
    Taken,
    ToEngine,
    WakeUp,
)

log = logging.getLogger(__name__)
OWNERS_ONLY = "only the instance's own server may ask for this"
NO_STATS = SchedulerStats(
    running=0, waiting=0, steps_in_flight=0, kv_usage=0.0, prefix_queried_tokens=0, prefix_hit_tokens=0,
    preemptions=0, evictions=0, prompt_tokens=0, generation_tokens=0, step_tokens=0,
)  # fmt: skip


class Ledger:
    """No I/O. Clients are numbers. A request `x` of client 3 is `3/x` to the engine.

    A client has at most `max_requests` outstanding; what goes beyond that ends with an error at once.
    """

    def __init__(self, max_requests: int):
        self._max = max_requests
        self._requests: dict[int, set[str]] = {}  # outstanding ones by client, as the engine knows them
        self._asked: dict[str, tuple[int, str]] = {}  # the same ones: client, its own id
        self._calls: dict[int, tuple[int, int]] = {}  # as the engine knows them: client, its own call_id
        self._follows: set[int] = set()  # of these calls, those that ask what is cached
        self._followers: set[int] = set()  # clients that have been told
        self._next_call = 0
        self._stats = NO_STATS  # as last heard

    def join(self, client: int) -> None:
        self._requests[client] = set()

    def leave(self, client: int) -> Abort | None:
        """Forget the client; what the engine is to stop for its sake."""
        self._calls = {call: asked for call, asked in self._calls.items() if asked[0] != client}
        self._follows &= self._calls.keys()
        self._followers.discard(client)
        requests = self._requests.pop(client)
        for inner in requests:
            del self._asked[inner]
        return Abort(request_ids=sorted(requests)) if requests else None

    def outstanding(self, client: int) -> int:
        return len(self._requests[client])

    @property
    def total(self) -> int:
        """Outstanding requests of all clients. Any thread may ask."""
        return len(self._asked)

    def inward(
        self, client: int, message: ToEngine, *, owner: bool
    ) -> tuple[ToEngine | None, FromEngine | None]:
        """-> what the engine is to get, and what the client is answered at once. `owner`: it may do more than ask for tokens."""
        match message:
            case Submit():
                taken, refused = self._submit(client, [message])
                return (taken[0] if taken else None), refused
            case SubmitMany(requests=requests):
                taken, refused = self._submit(client, requests)
                return (SubmitMany(requests=taken) if taken else None), refused
            case Provide(request_id=id):
                if (why := self._enter(client, id)) is not None:
                    return None, Provided(request_id=id, count=0, error=why)
                return replace(message, request_id=f"{client}/{id}"), None
            case Taken(request_id=id):
                inner = f"{client}/{id}"
                known = inner in self._requests[client]
                return (replace(message, request_id=inner) if known else None), None
            case Abort(request_ids=ids):
                mine = self._requests[client]
                these = [inner for id in ids if (inner := f"{client}/{id}") in mine]
                return (Abort(request_ids=these) if these else None), None
            case Shutdown():
                if not owner:
                    log.warning("client %d asked for a shutdown: %s", client, OWNERS_ONLY)
                return (message if owner else None), None
            case ResetPrefixCache():
                return self._call(client, message), None
            case FollowKv():
                asked = self._call(client, message)
                self._follows.add(self._next_call)
                return asked, None
            case Sleep() | WakeUp() | LimitKv() | StartTrace() | StopTrace():
                if not owner:
                    return None, Reply(call_id=message.call_id, refused=OWNERS_ONLY)
                return self._call(client, message), None

    def outward(
        self, message: Outputs | Reply | KvChanges | Offer | FirstToken | Provided
    ) -> Iterable[tuple[int, FromEngine]]:
        """-> who gets what of it. What is for clients that have left is for nobody."""
        if isinstance(message, Outputs):
            return self._outputs(message)
        if isinstance(message, KvChanges):
            return [(client, message) for client in sorted(self._followers)]
        if isinstance(message, Offer | FirstToken | Provided):
            return self._provision(message)
        client, call_id = self._calls.pop(message.call_id, (None, 0))
        if client is None:
            return []
        if message.call_id in self._follows:
            self._follows.remove(message.call_id)
            if message.refused is None:
                self._followers.add(client)  # what changes from here on comes after this reply
        return [(client, replace(message, call_id=call_id))]

    def _outputs(self, message: Outputs) -> list[tuple[int, FromEngine]]:
        self._stats = message.stats
        by_client: dict[int, list[SequenceOutput]] = {}
        for output in message.outputs:
            inner = output.request_id
            if (asked := self._asked.get(inner)) is None:
                continue
            client, id = asked
            if output.finish is not None:
                del self._asked[inner]
                self._requests[client].discard(inner)
            by_client.setdefault(client, []).append(replace(output, request_id=id))
        return [(client, Outputs(outputs=news, stats=message.stats)) for client, news in by_client.items()]

    def _provision(self, message: Offer | FirstToken | Provided) -> list[tuple[int, FromEngine]]:
        if (asked := self._asked.get(message.request_id)) is None:
            return []
        client, id = asked
        if isinstance(message, Provided):
            del self._asked[message.request_id]
            self._requests[client].discard(message.request_id)
        return [(client, replace(message, request_id=id))]

    def _enter(self, client: int, id: str) -> str | None:
        """It is outstanding from now on; else why it cannot be."""
        mine, inner = self._requests[client], f"{client}/{id}"
        if inner in mine:
            return f"a request called {id!r} is already here"
        if len(mine) >= self._max:
            return f"this client has {self._max} requests here already"
        mine.add(inner)
        self._asked[inner] = client, id
        return None

    def _submit(self, client: int, requests: Sequence[Submit]) -> tuple[list[Submit], Outputs | None]:
        taken: list[Submit] = []
        refused: list[SequenceOutput] = []
        for one in requests:
            if (why := self._enter(client, one.request_id)) is not None:
                refused.append(SequenceOutput(request_id=one.request_id, finish=Finish.ERROR, error=why))
                continue
            taken.append(replace(one, request_id=f"{client}/{one.request_id}"))
        return taken, Outputs(outputs=refused, stats=self._stats) if refused else None

    def _call(
        self,
        client: int,
        message: ResetPrefixCache | Sleep | WakeUp | LimitKv | FollowKv | StartTrace | StopTrace,
    ) -> ToEngine:
        self._next_call += 1
        self._calls[self._next_call] = client, message.call_id
        return replace(message, call_id=self._next_call)
