"""The socket, taken before a model is loaded."""

import socket

from xllm.core.errors import XllmError


class CannotListen(XllmError):
    """The address is taken or not ours."""


def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A bound socket, so that a taken port is known before a model is loaded. Raises `CannotListen`. `shared`: other
    processes of this user may listen at the same port, and connections are spread over them."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
    except (OSError, UnicodeError) as e:
        listener.close()
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise CannotListen(
            f"cannot listen on {host} port {port}: {reason}; choose another with --port"
        ) from e
    listener.set_inheritable(False)
    return listener
