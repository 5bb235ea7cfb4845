"""The tables of policies: one function and one line here each. Names are resolved when a scheduler is built."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from xllm.core.errors import ConfigError

BATCHING: Mapping[str, str] = {
    "chunked": "xllm.scheduler.batching:chunked",
    "prefill_first": "xllm.scheduler.batching:prefill_first",
    "decode_first": "xllm.scheduler.batching:decode_first",
}
ORDER: Mapping[str, str] = {
    "fcfs": "xllm.scheduler.order:fcfs",
    "priority": "xllm.scheduler.order:priority",
    "deadline": "xllm.scheduler.order:deadline",
    "shortest": "xllm.scheduler.order:shortest",
}
ADMISSION: Mapping[str, str] = {
    "optimistic": "xllm.scheduler.admission:optimistic",
    "no_eviction": "xllm.scheduler.admission:no_eviction",
}


def load(kind: str, table: Mapping[str, str], name: str) -> Callable[..., Any]:
    """The policy called `name`. `ConfigError` naming the known ones where there is none."""
    target = table.get(name)
    if target is None:
        raise ConfigError(f"unknown {kind} policy {name!r}; known: {', '.join(table)}", param=kind)
    module, _, function = target.partition(":")
    policy: Callable[..., Any] = getattr(import_module(module), function)
    return policy
