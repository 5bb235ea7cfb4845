"""What fetching KV from peers needs, how long it waits, and how far a fetch has come."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from xllm.core.peers import Failure, Fetch
from xllm.executor.transports.base import Reading, Transport


@dataclass(frozen=True)
class Patience:
    """Seconds."""

    progress_s: float = 5.0  # without any of it a fetch is given up
    connect_s: float = 2.0
    pause_s: float = 1.0  # in which a peer that failed is not asked again
    idle_s: float = 60.0  # after which a connection that nobody uses is closed


@dataclass(frozen=True)
class Means:
    """What fetching needs, the same for all peers."""

    transport: Transport
    sums: Callable[[Sequence[int]], Sequence[int]]  # of our blocks; any thread may ask
    block_size: int
    fingerprint: str  # of model, weights and layout
    token: str = ""  # shown to peers
    name: str = ""
    patience: Patience = Patience()


@dataclass(slots=True)
class Part:
    reading: Reading
    first: int
    sums: "tuple[int, ...]"


@dataclass(slots=True)
class Active:
    order: Fetch
    begun: float
    moved: float  # when it last got on
    id: str = ""
    asked: bool = False
    ended: bool = False  # by the peer: there is nobody to be told
    offered: int = 0  # blocks whose reading has begun
    sound: int = 0  # blocks that are there
    total: int | None = None  # that will be offered; not known yet
    token: int | None = None  # the first of the answer
    parts: deque[Part] = field(default_factory=deque)
    failure: Failure | None = None
