"""KV that passes between engines: what a request is told about it, what the scheduler orders, and what becomes of that.

The engine that owns a request *fetches*: it sets blocks aside, asks a peer to *provide* what belongs in them, and reads it
out of the peer's memory. The scheduler's side alone decides which block is whose; nobody else frees one.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from xllm.core.sampling import SamplingParams


class KvFrom(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whom to ask for the KV of a prompt, as far as it is not here."""

    address: str  # where that engine's hub listens
    instance: str = ""  # what it calls itself; nothing is taken from another one
    epoch: int = 0  # of its incarnation: a connection to an earlier one is not used
    compute: bool = True  # it is to compute what it has not got; else it gives what it has


class Failure(enum.StrEnum):
    """Why a fetch brought less than was wanted."""

    UNREACHABLE = "unreachable"  # no connection, or another engine is there
    LOST = "lost"  # the connection ended
    REFUSED = "refused"  # the peer would not, or could not go on
    TIMEOUT = "timeout"  # nothing came for too long
    CHECKSUM = "checksum"  # what arrived is not what was sent
    TRANSPORT = "transport"  # reading the peer's memory failed
    GIVEN_UP = "given_up"  # the request ended first


@dataclass(frozen=True, slots=True)
class Opening:
    """How a request's first token is sampled, where the peer that computes its prompt does that, too."""

    tail: Sequence[int]  # of the prompt, behind its last full block
    params: SamplingParams
    seed: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """Fill `blocks` with the KV of a prompt's blocks from number `first` on. Brings exactly one `Fetched`."""

    ticket: int
    peer: KvFrom
    token_ids: Sequence[int]  # from the beginning of the prompt to the end of the last block wanted
    cache_salt: str
    first: int
    blocks: Sequence[int]
    priority: int
    deadline_s: float | None  # from now
    opening: Opening | None = None


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Nobody wants that any more. Its `Fetched` comes all the same."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """Nothing is written into the blocks of that fetch any more."""

    ticket: int
    count: int  # so many from the front are there and sound
    seconds: float
    failure: Failure | None = None
    token: int | None = None  # the first of the answer, where the peer was to sample it and nothing failed


FetchOrder = Fetch | GiveUp


@dataclass(frozen=True, slots=True)
class Offering:
    """Blocks of a provision that hold what they are to hold. They keep it until they have been taken, or it has ended."""

    id: str
    first: int  # counted from the first block of the provision
    blocks: Sequence[int]
    total: int  # how many the provision offers in all


class PeerStats(msgspec.Struct, frozen=True):
    """Counters, but for the first two."""

    fetching: int = 0  # fetches under way
    providing: int = 0  # provisions that hold blocks or wait for them
    fetches: int = 0  # ended
    fetched_blocks: int = 0
    fetched_bytes: int = 0
    fetch_s: float = 0.0  # of all fetches together
    failures: dict[str, int] = {}  # of fetches, by `Failure`
    provisions: int = 0  # ended
    provided_blocks: int = 0  # taken by peers
    provision_failures: int = 0  # refused, given up, broken off
