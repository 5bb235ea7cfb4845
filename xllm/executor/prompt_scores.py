"""Log-probabilities of prompt tokens, for the sequences that want them: which rows they need, and how they are scored."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from xllm.core.plan import NewSequence, StepPlan, TokenLogprobs
from xllm.executor.sampling import Sampler

LOGITS_ROWS = 64  # computed in slices: 64 rows of a 150k vocabulary are 40 MB

Pending = Callable[
    [], dict[int, Sequence[TokenLogprobs]]
]  # plan index -> entries; once the device was waited for


class PromptScores:
    """Belongs to the executor's thread."""

    def __init__(
        self, sampler: Sampler, logits: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor
    ):
        self._sampler = sampler
        self._logits = logits
        self._tokens = tokens  # [slots, positions]: the sequences themselves
        self._wanted: dict[int, tuple[int, int]] = {}  # slot -> (prompt length, how many candidates)

    def admit(self, seq: NewSequence) -> None:
        """A sequence that has an output token has had its prompt's scores."""
        self._wanted.pop(seq.slot, None)
        if seq.params.prompt_logprobs is not None and len(seq.token_ids) == seq.prompt_len:
            self._wanted[seq.slot] = (seq.prompt_len, seq.params.prompt_logprobs)

    def any_in(self, slots: Sequence[int]) -> bool:
        return bool(self._wanted) and any(slot in self._wanted for slot in slots)

    def rows(self, plan: StepPlan, ends: np.ndarray) -> list[tuple[int, int, int]]:
        """(plan index, first row, last row) of the tokens that predict a prompt token somebody wants scored.

        ends: [sequences], where each one's tokens end in the step.
        """
        return list(self._rows(plan, ends)) if self._wanted else []

    def _rows(self, plan: StepPlan, ends: np.ndarray) -> Iterator[tuple[int, int, int]]:
        for i, slot in enumerate(plan.slots):
            wanted = self._wanted.get(slot)
            if wanted is None:
                continue
            count = min(plan.counts[i], wanted[0] - 1 - plan.starts[i])
            if count > 0:
                first = int(ends[i]) - plan.counts[i]
                yield i, first, first + count

    def score(self, plan: StepPlan, rows: list[tuple[int, int, int]], hidden: torch.Tensor) -> Pending:
        """hidden: [all those rows, features], final-normed, one range behind the other."""
        fetched: dict[int, list[Callable[[], list[TokenLogprobs]]]] = {}
        done = 0
        for i, first, last in rows:
            slot, start, k = plan.slots[i], plan.starts[i], self._wanted[plan.slots[i]][1]
            targets = self._tokens[slot, start + 1 : start + 1 + last - first]
            for low in range(0, last - first, LOGITS_ROWS):
                high = min(low + LOGITS_ROWS, last - first)
                logits = self._logits(hidden[done + low : done + high])
                scores = self._sampler.fetch_prompt_logprobs(logits, targets[low:high], k)
                fetched.setdefault(i, []).append(scores.entries)
            done += last - first
        return lambda: {i: [entry for part in parts for entry in part()] for i, parts in fetched.items()}
