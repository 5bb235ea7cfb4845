"""Why each request went where it went: kept for a while, for whoever asks."""

from collections import OrderedDict
from typing import Any

from xllm.cluster.journey import CANDIDATES, Journey, Stage
from xllm.core.clock import Clock, monotonic

KEPT = 4096  # requests


class Decisions:
    """Journeys by the request that they are part of, the last `kept` requests. Belongs to one thread at a time."""

    def __init__(self, kept: int = KEPT, clock: Clock = monotonic):
        self._kept = kept
        self._clock = clock
        self._journeys: OrderedDict[str, list[Journey]] = OrderedDict()

    def add(self, journey: Journey) -> None:
        """A completion of the request `<request>/<index>` has been placed."""
        request = journey.id.rpartition("/")[0] or journey.id
        self._journeys.setdefault(request, []).append(journey)
        self._journeys.move_to_end(request)
        while len(self._journeys) > self._kept:
            self._journeys.popitem(last=False)

    def instances(self, request: str) -> list[str]:
        """Where the request has been, in order, each once."""
        stages = [stage for journey in self._journeys.get(request, ()) for stage in journey.stages]
        return list(dict.fromkeys(stage.at.id for stage in sorted(stages, key=lambda stage: stage.sent)))

    def of(self, request: str) -> dict[str, Any] | None:
        """What `GET /v1/requests/{id}` answers; None for a request that is not, or no longer, known. Seconds count from the
        arrival of the completion that they belong to."""
        journeys = self._journeys.get(request)
        if journeys is None:
            return None
        return {"id": request, "completions": [_told(journey, self._clock()) for journey in journeys]}


def _told(journey: Journey, now: float) -> dict[str, Any]:
    last = journey.stages[-1] if journey.stages else None
    return {
        "id": journey.id,
        "prompt_tokens": journey.prompt_tokens,
        "output_tokens": sum(stage.tokens for stage in journey.stages),
        "age_s": _s(now - journey.arrived),
        "ended": last is not None and last.ended is not None and journey.lost_at is None,
        "waits_for_an_instance": journey.lost_at is not None,
        "stages": [_stage(stage, journey.arrived) for stage in journey.stages],
    }


def _stage(stage: Stage, arrived: float) -> dict[str, Any]:
    candidates = list(stage.choice.reasons.items())[:CANDIDATES]
    return {
        "instance": stage.at.id,
        "epoch": stage.at.epoch,
        "why": stage.why,
        "policy": stage.choice.policy,
        "candidates": {id: {name: _s(n) for name, n in numbers.items()} for id, numbers in candidates},
        "cached_tokens_expected": stage.choice.cached_tokens,
        "cached_tokens": stage.cached,
        "tokens_brought": stage.had,
        "tokens": stage.tokens,
        "sent_s": _s(stage.sent - arrived),
        "first_token_s": None if stage.first is None else _s(stage.first - arrived),
        "ended_s": None if stage.ended is None else _s(stage.ended - arrived),
        "kv_from": None
        if stage.pairing is None
        else {
            "instance": stage.pairing.peer,
            "computes": stage.pairing.compute,
            "reasons": {name: _s(n) for name, n in stage.pairing.reasons.items()},
            "tokens": stage.fetched,
            "waited_s": _s(stage.fetch_s),
        },
        "queued_s": stage.queued_s,
        "prefill_s": stage.prefill_s,
    }


def _s(seconds: float) -> float:
    return round(seconds, 6)
