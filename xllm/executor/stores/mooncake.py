"""A Mooncake Store: memory of many machines under one `mooncake_master` (https://github.com/kvcache-ai/Mooncake).

Every engine may lend it memory (`segment`); blocks lie there until the master gives them up or that engine ends.
"""

import logging
import os
import socket
from collections.abc import Sequence
from typing import Any

import numpy as np

from xllm.core.errors import ConfigError
from xllm.executor.lanes import Lane
from xllm.executor.stores.table import Address

log = logging.getLogger(__name__)

DEFAULT_PORT = 50051
REACH_S = 5.0  # for the master to accept a connection
SETUP_S = 60.0
UNANSWERED = -900  # codes from here down: the master cannot be spoken to


class MooncakeStore:
    """`mooncake://HOST:PORT` of the master, with any of

    segment=1GiB     memory that this engine lends to the store; 0: none, others do
    protocol=tcp     or rdma
    devices=         of RDMA, separated by commas; none: it chooses
    metadata=        of the transfer engine; P2PHANDSHAKE: no server is needed
    hostname=        under which others reach this engine; none: the address that the master is reached from
    """

    def __init__(self, address: Address):
        self._segment, host, port, self._setup = _settings(address)
        here = _reach(host, port)
        self._store = _client()
        settings = {
            **self._setup, "master_server_addr": f"{host}:{port}",
            "local_hostname": self._setup["local_hostname"] or here,
        }  # fmt: skip
        try:
            code = Lane("xllm-kv-mooncake").call(lambda: self._store.setup(settings), SETUP_S)
        except TimeoutError:
            code = "no answer"
        if code != 0:
            raise ConfigError(
                f"--kv-remote: the Mooncake store at {host}:{port} was reached, but joining it failed ({code})"
            )

    @staticmethod
    def check(address: Address) -> int:
        segment, *_ = _settings(address)
        _client_class()
        return segment

    def register(self, memory: np.ndarray) -> None:
        if code := self._store.register_buffer(memory.ctypes.data, memory.nbytes):
            raise ConfigError(f"--kv-remote: Mooncake cannot use the engine's memory ({code})")

    def put(self, keys: Sequence[str], records: Sequence[np.ndarray]) -> list[bool]:
        codes = self._store.batch_put_from([*keys], *_places(records))
        return [code == 0 for code in _answered(codes)]

    def get(self, keys: Sequence[str], into: Sequence[np.ndarray]) -> list[bool]:
        codes = self._store.batch_get_into([*keys], *_places(into))
        return [code == record.nbytes for code, record in zip(_answered(codes), into, strict=True)]

    def exists(self, keys: Sequence[str]) -> list[bool]:
        return [code == 1 for code in _answered(self._store.batch_is_exist([*keys]))]

    def remove(self, keys: Sequence[str]) -> None:
        _answered(self._store.batch_remove([*keys], True))

    def close(self) -> None:
        self._store.close()


def _settings(address: Address) -> tuple[int, str, int, dict[str, Any]]:
    segment = address.size("segment", 1 << 30)
    setup: dict[str, Any] = {
        "metadata_server": address.text("metadata", "P2PHANDSHAKE"),
        "protocol": address.text("protocol", "tcp"),
        "rdma_devices": address.text("devices", ""),
        "local_hostname": address.text("hostname", ""),
        "global_segment_size": segment,
        "local_buffer_size": 16 << 20,  # records go through memory of our own
    }
    address.end()
    host, _, port = address.place.rpartition(":") if ":" in address.place else (address.place, "", "")
    if not host or address.path.strip("/") or (port and not port.isdigit()):
        raise ConfigError(
            f"--kv-remote {address.url}: mooncake:// wants the master's HOST:PORT, as in mooncake://10.0.0.1:50051"
        )
    return segment, host, int(port or DEFAULT_PORT), setup


def _client_class() -> Any:
    os.environ.setdefault("MC_LOG_LEVEL", "WARNING")
    try:
        from mooncake.store import MooncakeDistributedStore
    except ImportError as e:
        raise ConfigError(
            "--kv-remote mooncake:// needs the package mooncake-transfer-engine (on a machine without CUDA "
            f"mooncake-transfer-engine-non-cuda) and what it links to: {e}"
        ) from e
    return MooncakeDistributedStore


def _client() -> Any:
    return _client_class()()


def _reach(host: str, port: int) -> str:
    """The address of this machine that the master sees. Joining takes minutes to fail where nobody is there."""
    try:
        with socket.create_connection((host, port), REACH_S) as connection:
            name: str = connection.getsockname()[0]
            return name
    except OSError as e:
        raise ConfigError(f"--kv-remote: no Mooncake master can be reached at {host}:{port}: {e}") from e


def _places(records: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    return [record.ctypes.data for record in records], [record.nbytes for record in records]


def _answered(codes: Sequence[int]) -> Sequence[int]:
    for code in codes:
        if code <= UNANSWERED:
            raise OSError(f"the Mooncake master does not answer ({code})")
    return codes
