"""Transports of KV blocks by name. A new one is one file and one line here."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, cast

import torch

from xllm.core.errors import ConfigError
from xllm.executor.transports.base import Blocks, Settings, Transport

TRANSPORTS = {
    "tcp": "xllm.executor.transports.tcp:TcpTransport",
    "nixl": "xllm.executor.transports.nixl:NixlTransport",
    "mooncake": "xllm.executor.transports.mooncake:MooncakeTransport",
    "local": "xllm.executor.transports.local:LocalTransport",
    "faulty": "xllm.executor.transports.faulty:FaultyTransport",
}
AUTO = "auto"
NIXL_MODULES = ("nixl_cu13", "nixl_cu12")


class _Opens(Protocol):
    def __call__(self, blocks: Blocks, settings: Settings) -> Transport: ...


def open_transport(
    name: str, memory: torch.Tensor, *, token: str | None = None, listen: str = "127.0.0.1",
    advertise: str | None = None, mapped: bool = False,
) -> Transport:  # fmt: skip
    """A transport over the KV cache `memory` [blocks, ...], of which each block is contiguous.

    `name` is one of `TRANSPORTS`, "auto", or "faulty:..." as that one's file says. Where peers come over a network of
    ours they must know the `token` (None: whoever can connect may read KV), and find us at `advertise` (`listen` where that is
    None). `mapped`: the memory consists of pieces that are mapped, and not all of it need be there. ConfigError with a sentence
    where it cannot be.
    """
    kind, _, detail = name.partition(":")
    return open_blocks(kind, Blocks(memory), Settings(detail, token, listen, advertise, mapped))


def open_blocks(kind: str, blocks: Blocks, settings: Settings) -> Transport:
    """The same without the settings behind the name."""
    if kind == AUTO:
        kind = chosen(on_card=blocks.on_card, mapped=settings.mapped)
    if kind not in TRANSPORTS:
        raise ConfigError(
            f"--kv-transport {kind}: there is no such transport; there are {AUTO}, {', '.join(names())}"
        )
    if settings.detail and kind != "faulty":
        raise ConfigError(f"--kv-transport {kind}:{settings.detail}: {kind} takes no settings")
    if settings.token == "":  # an unset variable, rather than somebody's wish
        raise ConfigError("an empty token keeps nobody out")
    module, _, attr = TRANSPORTS[kind].partition(":")
    return cast(_Opens, getattr(import_module(module), attr))(blocks, settings)


def names() -> list[str]:
    """Those that a user may ask for."""
    return [name for name in TRANSPORTS if name not in ("local", "faulty")]


def chosen(*, on_card: bool, mapped: bool) -> str:
    """What `auto` is: NIXL where it is installed and can read a card's memory, else TCP."""
    return "nixl" if on_card and not mapped and nixl_module() is not None else "tcp"


def spoken(name: str, *, on_card: bool, mapped: bool) -> str:
    """What a transport is told by to others: only those that speak the same can read each other."""
    kind, _, detail = name.partition(":")
    if kind == "faulty":
        kind = detail.partition("?")[0] or "tcp"
    return chosen(on_card=on_card, mapped=mapped) if kind == AUTO else kind


def nixl_module(found: Callable[[str], object] = find_spec) -> str | None:
    """The package that goes with this PyTorch's CUDA, where it is installed."""
    major = _cuda_major()
    wanted = [m for m in NIXL_MODULES if m.endswith(f"cu{major}")] if major else NIXL_MODULES
    return next((module for module in wanted if found(module) is not None), None)


def nixl_package() -> str:
    """What to install."""
    return "nixl-cu12" if _cuda_major() == "12" else "'pyxllm[pd]'"


def _cuda_major() -> str:
    return (torch.version.cuda or "").partition(".")[0]
