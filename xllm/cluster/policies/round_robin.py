"""Everybody in turn, whatever they have to do."""

from collections.abc import Iterable

from xllm.cluster.kv_index import NOTHING, KvIndex
from xllm.cluster.view import Ask, Choice, InstanceView, cached_tokens, candidates
from xllm.core.clock import Clock


def round_robin(ask: Ask, views: Iterable[InstanceView], index: KvIndex, clock: Clock) -> Choice | None:
    """Whoever waited longest for a request. An instance that joins is next, once."""
    found = candidates(ask, views)
    if not found:
        return None
    best = found[0]
    cached = cached_tokens(ask, best, index.longest(ask.hashes).get(best.id, NOTHING))
    return Choice(best.id, "round_robin", {view.id: {"turn": float(view.turn)} for view in found}, cached)
