"""Within the targets, and there at the least cost.

Time to the first token is predicted from the queue and the measured time of steps, time per token from the steps that
the batch will have with one sequence more; both are corrected by how far earlier predictions for that instance were
off. Among the instances that meet the targets the cheapest takes the request (`prefix_aware`'s cost), which leaves the
fast ones to requests that need them; where none does, the one that misses by the least, in shares of the targets.
"""

from collections.abc import Iterable

from xllm.cluster.kv_index import KvIndex
from xllm.cluster.policies.prefix_aware import Cost, costs
from xllm.cluster.view import Ask, Choice, InstanceView
from xllm.core.clock import Clock


def slo_aware(ask: Ask, views: Iterable[InstanceView], index: KvIndex, clock: Clock) -> Choice | None:
    """The cheapest instance that meets the targets, else the one with the least violation. Without targets the
    cheapest. An instance whose steps nobody has measured is taken to meet them: it is learnt by being used."""
    found, by_id = costs(ask, views, index)
    if not found:
        return None
    reasons = {view.id: _predicted(ask, view, by_id[view.id]) for view in found}
    found.sort(key=lambda view: (reasons[view.id]["violation"], reasons[view.id]["cost"]))
    best = found[0].id
    return Choice(best, "slo_aware", {view.id: reasons[view.id] for view in found}, by_id[best].cached_tokens)


def _predicted(ask: Ask, view: InstanceView, cost: Cost) -> dict[str, float]:
    ttft_s = view.ttft.factor * view.predict_ttft_s(cost.uncached)
    tpot_s = view.tpot.factor * view.predict_tpot_s()
    violation = _beyond(ttft_s, ask.ttft_s) + _beyond(tpot_s, ask.tpot_s)
    return {
        "violation": violation,
        "cost": cost.total,
        "ttft_s": ttft_s,
        "tpot_s": tpot_s,
        "cached_tokens": float(cost.cached_tokens),
    }


def _beyond(predicted: float, target: float | None) -> float:
    """By what share of the target the prediction misses it."""
    return max(0.0, predicted / target - 1) if target else 0.0
