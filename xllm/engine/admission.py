"""From a Submit message to a Request in the scheduler."""

from collections.abc import Sequence

from xllm.core.errors import XllmError
from xllm.core.output import Finish, SequenceOutput
from xllm.core.request import Request
from xllm.core.seeds import GOLDEN, MASK, mix
from xllm.scheduler.scheduler import Scheduler
from xllm.wire.messages import Submit


class Admission:
    """Resolves what a request left open: its seed, its longest length, what ends it."""

    def __init__(self, scheduler: Scheduler, *, eos_ids: frozenset[int], max_model_len: int, seed: int):
        self._scheduler = scheduler
        self._eos_ids = eos_ids
        self._max_model_len = max_model_len
        self._seed = seed
        self._submitted = 0

    def submit(self, message: Submit, now: float) -> Sequence[SequenceOutput]:
        """Empty when admitted; the terminal error output when the scheduler refuses."""
        params = message.params
        own = frozenset() if params.ignore_eos else self._eos_ids
        longest = self._max_model_len
        if params.max_tokens is not None:
            longest = min(longest, len(message.prompt_token_ids) + params.max_tokens)
        request = Request(
            id=message.request_id,
            prompt_token_ids=list(message.prompt_token_ids),
            params=params,
            arrival=now,
            max_total_tokens=longest,
            seed=self._draw() if params.seed is None else params.seed & MASK,
            stop_ids=own.union(params.stop_token_ids) if params.stop_token_ids else own,
            eos_ids=own,
            priority=message.priority,
            deadline=None if message.deadline_s is None else now + message.deadline_s,
            cache_salt=message.cache_salt,
        )
        try:
            self._scheduler.add(request)
        except XllmError as e:
            return [SequenceOutput(request_id=message.request_id, finish=Finish.ERROR, error=e.message)]
        return []

    def _draw(self) -> int:
        """A seed for a request that brought none: splitmix64 of the engine's seed and a count of requests."""
        self._submitted += 1
        return mix(self._seed * GOLDEN + self._submitted * 0xD1B54A32D192ED03)
