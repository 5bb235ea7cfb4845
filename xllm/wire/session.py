"""What goes over the wire between a `Hub` and a `Dial`: numbered frames of one session.

A frame is a header and the msgpack of one tagged struct. The header: wire version (1 byte), session (8), number (8),
big-endian. Each end numbers what it sends in a session from 0 up by one, so what is missing is noticed. The client chooses the
session's name, at random, and says it with its Hello, which is not counted. A Refused to somebody who has no session has
session 0 and number 0.
"""

import struct
from typing import Any

import msgspec
import zmq

from xllm.wire.messages import VERSION, FromClient, FromHub, WireError

HEADER = struct.Struct(">BQQ")
OVERHEAD_BYTES = 256  # what a frame costs in memory besides its bytes, about
MAX_FRAME_BYTES = 64 << 20  # a peer that sends a longer one is disconnected
UNREAD_FRAMES = 1000  # of one peer; the next ones wait at its end
LINGER_MS = 500  # enough for a last word, never a hang at exit
BEAT_S = 0.5
KEEPALIVE_S = 10  # after this silence TCP looks whether the peer's host is still there

_encoder = msgspec.msgpack.Encoder()
from_client = msgspec.msgpack.Decoder(FromClient)
from_hub = msgspec.msgpack.Decoder(FromHub)


def seal(session: int, number: int, message: FromClient | FromHub) -> bytes:
    return HEADER.pack(VERSION, session, number) + _encoder.encode(message)


def unseal(frame: bytes, decoder: "msgspec.msgpack.Decoder[Any]") -> tuple[int, int, Any]:
    """-> session, number, message. `WireError` with a sentence for whatever bytes."""
    if not frame or frame[0] != VERSION:
        raise WireError(
            f"peer speaks wire version {frame[0] if frame else 'none'}, this is version {VERSION}"
        )
    try:
        _, session, number = HEADER.unpack_from(frame)
        return session, number, decoder.decode(memoryview(frame)[HEADER.size :])
    except Exception as e:  # besides msgspec's: nested too deeply, or a struct that refuses its own values
        raise WireError(f"not a message of wire version {VERSION} ({type(e).__name__})") from e


def prepare(made: "zmq.Socket[bytes]", address: str) -> "zmq.Socket[bytes]":
    """What the sockets of both ends have in common."""
    made.sndhwm = 0  # bounded by what is acknowledged or by who sends, never by silently dropped frames
    made.rcvhwm = UNREAD_FRAMES
    made.linger = LINGER_MS
    made.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    made.setsockopt(zmq.TCP_KEEPALIVE, 1)
    made.setsockopt(zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_S)
    if "[" in address:
        made.setsockopt(zmq.IPV6, 1)
    return made


def away_s(elapsed_s: float) -> float:
    """How much of a round of a thread's loop does not count as silence of others: all of it, where the process itself was
    stopped or starved. A round waits at most BEAT_S."""
    return elapsed_s if elapsed_s > 2 * BEAT_S else 0.0
