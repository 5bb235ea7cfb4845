"""Where reuse minus load is best.

The cost of an instance is a number of tokens that it has to compute, for this request or before it, until the request
is done: what is not cached of the prompt, what is queued ahead, and what decoding shares with the others that run. So a
cached prefix draws a request exactly as long as the queue there is shorter than what the prefix saves, and a hot prefix
spreads: where the load has grown by more than the prefix is worth, the request goes elsewhere and is cached there too.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from xllm.cluster.kv_index import NOTHING, Blocks, KvIndex
from xllm.cluster.view import Ask, Choice, InstanceView, cached_tokens, candidates
from xllm.core.clock import Clock

# share of its prefill that a cached token saves, by tier: copying it up costs the rest
WORTH = (1.0, 0.9, 0.7)
# tokens that each running sequence costs us, per token of our output: a batch shares the reading of the weights, so a
# neighbour costs less than a token of prefill
NEIGHBOUR = 0.5
# the same for each request that has to end before there is a place for ours: a step that decodes takes the time of far
# more tokens than it computes. Chosen in simulation (tests/cluster/simulator.py): 6 does about as well, with 2 traffic
# without prefixes waits longer than under `least_loaded` once all places are taken
PLACE = 12.0
OUTPUT = 128  # tokens, where nobody said how many are expected


@dataclass(frozen=True, slots=True)
class Cost:
    """All in tokens; a slower tier's tokens count partly in `uncached`."""

    cached_tokens: int
    uncached: float
    queued: float
    neighbours: float
    places: float

    @property
    def total(self) -> float:
        return self.uncached + self.queued + self.neighbours + self.places

    def reasons(self) -> dict[str, float]:
        return {
            "cost": self.total,
            "cached_tokens": float(self.cached_tokens),
            "uncached": self.uncached,
            "queued": self.queued,
            "neighbours": self.neighbours,
            "places": self.places,
        }


def cost(ask: Ask, view: InstanceView, held: Blocks) -> Cost:
    """What `ask` costs on an instance that holds `held` blocks of its prompt, by tier."""
    size = view.capacity.block_size
    saved = size * sum(worth * blocks for worth, blocks in zip(WORTH, held, strict=True))
    active, places = view.active, view.capacity.max_num_seqs
    output = ask.expected_output or OUTPUT
    return Cost(
        cached_tokens=cached_tokens(ask, view, held),
        uncached=max(1.0, ask.prompt_tokens - saved),
        queued=view.queued_tokens,
        neighbours=NEIGHBOUR * output * min(active, places),
        places=PLACE * output * max(0, active + 1 - places),
    )


def costs(
    ask: Ask, views: Iterable[InstanceView], index: KvIndex
) -> tuple[list[InstanceView], dict[str, Cost]]:
    """All candidates, cheapest first, and their costs."""
    found = candidates(ask, views)
    held = index.longest(ask.hashes) if found else {}
    by_id = {view.id: cost(ask, view, held.get(view.id, NOTHING)) for view in found}
    found.sort(key=lambda view: by_id[view.id].total)
    return found, by_id


def prefix_aware(ask: Ask, views: Iterable[InstanceView], index: KvIndex, clock: Clock) -> Choice | None:
    """The least tokens to compute until the request is done."""
    found, by_id = costs(ask, views, index)
    if not found:
        return None
    best = found[0].id
    reasons = {view.id: by_id[view.id].reasons() for view in found}
    return Choice(best, "prefix_aware", reasons, by_id[best].cached_tokens)
