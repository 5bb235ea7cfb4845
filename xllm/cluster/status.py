"""How one instance stands in a router's eyes, for people and for metrics."""

from dataclasses import dataclass

from xllm.cluster.dispatch import Dispatcher
from xllm.cluster.link import Link, Standing


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """One instance as this router sees it."""

    id: str
    epoch: int
    address: str
    role: str
    state: str  # "serving", "draining", "leaving", or where it does not stand well: "away", "stalled"
    why: str  # empty where it serves
    requests: int  # of this router
    running: int
    waiting: int
    kv_usage: float
    cached_blocks: tuple[int, int, int]  # that this router knows of: device, host, disk


def status(link: Link, dispatcher: Dispatcher, draining: bool) -> InstanceStatus:
    state, why = standing(link, draining)
    stats, info = link.stats, link.info
    return InstanceStatus(
        id=info.id, epoch=info.epoch, address=info.address, role=info.role, state=state, why=why,
        requests=dispatcher.running(link.at), running=stats.running if stats else 0,
        waiting=stats.waiting if stats else 0, kv_usage=stats.kv_usage if stats else 0.0,
        cached_blocks=dispatcher.index.totals(info.id),
    )  # fmt: skip


def standing(link: Link, draining: bool) -> tuple[str, str]:
    """State and reason; no reason where it serves."""
    if link.leaving:
        return "leaving", "it is not registered any more"
    if link.standing is not Standing.WELL:
        return link.standing.value, link.why
    return ("draining", "it is shutting down") if draining else ("serving", "")
