"""`--kv-events-config`: what the JSON may say, under the names that users of vLLM know."""

import ipaddress
from typing import Literal

import msgspec

from xllm.config.decided import KvEventsConfig
from xllm.core.errors import ConfigError

FLAG = "--kv-events-config"


class _Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    enable_kv_cache_events: bool | None = None
    publisher: Literal["zmq", "null"] = "zmq"
    endpoint: str = (
        "tcp://127.0.0.1:5557"  # events hold prompts: who wants other machines to see them says so
    )
    replay_endpoint: str | None = None
    topic: str = ""
    buffer_steps: int = 10_000
    hwm: int = 10_000  # as many as can be asked for again
    max_queue_size: int = 100_000


def read_kv_events(text: str) -> KvEventsConfig | None:
    """None where it says that nobody wants events. `ConfigError` with a sentence where it says what cannot be."""
    try:
        asked = msgspec.json.decode(text, type=_Asked)
    except msgspec.MsgspecError as e:
        raise ConfigError(f"{FLAG}: {e}; known keys: {', '.join(_Asked.__struct_fields__)}") from e
    if asked.enable_kv_cache_events is None:
        raise ConfigError(f'{FLAG} wants "enable_kv_cache_events": true, or false to say that it is off')
    for name in ("buffer_steps", "hwm", "max_queue_size"):
        if getattr(asked, name) < 1:
            raise ConfigError(f"{FLAG}: {name} must be at least 1, not {getattr(asked, name)}")
    bind = _is_here(asked.endpoint)
    if asked.replay_endpoint is not None:
        _is_here(asked.replay_endpoint)
        if asked.replay_endpoint == asked.endpoint:
            raise ConfigError(f"{FLAG}: endpoint and replay_endpoint are both {asked.endpoint}")
    if not asked.enable_kv_cache_events or asked.publisher == "null":
        return None
    return KvEventsConfig(
        endpoint=asked.endpoint,
        bind=bind,
        replay_endpoint=asked.replay_endpoint,
        topic=asked.topic,
        buffer_steps=asked.buffer_steps,
        hwm=asked.hwm,
        max_queue_size=asked.max_queue_size,
    )


def _is_here(endpoint: str) -> bool:
    """Whether the address is spelled as one of this machine: `*`, a wildcard or loopback address, a file. Any other
    host, `localhost` among them, is taken for a collector to connect to."""
    scheme, _, rest = endpoint.partition("://")
    if scheme == "ipc" and rest:
        return True
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host or not (port == "*" or (port.isdecimal() and int(port) < 1 << 16)):
        raise ConfigError(f"{FLAG}: an endpoint is tcp://HOST:PORT or ipc://PATH, not {endpoint!r}")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return host == "*"
    return address.is_loopback or address.is_unspecified
