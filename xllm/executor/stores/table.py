"""Stores that hold KV records for several engines, by the scheme of their address. A new one is one file and one line here."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast
from urllib.parse import parse_qsl, urlsplit

from xllm.core.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

STORES = {
    "file": "xllm.executor.stores.directory:DirectoryStore",
    "mooncake": "xllm.executor.stores.mooncake:MooncakeStore",
}
_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


class Store(Protocol):
    """Records under keys. A record (uint8 [n], all of one length) never changes once it is there, but may go at any time.

    Keys are ASCII, `realm-name`, unequal for unequal blocks. Whatever is raised means that the store does not answer.
    Several threads may call at once, and a call may take for ever: its caller sees to that (`xllm.executor.remote_tier`).
    """

    def register(self, memory: "np.ndarray") -> None:
        """Before anything else: `records` and `into` below always lie in this memory, which stays."""
        ...

    def put(self, keys: Sequence[str], records: "Sequence[np.ndarray]") -> list[bool]:
        """Which of them lie there by now, those that did before among them. False: no room, say."""
        ...

    def get(self, keys: Sequence[str], into: "Sequence[np.ndarray]") -> list[bool]:
        """Which of them were there and fill `into`. What the others hold afterwards is of no use."""
        ...

    def exists(self, keys: Sequence[str]) -> list[bool]:
        """Those behind the first that is missing need not be looked for: False."""
        ...

    def remove(self, keys: Sequence[str]) -> None: ...

    def close(self) -> None: ...


class Address:
    """`scheme://place?name=value&...`, whose settings are taken one by one."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        if not parts.scheme or parts.scheme not in STORES:
            known = " and ".join(f"{scheme}://" for scheme in STORES)
            raise ConfigError(f"--kv-remote {url}: there is no store of this kind; there are {known}")
        self.url = url
        self.scheme = parts.scheme
        self.place = parts.netloc  # HOST:PORT, or nothing
        self.path = parts.path
        self._settings = dict(parse_qsl(parts.query, keep_blank_values=True))
        self._known: list[str] = []

    def text(self, name: str, default: str) -> str:
        self._known.append(name)
        return self._settings.pop(name, default)

    def size(self, name: str, default: int) -> int:
        """Bytes: a number, with or without one of KiB, MiB, GiB, TiB behind it."""
        text = self.text(name, str(default))
        unit = next((unit for unit in _UNITS if unit and text.endswith(unit)), "")
        try:
            size = int(float(text.removesuffix(unit)) * _UNITS[unit])
        except (ValueError, OverflowError):
            size = -1
        if size < 0:
            raise ConfigError(f"--kv-remote: {name}={text} is no size; write it like 500MiB or 4GiB")
        return size

    def end(self) -> None:
        """All settings that there are have been taken."""
        for name in self._settings:
            raise ConfigError(
                f"--kv-remote: {self.scheme}:// has no setting {name!r}; there are {', '.join(self._known)}"
            )


def open_store(url: str) -> Store:
    """Reached and ready. ConfigError with a sentence where it is not."""
    opens, address = _find(url)
    return opens(address)


def check_url(url: str) -> int:
    """Host memory in bytes that the store takes of its own. ConfigError for an address that cannot be right; nobody has
    been spoken to."""
    opens, address = _find(url)
    memory: int = opens.check(address)
    return memory


class _Opens(Protocol):
    def __call__(self, address: Address) -> Store: ...

    check: Callable[[Address], int]


def _find(url: str) -> tuple[_Opens, Address]:
    address = Address(url)
    module, _, name = STORES[address.scheme].partition(":")
    return cast(_Opens, getattr(import_module(module), name)), address
