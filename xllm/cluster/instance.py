"""What etcd holds about instances: who they are, how loaded they are, and under which keys.

Values are JSON, so that `etcdctl get --prefix /xllm` shows a person the cluster, in an envelope with a version. Fields
that a reader does not know are passed over; a version it does not know is a `RegistryError`.
"""

import time
from dataclasses import dataclass
from typing import Literal, TypeVar

import msgspec

from xllm.core.errors import ConfigError, XllmError

VERSION = 1

Role = Literal["both", "prefill", "decode"]


class RegistryError(XllmError):
    """What lies in the registry is not what this version writes there."""

    type = "registry_error"


class KvFacts(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whose KV fits whose: instances of one fingerprint and block size can read each other's blocks."""

    block_size: int  # tokens
    kv_dtype: str
    num_blocks: int
    fingerprint: str  # hexadecimal, see `xllm.executor.fingerprint`


class InstanceInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    id: str
    epoch: int  # of this incarnation: a process that takes the same id later has a higher one
    address: str  # where routers speak `xllm.wire` with it, tcp://host:port
    model: str
    kv: KvFacts
    max_num_seqs: int
    max_model_len: int
    max_num_batched_tokens: int = 2048  # of a step
    max_num_queued: int | None = None  # requests beyond max_num_seqs; None: as many as come
    role: Role = "both"  # for routers: each of them takes every request
    # of KV: instances of the same transport and one fingerprint exchange it; None: this one does not
    transport: str | None = None
    http: str | None = None  # URL of its own HTTP server
    draining: bool = False  # finishes what runs, takes nothing new


class LoadSummary(msgspec.Struct, frozen=True, omit_defaults=True):
    """Every few seconds, for whoever reads etcd alone. Routers have it finer from the instances themselves."""

    sequence: int  # of the KV events published so far
    running: int = 0  # requests
    waiting: int = 0
    kv_usage: float = 0.0  # 0 to 1
    cached_blocks: dict[str, int] = {}  # blocks in the prefix index, by tier ("GPU", "CPU", "DISK")


class _Envelope(msgspec.Struct, frozen=True):
    v: int
    body: msgspec.Raw


S = TypeVar("S", bound=msgspec.Struct)


def encode(value: msgspec.Struct) -> bytes:
    return msgspec.json.encode(_Envelope(VERSION, msgspec.Raw(msgspec.json.encode(value))))


def decode(data: bytes, kind: type[S]) -> S:
    """Raises RegistryError for another version or bytes that are no `kind`."""
    try:
        envelope = msgspec.json.decode(data, type=_Envelope)
        if envelope.v != VERSION:
            raise RegistryError(f"{kind.__name__} of version {envelope.v}, this is version {VERSION}")
        return msgspec.json.decode(envelope.body, type=kind)
    except msgspec.MsgspecError as e:
        raise RegistryError(f"not a {kind.__name__}: {e}") from e


@dataclass(frozen=True, slots=True)
class Keys:
    """Where one cluster's things lie: `/xllm/<cluster>/instances/<id>` and so on."""

    cluster: str = "default"

    def __post_init__(self) -> None:
        check_name(self.cluster, "a cluster's name")

    @property
    def root(self) -> bytes:
        return f"/xllm/{self.cluster}/".encode()

    def instance(self, id: str) -> bytes:
        return self.root + b"instances/" + id.encode()

    def load(self, id: str) -> bytes:
        return self.root + b"load/" + id.encode()

    def epoch(self, id: str) -> bytes:
        """Outlives the lease: the highest epoch that an id has had."""
        return self.root + b"epochs/" + id.encode()

    def leader(self, office: str) -> bytes:
        return self.root + b"leaders/" + office.encode()

    def split(self, key: bytes) -> tuple[str, str]:
        """`("instances", id)` and the like; two empty strings for what is not ours."""
        if not key.startswith(self.root):
            return "", ""
        kind, _, name = key[len(self.root) :].decode(errors="replace").partition("/")
        return kind, name


def check_name(name: str, what: str) -> None:
    """Raises ConfigError where `name` cannot be part of a key."""
    if not name or len(name) > 200 or not all(c.isascii() and (c.isalnum() or c in "._:-") for c in name):
        raise ConfigError(f"{what} consists of letters, digits and . _ : - (200 at most), not {name[:80]!r}")


def epoch_now(stored: int = 0) -> int:
    """An epoch for a process that starts: milliseconds since 1970, and more than what the id had before, though a clock
    may have gone back."""
    return max(int(time.time() * 1000), stored + 1)
