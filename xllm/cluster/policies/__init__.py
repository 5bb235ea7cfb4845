"""Which instance gets a request: one function per file and one line here each.

A policy is a pure function of what the router knows. It returns None where nobody can take the request, which is then
shed; it never raises and never writes: what follows from a choice is told to the `Fleet` by who carries it out.
"""

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Protocol

from xllm.cluster.kv_index import KvIndex
from xllm.cluster.view import Ask, Choice, InstanceView
from xllm.core.clock import Clock
from xllm.core.errors import ConfigError

ROUTING: Mapping[str, str] = {
    "round_robin": "xllm.cluster.policies.round_robin:round_robin",
    "least_loaded": "xllm.cluster.policies.least_loaded:least_loaded",
    "prefix_aware": "xllm.cluster.policies.prefix_aware:prefix_aware",
    "kv_aware": "xllm.cluster.policies.kv_aware:kv_aware",
    "slo_aware": "xllm.cluster.policies.slo_aware:slo_aware",
}


class Policy(Protocol):
    def __call__(
        self, ask: Ask, views: Iterable[InstanceView], index: KvIndex, clock: Clock
    ) -> Choice | None: ...


def load(name: str) -> Policy:
    """The policy called `name`. `ConfigError` naming the known ones where there is none."""
    target = ROUTING.get(name)
    if target is None:
        raise ConfigError(
            f"unknown routing policy {name!r}; known: {', '.join(ROUTING)}", param="routing_policy"
        )
    module, _, function = target.partition(":")
    policy: Policy = getattr(import_module(module), function)
    return policy
