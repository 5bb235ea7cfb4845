"""What goes to etcd and what comes back, without its JSON's base64 and its integers in quotes."""

import base64
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class KeyValue:
    key: bytes
    value: bytes
    create_revision: int  # of the life of the key that lasts until it is deleted
    mod_revision: int
    lease: int  # 0: none


@dataclass(frozen=True, slots=True)
class Range:
    kvs: list[KeyValue]  # by key
    revision: int  # of the whole store when it was read
    count: int  # of all keys that were meant, though fewer may have been asked for


@dataclass(frozen=True, slots=True)
class Event:
    kind: Literal["put", "delete"]
    kv: KeyValue  # of a deleted one: key and the revision at which it was deleted


@dataclass(frozen=True, slots=True)
class WatchBatch:
    events: list[Event]
    revision: int


@dataclass(frozen=True, slots=True)
class Compare:
    """Holds while `key`'s revision is exactly this; 0: while there is no such key."""

    key: bytes
    which: Literal["CREATE", "MOD"]
    revision: int

    def to_json(self) -> dict[str, Any]:
        field = "create_revision" if self.which == "CREATE" else "mod_revision"
        return {"key": _text(self.key), "target": self.which, "result": "EQUAL", field: str(self.revision)}


@dataclass(frozen=True, slots=True)
class Put:
    key: bytes
    value: bytes
    lease: int = 0

    def to_json(self) -> dict[str, Any]:
        return {"request_put": {"key": _text(self.key), "value": _text(self.value), "lease": str(self.lease)}}


@dataclass(frozen=True, slots=True)
class Transaction:
    succeeded: bool  # the comparisons held
    revision: int  # of what it wrote, where it wrote


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
