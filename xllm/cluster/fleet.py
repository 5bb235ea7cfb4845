"""The views of all instances, and everything that is told about them and observed of their answers."""

from collections.abc import Iterator, Mapping
from math import inf

from xllm.cluster.view import Ask, Capacity, Choice, InstanceView, Load, Sent, Tally

REPORT_LAG_S = 0.05  # a report that arrives counts what was sent at least so long before


class Fleet:
    """The views of all instances: `views` is what policies read, the methods are what is told and observed."""

    def __init__(self) -> None:
        self._views: dict[str, InstanceView] = {}
        self._turns = 0

    @property
    def views(self) -> Mapping[str, InstanceView]:
        return self._views

    def __iter__(self) -> Iterator[InstanceView]:
        return iter(self._views.values())

    def joined(
        self, id: str, epoch: int, capacity: Capacity, role: str = "both", transport: str | None = None
    ) -> bool:
        """An instance is there. A later epoch is another process: nothing known of the one before holds. False, and
        nothing done, for an epoch that is over."""
        view = self._views.get(id)
        if view is not None and view.epoch > epoch:
            return False
        if view is None or view.epoch < epoch:
            self._views[id] = InstanceView(id, epoch, capacity, role, transport)
        else:
            view.capacity, view.role, view.transport = capacity, role, transport
        return True

    def left(self, id: str) -> None:
        self._views.pop(id, None)

    def serves(self, id: str, serving: bool) -> None:
        """Whether it gets new requests: not while it drains, or is not heard of."""
        if (view := self._views.get(id)) is not None:
            view.serving = serving

    def told(self, id: str, load: Load, now: float) -> None:
        """A report has arrived. Unknown instances' are passed over."""
        view = self._views.get(id)
        if view is None:
            return
        ours = view.ours
        view.load = load
        if 0 < load.step_s < inf and 0 < load.step_tokens < inf:
            view.steps.seen(load.step_tokens, load.step_s)
        ours.gone = ours.gone_blocks = 0
        for sent in ours.outstanding.values():
            if not sent.counted and sent.at <= now - REPORT_LAG_S:
                sent.counted = True
                ours.uncounted -= 1
                ours.uncounted_blocks -= sent.blocks
                ours.unanswered_counted += sent.first is None

    def sent(self, choice: Choice, ask: Ask, now: float) -> None:
        """`ask` goes to where `choice` says."""
        view = self._views.get(choice.instance)
        if view is None:
            return
        ours = view.ours
        if ask.request_id in ours.outstanding:
            self.ended(view.id, ask.request_id, now)
        tokens = max(1, ask.prompt_tokens - choice.cached_tokens)
        blocks = view.blocks_for(ask.prompt_tokens + 1)
        predicted = view.predict_ttft_s(tokens), view.predict_tpot_s()
        ours.outstanding[ask.request_id] = Sent(now, tokens, blocks, *predicted)
        self._turns += 1
        view.turn = self._turns
        ours.uncounted += 1
        ours.uncounted_blocks += blocks
        ours.unanswered += 1
        ours.unanswered_tokens += tokens
        ours.mean_tokens = _mean(ours.mean_tokens, tokens)

    def first_token(self, id: str, request_id: str, now: float) -> None:
        view = self._views.get(id)
        sent = view.ours.outstanding.get(request_id) if view is not None else None
        if view is None or sent is None or sent.first is not None:
            return
        _answered(view.ours, sent)
        sent.first = now
        view.ttft.seen(sent.predicted_ttft_s, now - sent.at)

    def ended(self, id: str, request_id: str, now: float, output_tokens: int = 0) -> None:
        """The request is over for this instance: finished with so many tokens, aborted, or gone elsewhere (0)."""
        view = self._views.get(id)
        sent = view.ours.outstanding.pop(request_id, None) if view is not None else None
        if view is None or sent is None:
            return
        if sent.first is None:
            _answered(view.ours, sent)
        elif output_tokens > 1:
            view.tpot.seen(sent.predicted_tpot_s, (now - sent.first) / (output_tokens - 1))
        if output_tokens:
            view.ours.mean_output = _mean(view.ours.mean_output, output_tokens)
        if sent.counted:
            view.ours.gone += 1
            view.ours.gone_blocks += sent.blocks
        else:
            view.ours.uncounted -= 1
            view.ours.uncounted_blocks -= sent.blocks


def _answered(ours: Tally, sent: Sent) -> None:
    ours.unanswered -= 1
    ours.unanswered_tokens -= sent.tokens
    ours.unanswered_counted -= sent.counted


def _mean(mean: float, value: float) -> float:
    """A running mean of about the last ten values; the first is the mean."""
    return mean + (value - mean) * 0.1 if mean else float(value)
