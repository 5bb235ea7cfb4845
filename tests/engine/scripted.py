"""An engine core over a runner that needs no model: the next token is a function of the last token and its position."""

import threading
from collections.abc import Callable

from xllm.config.decided import SchedulerConfig
from xllm.core.output import Finish, SequenceOutput
from xllm.core.plan import StepPlan, StepResult
from xllm.core.sampling import SamplingParams
from xllm.core.stats import ExecutorStats
from xllm.engine.admission import Admission
from xllm.engine.core import EngineCore
from xllm.engine.kv_events import EventStream
from xllm.executor.contiguous import ContiguousMemory
from xllm.executor.executor import Executor
from xllm.executor.kv_memory import ElasticMemory
from xllm.executor.mover import Mover
from xllm.kv.pool import BlockPool
from xllm.scheduler.scheduler import Scheduler
from xllm.wire.channel import MemoryChannel
from xllm.wire.messages import Message, Outputs, Submit

VOCAB = 997
EOS = 0


def next_token(token: int, position: int) -> int:
    return (token * 31 + position * 17 + 1) % VOCAB


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(next_token(tokens[-1], len(tokens)))
    return tokens[len(prompt) :]


class ScriptedRunner:
    """Keeps tokens by slot as the real buffers do. `before` runs ahead of each step and may raise or wait."""

    def __init__(self, before: Callable[[StepPlan], None] = lambda plan: None):
        self.progress = 0
        self.mover: Mover | None = None
        self.memory: ElasticMemory | None = None
        self.places: ContiguousMemory | None = None
        self.before = before
        self._rows: dict[int, dict[int, int]] = {}
        self.threads: set[int] = set()

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        result = self.run(plan)
        return lambda: result

    def improve(self) -> bool:
        return False

    def sleep(self) -> None:
        pass

    def wake_up(self) -> None:
        pass

    @property
    def stats(self) -> ExecutorStats:
        return ExecutorStats(steps=self.progress)

    def run(self, plan: StepPlan) -> StepResult:
        self.threads.add(threading.get_ident())
        self.before(plan)
        for seq in plan.new:
            self._rows[seq.slot] = dict(enumerate(seq.token_ids))
        tokens = []
        for slot, start, count, wanted in zip(
            plan.slots, plan.starts, plan.counts, plan.samples, strict=True
        ):
            position = start + count
            if wanted:
                self._rows[slot][position] = next_token(self._rows[slot][position - 1], position)
            tokens.append([self._rows[slot][position]] if wanted else [])
        self.progress += 1
        return StepResult(step=plan.step, tokens=tokens)


def make_core(
    runner: ScriptedRunner | None = None,
    *,
    depth: int = 2,
    blocks: int = 64,
    events: EventStream | None = None,
    **changes,
) -> tuple[EngineCore, MemoryChannel]:
    settings = {
        "max_model_len": 128, "max_num_seqs": 8, "max_num_batched_tokens": 32, "chunked_prefill": True, "long_prefill_token_threshold": 0,
        "batching": "chunked", "order": "fcfs", "admission": "optimistic", "depth": depth,
    }  # fmt: skip
    config = SchedulerConfig(**{**settings, **changes})
    scheduler = Scheduler(config, BlockPool(blocks, 8, events=None if events is None else events.log))
    front, inbox = MemoryChannel.pair()
    executor = Executor(lambda: runner or ScriptedRunner(), depth=depth)
    admission = Admission(
        scheduler, eos_ids=frozenset({EOS}), max_model_len=config.max_model_len, seed=0, vocab_size=VOCAB
    )
    return EngineCore(scheduler, executor, inbox, admission, depth=depth, events=events), front


def submit(id: str, prompt: list[int], max_tokens: int = 16, **params) -> Submit:
    params.setdefault("ignore_eos", True)
    return Submit(
        request_id=id,
        prompt_token_ids=prompt,
        params=SamplingParams(max_tokens=max_tokens, temperature=0.0, **params),
    )


def drain(front: MemoryChannel) -> tuple[list[SequenceOutput], list[Message]]:
    outputs: list[SequenceOutput] = []
    others: list[Message] = []
    while (message := front.receive(0.0)) is not None:
        if isinstance(message, Outputs):
            outputs += message.outputs
        else:
            others.append(message)
    return outputs, others


def run_until_idle(core: EngineCore, front: MemoryChannel) -> list[SequenceOutput]:
    core.turn(wait_s=0.0)
    for _ in range(10_000):
        if not core.busy:
            return drain(front)[0]
        core.turn(wait_s=0.0)
    raise AssertionError("the engine never became idle")


def ends_of(outputs):
    ends: dict[str, list[Finish]] = {}
    for out in outputs:
        if out.finish is not None:
            ends.setdefault(out.request_id, []).append(out.finish)
    return ends
