"""Whoever is least full."""

from collections.abc import Iterable

from xllm.cluster.kv_index import NOTHING, KvIndex
from xllm.cluster.view import Ask, Choice, InstanceView, cached_tokens, candidates
from xllm.core.clock import Clock


def least_loaded(ask: Ask, views: Iterable[InstanceView], index: KvIndex, clock: Clock) -> Choice | None:
    """The fewest requests for the sequences it can run at once; of equals the one with fewest tokens to prefill."""
    found = candidates(ask, views)
    found.sort(key=lambda view: (_share(view), view.queued_tokens))
    if not found:
        return None
    reasons = {
        view.id: {"load": _share(view), "active": float(view.active), "queued_tokens": view.queued_tokens}
        for view in found
    }
    best = found[0]
    cached = cached_tokens(ask, best, index.longest(ask.hashes).get(best.id, NOTHING))
    return Choice(best.id, "least_loaded", reasons, cached)


def _share(view: InstanceView) -> float:
    return view.active / view.capacity.max_num_seqs
