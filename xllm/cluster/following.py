"""From the registry to a router's connections: who has joined, changed, or left, among those that fit."""

import logging
from collections.abc import Callable

from xllm.cluster.client import ClusterClient
from xllm.cluster.instance import InstanceInfo
from xllm.cluster.membership import Changed, Joined, Left, Membership

log = logging.getLogger(__name__)


class Fit:
    """Which instances answer alike, so that a request can go to any of them and on to any other: those of one model and one
    longest sequence, whose blocks have one size and would hold the same KV. What is not given is taken from the first."""

    def __init__(self, model: str | None = None):
        self.model = model
        self._first: InstanceInfo | None = None

    def misfit(self, info: InstanceInfo) -> str | None:
        """Why `info` is not one of them, or None."""
        first = self._first
        if self.model is not None and info.model != self.model:
            return f"it serves {info.model}, not {self.model}"
        if first is None:
            self.model, self._first = info.model, info
            return None
        for what, theirs, ours in (
            ("its longest sequence is", info.max_model_len, first.max_model_len),
            ("its KV blocks have so many tokens:", info.kv.block_size, first.kv.block_size),
            ("the model, its weights or their precision differ:", info.kv.fingerprint, first.kv.fingerprint),
        ):
            if theirs != ours:
                return f"{what} {theirs}, and {ours} with {first.id}"
        return None


async def follow(
    membership: Membership, client: ClusterClient, fit: Fit, on_change: Callable[[], None] = lambda: None
) -> None:
    """For ever. Those that do not fit are passed over, with a line in the log."""
    async for change in membership.changes():
        info = change.member.info
        if isinstance(change, Left):
            client.left(info.id, info.epoch)
        elif (why := fit.misfit(info)) is not None:
            if isinstance(change, Joined):
                log.warning("instance %s at %s is passed over: %s", info.id, info.address, why)
            continue
        elif isinstance(change, Changed):
            client.changed(info)
        else:
            log.info("instance %s has joined, at %s", info.id, info.address)
            client.joined(info)
        on_change()
