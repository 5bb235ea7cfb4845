"""Where the request's KV fits best: for long contexts, where memory and not arithmetic is what runs out."""

from collections.abc import Iterable

from xllm.cluster.kv_index import NOTHING, KvIndex
from xllm.cluster.policies.prefix_aware import OUTPUT
from xllm.cluster.view import Ask, Choice, InstanceView, cached_tokens, candidates
from xllm.core.clock import Clock


def kv_aware(ask: Ask, views: Iterable[InstanceView], index: KvIndex, clock: Clock) -> Choice | None:
    """The largest share of the KV blocks left free once the request and its output are in. Cached blocks of its prompt
    need no new memory. Where the share is negative something waits or is preempted: there the least is missing."""
    found = candidates(ask, views)
    if not found:
        return None
    held = index.longest(ask.hashes)
    reasons: dict[str, dict[str, float]] = {}
    for view in found:
        blocks = view.blocks_for(ask.prompt_tokens + (ask.expected_output or OUTPUT))
        needed = blocks - held.get(view.id, NOTHING)[0]
        reasons[view.id] = {
            "headroom": (view.free_blocks - needed) / view.capacity.num_blocks,
            "free_blocks": view.free_blocks,
            "needed_blocks": float(needed),
            "active": float(view.active),
        }
    found.sort(key=lambda view: (-reasons[view.id]["headroom"], view.active))
    best = found[0]
    cached = cached_tokens(ask, best, held.get(best.id, NOTHING))
    return Choice(best.id, "kv_aware", {view.id: reasons[view.id] for view in found}, cached)
