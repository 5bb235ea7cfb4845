"""From a Submit message to a Request in the scheduler."""

import math
from collections.abc import Sequence

from xllm.core.errors import InvalidRequest, XllmError
from xllm.core.output import Finish, SequenceOutput
from xllm.core.request import Request
from xllm.core.seeds import MASK, SeedSource
from xllm.scheduler.scheduler import Scheduler
from xllm.wire.messages import Submit


class Admission:
    """Resolves what a request left open: its seed, its longest length, what ends it."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        eos_ids: frozenset[int],
        max_model_len: int,
        seed: int,
        vocab_size: int | None = None,
    ):
        """Without `vocab_size` any token id passes."""
        self._scheduler = scheduler
        self._eos_ids = eos_ids
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._seeds = SeedSource(seed)

    def submit(self, message: Submit, now: float) -> Sequence[SequenceOutput]:
        """Empty when admitted; the terminal output when it is refused (an error) or its given output has ended it."""
        try:
            self._check(message)
            ended = self._scheduler.add(self.request(message, now))
        except XllmError as e:
            return [SequenceOutput(request_id=message.request_id, finish=Finish.ERROR, error=e.message)]
        return [] if ended is None else [ended]

    def request(self, message: Submit, now: float) -> Request:
        """That the message asks for; nobody knows of it yet."""
        params = message.params
        own = frozenset() if params.ignore_eos else self._eos_ids
        longest = self._max_model_len
        if params.max_tokens is not None:
            longest = min(longest, len(message.prompt_token_ids) + params.max_tokens)
        given = list(message.output_token_ids)
        return Request(
            id=message.request_id,
            prompt_token_ids=list(message.prompt_token_ids),
            params=params,
            arrival=now - message.waited_s,
            max_total_tokens=longest,
            seed=self._seed_of(message),
            stop_ids=own.union(params.stop_token_ids) if params.stop_token_ids else own,
            eos_ids=own,
            priority=message.priority,
            deadline=None if message.deadline_s is None else now + message.deadline_s,
            cache_salt=message.cache_salt,
            kv_from=message.kv_from,
            output_token_ids=given,
            num_prompt_logprobs=len(message.prompt_token_ids) - 1 if given else message.num_prompt_logprobs,
        )

    def _seed_of(self, message: Submit) -> int:
        seed = message.params.seed if message.seed is None else message.seed
        return self._seeds.draw() if seed is None else seed & MASK

    def _check(self, message: Submit) -> None:
        """Of what tells that it began elsewhere. The prompt is the front end's to check, lengths are the scheduler's."""
        given, prompt = message.output_token_ids, len(message.prompt_token_ids)
        if given and self._vocab_size is not None:
            for token in (min(given), max(given)):
                if not 0 <= token < self._vocab_size:
                    raise InvalidRequest(
                        f"output_token_ids: token id {token} is not in the vocabulary of {self._vocab_size}",
                        param="output_token_ids",
                    )
        if not 0.0 <= message.waited_s < math.inf:
            raise InvalidRequest("waited_s must be a finite time, and not negative", param="waited_s")
        if not 0 <= message.num_prompt_logprobs <= max(0, prompt - 1):
            raise InvalidRequest(
                f"{message.num_prompt_logprobs} prompt logprobs cannot have come of a prompt of {prompt} tokens",
                param="num_prompt_logprobs",
            )
