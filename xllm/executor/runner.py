"""One step on the device: plan -> Forward -> hidden states -> logits -> sampled tokens -> StepResult."""

import time
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import torch

from xllm.core.plan import StepPlan, StepResult, TokenLogprobs
from xllm.executor.buffers import InputBuffers
from xllm.executor.sampling import Sampler
from xllm.models.forward import Model

PROMPT_LOGITS_ROWS = 64  # prompt logprobs are computed in slices: 64 rows of a 150k vocabulary are 40 MB


class Runner:
    """Runs plans strictly in the order they were made. Belongs to one thread."""

    def __init__(self, model: Model, kv_cache: torch.Tensor, buffers: InputBuffers, sampler: Sampler):
        self._model = model
        self._kv_cache = kv_cache
        self._buffers = buffers
        self._sampler = sampler
        # slot -> (prompt length, how many candidates) of sequences that want prompt logprobs
        self._prompt_logprobs: dict[int, tuple[int, int]] = {}
        self.progress = 0  # layers computed since start: what health looks at
        model.on_layer = self._advance

    def _advance(self) -> None:
        self.progress += 1

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        begin = time.perf_counter()
        self._admit(plan)
        ends = np.cumsum(plan.counts)
        sampling = [i for i, wanted in enumerate(plan.samples) if wanted]
        prompt_rows = list(self._prompt_rows(plan, ends)) if self._prompt_logprobs else []
        rows = np.concatenate(
            [ends[sampling] - 1, *(np.arange(first, last) for _, first, last in prompt_rows)]
        )
        fwd = self._buffers.forward(plan, self._kv_cache, rows.astype(np.int64))
        hidden = self._model.forward(fwd)
        result = self._sample(plan, sampling, hidden[: len(sampling)])
        prompt_logprobs = (
            self._score_prompts(plan, prompt_rows, hidden[len(sampling) :]) if prompt_rows else {}
        )
        seconds = time.perf_counter() - begin
        return msgspec.structs.replace(result, prompt_logprobs=prompt_logprobs, seconds=seconds)

    def _admit(self, plan: StepPlan) -> None:
        self._buffers.admit(plan)
        for seq in plan.new:
            self._sampler.admit(seq)
            self._prompt_logprobs.pop(seq.slot, None)
            if seq.params.prompt_logprobs is not None:
                self._prompt_logprobs[seq.slot] = (seq.prompt_len, seq.params.prompt_logprobs)

    def _sample(self, plan: StepPlan, sampling: list[int], hidden: torch.Tensor) -> StepResult:
        tokens: list[Sequence[int]] = [()] * len(plan.slots)
        if not sampling:
            return StepResult(step=plan.step, tokens=tokens)
        slots = [plan.slots[i] for i in sampling]
        positions = [plan.starts[i] + plan.counts[i] for i in sampling]
        sampled = self._sampler.sample(self._model.logits(hidden), slots, positions)
        self._buffers.feed_back(slots, positions, sampled.token_ids)
        for i, token in zip(sampling, sampled.token_ids.tolist(), strict=True):
            tokens[i] = (token,)
        return StepResult(
            step=plan.step,
            tokens=tokens,
            logprobs={sampling[row]: entry for row, entry in sampled.host_logprobs().items()},
            errors={sampling[row]: why for row, why in sampled.errors.items()},
        )

    def _prompt_rows(self, plan: StepPlan, ends: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """(plan index, first row, last row) of the tokens that predict a prompt token somebody wants scored."""
        for i, slot in enumerate(plan.slots):
            wanted = self._prompt_logprobs.get(slot)
            if wanted is None:
                continue
            count = min(plan.counts[i], wanted[0] - 1 - plan.starts[i])
            if count > 0:
                first = int(ends[i]) - plan.counts[i]
                yield i, first, first + count

    def _score_prompts(
        self, plan: StepPlan, prompt_rows: list[tuple[int, int, int]], hidden: torch.Tensor
    ) -> dict[int, Sequence[TokenLogprobs]]:
        scored: dict[int, Sequence[TokenLogprobs]] = {}
        done = 0
        for i, first, last in prompt_rows:
            slot, start, k = plan.slots[i], plan.starts[i], self._prompt_logprobs[plan.slots[i]][1]
            targets = self._buffers.tokens[slot, start + 1 : start + 1 + last - first]
            entries: list[TokenLogprobs] = []
            for low in range(0, last - first, PROMPT_LOGITS_ROWS):
                high = min(low + PROMPT_LOGITS_ROWS, last - first)
                logits = self._model.logits(hidden[done + low : done + high])
                entries += self._sampler.prompt_logprobs(logits, targets[low:high], k)
            scored[i] = entries
            done += last - first
        return scored
