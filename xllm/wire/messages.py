"""Every message between a front end and an engine core, and its bytes.

A frame is one version byte followed by the msgpack of one tagged struct. A peer of another version is refused with
a sentence; nothing is guessed. Messages are immutable, so the in-memory channel passes them as they are.
"""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from xllm.config.decided import EngineConfig
from xllm.core.errors import XllmError
from xllm.core.output import SequenceOutput
from xllm.core.peers import KvFrom
from xllm.core.sampling import SamplingParams
from xllm.core.stats import SchedulerStats

VERSION = 7


class WireError(XllmError):
    """Bytes that are not a message of this version."""

    type = "wire_error"


class _Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    pass


# ---- front end -> engine core


class Submit(_Message, frozen=True):
    """One sequence to generate. The core answers with SequenceOutputs, exactly one of them terminal.

    With `output_token_ids` it goes on from there as if it had never stopped: they count for `max_tokens`, `min_tokens`,
    penalties and the seed's position. Outputs tell of what is new only. Whoever wants to be able to go on elsewhere
    draws the `seed`.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    priority: int = 0
    deadline_s: float | None = None  # from now; order "deadline" sorts by it
    cache_salt: str = ""
    waited_s: float = 0.0  # elsewhere, since it arrived there: for its place in the queue
    seed: int | None = None  # goes before that of `params`; with neither the core draws one
    output_token_ids: Sequence[int] = ()  # generated for it already, by this engine or another
    num_prompt_logprobs: int = 0  # how many of them have come; all have where there is an output token
    kv_from: KvFrom | None = None  # who may have, or compute, the KV of the prompt
    ttft_s: float | None = None  # targets for the first token and for each after it: routers choose by them
    tpot_s: float | None = None


class SubmitMany(_Message, frozen=True):
    """Sequences that arrive at once: no step is planned between the first and the last of them."""

    requests: Sequence[Submit]


class Abort(_Message, frozen=True):
    request_ids: Sequence[str]


class ResetPrefixCache(_Message, frozen=True):
    call_id: int


class Sleep(_Message, frozen=True):
    """Give the device's memory back. Refused while anything runs; until `WakeUp` nothing is taken in."""

    call_id: int


class WakeUp(_Message, frozen=True):
    call_id: int


class LimitKv(_Message, frozen=True):
    """An elastic KV pool may have so many blocks from now on, None: all. The reply's value: blocks it has now."""

    call_id: int
    blocks: int | None


class FollowKv(_Message, frozen=True):
    """Tell what is cached from now on, as `KvChanges`. The reply's value, `{"number": n, "blocks": {medium: [hash, ...]}}`, is
    what there is now: changes from number n on come after it. Hashes are `wire.kv_events.block_hash`, mediums those of events."""

    call_id: int


class Provide(_Message, frozen=True):
    """From another engine: have the KV of a prompt's blocks `first_block` to the last full one ready to be read, as `Offer`s.
    The answer ends with one `Provided`; an `Abort` of the id asks for it. What does not fit (`block_size`, `fingerprint`)
    is refused. With `params` the first token of the answer is sampled as well: a `FirstToken`."""

    request_id: str
    prompt_token_ids: Sequence[int]  # whole blocks
    first_block: int
    block_size: int
    fingerprint: str  # of model, weights and layout
    cache_salt: str = ""
    compute: bool = True  # else only what is here already
    priority: int = 0
    deadline_s: float | None = None
    tail_token_ids: Sequence[int] = ()  # of the prompt, behind its last full block
    params: SamplingParams | None = None
    seed: int = 0


class Taken(_Message, frozen=True):
    """The first `upto` blocks of what was to be provided have been read and need not be kept."""

    request_id: str
    upto: int


class StartTrace(_Message, frozen=True):
    """Record what the device does from here on. Refused while a trace is being taken."""

    call_id: int


class StopTrace(_Message, frozen=True):
    """End the trace and write it to `directory`; the reply's value is the file. Refused where none is being taken."""

    call_id: int
    directory: str


class Shutdown(_Message, frozen=True):
    pass


# ---- engine core -> front end


class Loading(_Message, frozen=True):
    """Start-up news: `done` of `total` bytes of `what`, or only a sentence when total is 0."""

    what: str
    done: int = 0
    total: int = 0


class Ready(_Message, frozen=True):
    """The engine takes requests. `seconds` is the start-up time by part, `config` what was decided in the end: an
    engine that measures its memory completes what it was given. `addresses` is where others than its owner reach it,
    `kv_transport` how they read its KV, if they may."""

    config: EngineConfig
    seconds: dict[str, float] = {}
    addresses: Sequence[str] = ()
    kv_transport: str | None = None


class Outputs(_Message, frozen=True):
    """News of one engine turn."""

    outputs: Sequence[SequenceOutput]
    stats: SchedulerStats


class Heartbeat(_Message, frozen=True):
    """Sent a few times a second by a thread of its own. `progress` grows as long as work advances."""

    progress: int
    busy: bool
    stats: SchedulerStats | None = None
    outstanding: int = 0  # requests that have not ended, of all clients, where the engine has several


class KvChange(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Blocks of one tier that can be found from now on, or no longer; "cleared" is every block of every tier."""

    kind: Literal["stored", "removed", "cleared"]
    medium: str = ""
    hashes: Sequence[int] = ()


class KvChanges(_Message, frozen=True):
    """What changed in one engine turn, in order, to clients that asked (`FollowKv`). Numbers go up by one."""

    number: int
    changes: Sequence[KvChange]


class Offer(_Message, frozen=True):
    """Blocks that can be read until they are `Taken` or the provision has ended. They follow those offered before."""

    request_id: str
    descriptor: bytes  # how to reach this engine's KV memory, for a transport of the same kind
    first: int  # counted from the first block that was asked for
    blocks: Sequence[int]  # where they lie there
    sums: Sequence[int]  # the checksum of each
    total: int  # how many it will be in all


class FirstToken(_Message, frozen=True):
    """What follows the prompt whose KV is being provided."""

    request_id: str
    token_id: int


class Provided(_Message, frozen=True):
    """The end of a provision: nothing is kept for it any more."""

    request_id: str
    count: int  # blocks that were taken
    error: str | None = None  # why it is not all that was offered, or wanted


class Reply(_Message, frozen=True):
    call_id: int
    value: Any = None
    refused: str | None = None  # why what was asked for was not done


class Fault(_Message, frozen=True):
    """The engine cannot go on; the process ends after this."""

    reason: str


ToEngine = (
    Submit
    | SubmitMany
    | Abort
    | ResetPrefixCache
    | Sleep
    | WakeUp
    | LimitKv
    | FollowKv
    | Provide
    | Taken
    | StartTrace
    | StopTrace
    | Shutdown
)
FromEngine = Loading | Ready | Outputs | Heartbeat | KvChanges | Offer | FirstToken | Provided | Reply | Fault
Message = ToEngine | FromEngine


# ---- sessions: what clients of an engine that serves several of them (`hub`, `dial`) and the engine say besides


class Hello(_Message, frozen=True):
    """First frame of a client. Without the token that the address asks for it is refused."""

    name: str = ""  # for logs
    token: str = ""


class Welcome(_Message, frozen=True):
    """The session has begun. A client of which nothing is heard for `silence_s` is forgotten, and so is one that leaves
    more than `unacknowledged_bytes` untaken: well before that it is to tell (`Beat`) what it has taken."""

    silence_s: float
    unacknowledged_bytes: int
    name: str = ""  # whose engine this is


class Refused(_Message, frozen=True):
    """There is no session, or no longer. Everything outstanding of it is aborted."""

    reason: str


class Beat(_Message, frozen=True):
    """Sign of life. From a client, with the bytes of frames that its owner has taken so far; the answer is another."""

    taken: int = 0


class Goodbye(_Message, frozen=True):
    pass


FromClient = ToEngine | Hello | Beat | Goodbye
FromHub = FromEngine | Welcome | Refused | Beat | Goodbye

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)
_PREFIX = bytes([VERSION])


def encode(message: Message) -> bytes:
    return _PREFIX + _encoder.encode(message)


def decode(frame: bytes) -> Message:
    """Raises WireError for an empty frame, another version, or bytes that are no message."""
    if not frame or frame[0] != VERSION:
        raise WireError(
            f"peer speaks wire version {frame[0] if frame else 'none'}, this is version {VERSION}"
        )
    try:
        return _decoder.decode(memoryview(frame)[1:])
    except msgspec.MsgspecError as e:
        raise WireError(f"not a message of wire version {VERSION}: {e}") from e
