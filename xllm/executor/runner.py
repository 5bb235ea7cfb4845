"""One step on the device: plan -> Forward -> hidden states -> logits -> sampled tokens -> StepResult."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from xllm.core.errors import DeviceLost
from xllm.core.plan import StepPlan, StepResult
from xllm.core.stats import ExecutorStats
from xllm.device.table import Device, Mark
from xllm.executor.buffers import InputBuffers
from xllm.executor.chunk_graphs import ChunkGraphs
from xllm.executor.contiguous import ContiguousMemory
from xllm.executor.decode_graphs import DecodeGraphs, longest_first
from xllm.executor.graphs import GraphTable
from xllm.executor.kv_memory import ElasticMemory
from xllm.executor.mover import Mover
from xllm.executor.prompt_scores import Pending, PromptScores
from xllm.executor.sampling import Fetched, Sampled, Sampler
from xllm.executor.sleep import Sleeper
from xllm.models.forward import Forward, Model

log = logging.getLogger(__name__)

BEGINS = 16  # of so many steps that follow each other one is marked at its begin: a mark costs a card 6 microseconds

Finish = Callable[[], StepResult]


class Runner:
    """Runs plans strictly in the order they were made. Belongs to one thread.

    `launch` submits a step and returns what waits for its result; on a synchronous device the step has run by then.
    """

    def __init__(
        self, model: Model, kv_cache: torch.Tensor, buffers: InputBuffers, sampler: Sampler, device: Device,
        *, graph_sizes: Sequence[int] = (),
    ):  # fmt: skip
        self._model = model
        self.kv_cache = kv_cache
        self._buffers = buffers
        self._sampler = sampler
        self._device = device
        self._table = GraphTable(device)
        self._decodes = DecodeGraphs(
            self._table, self._decode, sizes=graph_sizes, spare_slot=buffers.spare_slot
        )
        self._chunks = ChunkGraphs(self._table, self._sample, buffers, kv_cache, enabled=bool(graph_sizes))
        self._prompts = PromptScores(sampler, model.logits, buffers.tokens)
        self._sleeper: Sleeper | None = None
        self._last: Mark | None = None  # the end of the last step submitted
        self._in_flight = 0
        self._steps = 0
        self._device_s = self._bubble_s = self._gap = (
            0.0  # the gap: before the last step whose begin was marked
        )
        self.memory: ElasticMemory | None = None  # under the KV cache, where it comes and goes
        self.places: ContiguousMemory | None = None  # the same, where sequences have addresses of their own
        self.mover: Mover | None = None  # made around the KV cache where there are tiers below it
        self.progress = 0  # layers submitted and steps finished since start: what health looks at
        model.on_layer = self._advance

    def _advance(self) -> None:
        self.progress += 1

    def run(self, plan: StepPlan) -> StepResult:
        return self.launch(plan)()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Finish:
        with self._watched():
            if self.memory is not None:
                self.memory.range.join()
            if self.places is not None:
                self.places.wait_until(plan.mapped, decoding=not plan.new)
            follows = self._last if self._in_flight else None  # else the device may have waited for a request
            marked = follows is None or self._steps % BEGINS == 0
            begin = self._device.mark() if marked else None
            self._admit(plan)
            finish = self._replay_decode(plan) or self._replay_chunks(plan) or self._eager(plan)
            end = self._device.mark()
        self._steps += 1
        self._last = end
        self._in_flight += 1

        def result() -> StepResult:
            with self._watched():
                end.wait()
                self.progress += 1
                self._in_flight -= 1
                return finish(self._took(follows, begin, end))

        return result

    def _took(self, follows: Mark | None, begin: Mark | None, end: Mark) -> float:
        """Seconds of a step. Without a mark at its begin the gap before it is taken to be as the last that is known."""
        if begin is not None and follows is not None:
            self._gap = begin.since(follows)
        if follows is not None:
            self._bubble_s += self._gap
        if begin is not None:
            seconds = end.since(begin)
        else:
            assert follows is not None, "a step that follows none is marked"
            seconds = max(0.0, end.since(follows) - self._gap)
        self._device_s += seconds
        return seconds

    @property
    def stats(self) -> ExecutorStats:
        table = self._table
        places = None if self.places is None else self.places.stats
        return ExecutorStats(
            self._steps, table.replays, table.failures, self._device_s, self._bubble_s, places
        )

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Tells an error of the device, after which nothing can run, from that of a step."""
        try:
            yield
        except Exception as e:
            if self._device.is_lost(e):
                raise DeviceLost(f"the device failed: {str(e).partition(chr(10))[0]}") from e
            raise

    @torch.inference_mode()
    def improve(self) -> bool:
        """Something that makes later steps faster, while there is nothing else to do; False when nothing is left."""
        return self._decodes.capture_one() or self._chunks.capture_one()

    @torch.inference_mode()
    def capture_largest(self) -> None:
        """The graph that needs most memory, and no other."""
        self._decodes.capture_largest()

    def improve_for(self, seconds: float) -> None:
        """The same until the time is over or nothing is left."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.improve():
            pass

    @torch.inference_mode()
    def sleep(self) -> None:
        """Weights to the host, the KV cache nowhere, and the memory of both back to the system."""
        self._table.forget()
        plain = self.memory is None and self.places is None  # what comes and goes has gone by itself
        self._sleeper = Sleeper(self._model.tensors(), [self.kv_cache] if plain else [])
        given = self._sleeper.sleep()
        if self.places is not None:
            given += self.places.vacate()
        self._device.release()
        log.info("asleep: %.2f GiB given back", given / 2**30)

    @torch.inference_mode()
    def wake_up(self) -> None:
        assert self._sleeper is not None, "only who sleeps can wake up"
        if self.places is not None:
            self.places.restore()
        try:
            self._sleeper.wake()
        except Exception:
            if self.places is not None:
                self.places.vacate()
            raise

    def close(self) -> None:
        """Let go of the model, so that what was built around it can be freed."""
        self._table.forget()
        self._model.on_layer = None

    def _admit(self, plan: StepPlan) -> None:
        self._buffers.admit(plan)
        for seq in plan.new:
            self._sampler.admit(seq)
            self._prompts.admit(seq)
        self._sampler.upload()

    # a decode step as one graph

    def _replay_decode(self, plan: StepPlan) -> "Callable[[float], StepResult] | None":
        """None where the step is not a pure decode, or there is no graph for it."""
        if not self._decodes.largest or max(plan.counts) > 1 or not all(plan.samples):
            return None
        plain = self._sampler.is_plain(plan.slots, [start + 1 for start in plan.starts])
        order = longest_first(plan.starts)
        slots = np.asarray(plan.slots)[order]
        starts = np.asarray(plan.starts)[order]
        outputs = self._decodes.run(slots, starts, plain)
        if outputs is None:
            return None
        if plain:
            token_ids, usable = (output[: len(order)] for output in outputs)
            sampled = Sampled(token_ids, usable, [])
        else:
            sampled = self._sample_logits(outputs[0][: len(order)], slots.tolist(), (starts + 1).tolist())
        return self._finish(plan, order.tolist(), sampled.fetch(self._device))

    def _decode(
        self, slots_B: torch.Tensor, positions_B: torch.Tensor, sample: bool
    ) -> tuple[torch.Tensor, ...]:
        """What a graph captures: logits, or tokens (fed back already) and whether they are usable, with the positions
        counted up."""
        fwd = self._buffers.decode_forward(slots_B, positions_B, self.kv_cache)
        if not sample:
            return (self._model.logits(self._model.forward(fwd)),)
        return self._sample(fwd, slots_B, positions_B, advance=True)

    def _sample(
        self, fwd: Forward, slots_R: torch.Tensor, positions_R: torch.Tensor, *, advance: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """One token for each of the rows wanted, fed back already, and whether it is usable; on the device alone."""
        logits = self._model.logits(self._model.forward(fwd))
        return self._sampler.sample_plain(logits, slots_R, positions_R, self._buffers.tokens, advance=advance)

    # a few short prompts as one graph

    def _replay_chunks(self, plan: StepPlan) -> "Callable[[float], StepResult] | None":
        """None where the step is too large, or needs more than tokens."""
        if not self._chunks.fits(plan) or self._prompts.any_in(plan.slots):
            return None
        sampling = [i for i, wanted in enumerate(plan.samples) if wanted]
        slots = [plan.slots[i] for i in sampling]
        positions = [plan.starts[i] + plan.counts[i] for i in sampling]
        if not self._sampler.is_plain(slots, positions):
            return None
        outputs = self._chunks.run(plan)
        if outputs is None:
            return None
        token_ids, usable = (output[: len(sampling)] for output in outputs)
        fetched = Sampled(token_ids, usable, []).fetch(self._device) if sampling else None
        return self._finish(plan, sampling, fetched)

    # any other step

    def _eager(self, plan: StepPlan) -> "Callable[[float], StepResult]":
        ends = np.cumsum(plan.counts)
        sampling = [i for i, wanted in enumerate(plan.samples) if wanted]
        prompt_rows = self._prompts.rows(plan, ends)
        rows = np.concatenate(
            [ends[sampling] - 1, *(np.arange(first, last) for _, first, last in prompt_rows)]
        )
        fwd = self._buffers.forward(plan, self.kv_cache, rows.astype(np.int64))
        hidden = self._model.forward(fwd)
        fetched = None
        if sampling:
            slots = [plan.slots[i] for i in sampling]
            positions = [plan.starts[i] + plan.counts[i] for i in sampling]
            logits = self._model.logits(hidden[: len(sampling)])
            fetched = self._sample_logits(logits, slots, positions).fetch(self._device)
        scored = self._prompts.score(plan, prompt_rows, hidden[len(sampling) :])
        return self._finish(plan, sampling, fetched, scored)

    def _sample_logits(self, logits: torch.Tensor, slots: Sequence[int], positions: Sequence[int]) -> Sampled:
        sampled = self._sampler.sample(logits, slots, positions)
        self._buffers.feed_back(slots, positions, sampled.token_ids)
        return sampled

    def _finish(
        self, plan: StepPlan, sampling: Sequence[int], fetched: Fetched | None,
        scored: Pending | None = None,
    ) -> "Callable[[float], StepResult]":  # fmt: skip
        """Makes the result of what was fetched; to be called when the device has been waited for."""

        def finish(seconds: float) -> StepResult:
            tokens: list[Sequence[int]] = [()] * len(plan.slots)
            prompt_logprobs = scored() if scored is not None else {}
            if fetched is None:
                return StepResult(
                    step=plan.step, tokens=tokens, prompt_logprobs=prompt_logprobs, seconds=seconds
                )
            for i, token in zip(sampling, fetched.tokens(), strict=True):
                tokens[i] = (token,)
            return StepResult(
                step=plan.step,
                tokens=tokens,
                logprobs={sampling[row]: entry for row, entry in fetched.logprobs().items()},
                prompt_logprobs=prompt_logprobs,
                errors={sampling[row]: why for row, why in fetched.errors().items()},
                seconds=seconds,
            )

        return finish
