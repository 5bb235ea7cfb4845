"""Where a `Hub` listens: ZMQ ROUTER sockets, who may come in, and what they may do."""

import errno
from dataclasses import dataclass, field

import zmq

from xllm.core.errors import ConfigError
from xllm.wire.publisher import unix_answers
from xllm.wire.session import prepare


@dataclass(frozen=True)
class Listen:
    """An address to listen at; `tcp://host:*` finds a free port.

    The token travels in clear, as everything does: TCP is for networks of one's own. An `ipc://` file is protected by
    its directory.
    """

    address: str
    token: str | None = field(default=None, repr=False)  # None: whoever can connect may
    owner: bool = False  # its clients may also shut the engine down, put it to sleep, trace it


@dataclass(frozen=True)
class Listening:
    """That an engine is to serve others than who started it, and where."""

    addresses: tuple[str, ...]
    token: str | None = field(default=None, repr=False)
    name: str = ""  # what it calls itself to clients
    kv_transport: str | None = None  # how KV goes to and comes from other engines; None: it does not
    advertise: str | None = None  # host under which they reach it, where that is not the one it listens at

    @property
    def doors(self) -> list[Listen]:
        return [Listen(address, self.token) for address in self.addresses]


@dataclass(eq=False)
class Door:
    socket: "zmq.Socket[bytes]"
    listen: Listen

    @property
    def address(self) -> str:
        """With the port that was found."""
        return self.socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def transmit(self, identity: bytes, frame: bytes) -> bool:
        """False where there is no such connection any more, or it is full."""
        try:
            self.socket.send_multipart([identity, frame], zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True


def open_door(context: "zmq.Context[zmq.Socket[bytes]]", listen: Listen, most_frames: int) -> Door:
    """`most_frames` wait for one peer, whoever it is. `ConfigError` with a sentence where it cannot be."""
    address = listen.address
    if listen.token == "":  # an unset variable, rather than somebody's wish
        raise ConfigError(f"{address}: an empty token keeps nobody out")
    if address.startswith("ipc://") and unix_answers(address.removeprefix("ipc://")):
        raise ConfigError(f"{address} is in use by another process")  # ZMQ would take it over
    made = prepare(context.socket(zmq.ROUTER), address)
    made.sndhwm = most_frames
    made.setsockopt(zmq.ROUTER_MANDATORY, 1)  # who has gone is told, not passed over
    try:
        made.bind(address)
    except zmq.ZMQError as e:
        why = "it is in use by another process" if e.errno == errno.EADDRINUSE else e.strerror
        raise ConfigError(f"cannot listen at {address}: {why}") from e
    return Door(made, listen)
