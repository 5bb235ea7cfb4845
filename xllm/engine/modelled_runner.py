"""A runner without a model: steps take modelled time, and the next token is a pure function of those before it.

Whoever knows a prompt knows the answer to it (`answer`), however often the request moved from one engine to another.
"""

import time
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xllm.core.errors import ConfigError
from xllm.core.plan import NewSequence, StepPlan, StepResult
from xllm.core.stats import ExecutorStats

if TYPE_CHECKING:  # PyTorch comes with these
    from xllm.executor.contiguous import ContiguousMemory
    from xllm.executor.kv_memory import ElasticMemory
    from xllm.executor.mover import Mover

EOS = 0
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: spreads what lies close together
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Speed:
    """A step of n tokens takes `base_s + n * token_s`, and `context_s` for each token of KV that it reads."""

    base_s: float = 0.008
    token_s: float = 60e-6
    context_s: float = 0.0

    def __post_init__(self) -> None:
        if min(self.base_s, self.token_s, self.context_s) < 0:
            raise ConfigError("a step cannot take less than no time")

    def step_s(self, tokens: int, context: int) -> float:
        return self.base_s + tokens * self.token_s + context * self.context_s


@dataclass(frozen=True, slots=True)
class Words:
    """What is sampled: ids `first` to `vocab_size` - 1, and `EOS` about once in `ends_every` tokens (0: never)."""

    vocab_size: int = 32768
    first: int = 16
    ends_every: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.first < self.vocab_size:
            raise ConfigError(f"ids from {self.first} to below {self.vocab_size} are no vocabulary")

    def next(self, state: int, seed: int, may_end: bool = True) -> int:
        """`state`: the checksum of all tokens before (`_fold`)."""
        drawn = ((state ^ seed) * _GOLDEN & _MASK) >> 20
        if may_end and self.ends_every and drawn % self.ends_every == 0:
            return EOS
        return self.first + drawn % (self.vocab_size - self.first)


def answer(
    prompt: Sequence[int],
    count: int,
    words: Words | None = None,
    *,
    seed: int | None = None,
    min_tokens: int = 0,
) -> list[int]:
    """The first `count` tokens that a modelled engine answers with; fewer where it ends before.

    `seed` is that of a request with a temperature above 0; without one there is nothing random.
    """
    words, state, tokens = words or Words(), _fold(prompt), list[int]()
    while len(tokens) < count:
        tokens.append(words.next(state, seed or 0, len(tokens) >= min_tokens))
        if tokens[-1] == EOS:
            break
        state = _fold(tokens[-1:], state)
    return tokens


def _fold(tokens: Sequence[int], state: int = 0) -> int:
    return zlib.crc32(array("I", tokens), state)


@dataclass(slots=True)
class _Row:
    """The tokens of a sequence, as far as anybody needs them."""

    state: int  # checksum of the tokens known
    known: int  # how many
    prompt: int
    seed: int
    min_tokens: int

    @classmethod
    def of(cls, seq: NewSequence) -> "_Row":
        params = seq.params
        seed = seq.seed if params.temperature > 0 else 0
        return cls(_fold(seq.token_ids), len(seq.token_ids), seq.prompt_len, seed, params.min_tokens)


@dataclass
class Lateness:
    """How well the host kept up with the model. `late_s`: from when a result was due until it was there."""

    steps: int = 0
    late_s: float = 0.0  # sum
    worst_s: float = 0.0
    bubble_s: float = 0.0  # the modelled device waited for the next step, which was submitted too late
    busy_s: float = 0.0  # modelled time of all steps
    buckets: list[int] = field(
        default_factory=lambda: [0] * 20
    )  # bucket i: up to 2**i * 20 microseconds late

    def seen(self, late_s: float) -> None:
        self.steps += 1
        self.late_s += late_s
        self.worst_s = max(self.worst_s, late_s)
        self.buckets[min((int(late_s * 1e6) // 20).bit_length(), 19)] += 1


class ModelledRunner:
    """`RunsPlans` for an `Executor` that is asynchronous: the next step may be submitted while one runs, and begins when
    that ends, so that the host's own work is hidden behind modelled time as behind a device's.

    `pause` is called before each step ends; it may wait, or raise.
    """

    mover: "Mover | None" = None
    memory: "ElasticMemory | None" = None
    places: "ContiguousMemory | None" = None

    def __init__(self, speed: Speed, words: Words, pause: Callable[[], None] = lambda: None):
        self.progress = 0
        self.lateness = Lateness()
        self._speed, self._words, self._pause = speed, words, pause
        self._rows: dict[int, _Row] = {}
        self._due = 0.0  # when the last step submitted ends
        self._open = 0  # steps submitted whose results were not asked for

    @property
    def stats(self) -> ExecutorStats:
        late = self.lateness
        return ExecutorStats(steps=late.steps, device_s=late.busy_s, bubble_s=late.bubble_s)

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        now = time.perf_counter()
        if self._open and now > self._due:
            self.lateness.bubble_s += now - self._due
        seconds = self._speed.step_s(plan.num_tokens, sum(plan.starts))
        self._due = due = max(now, self._due) + seconds
        self._open += 1
        return lambda: self._finish(plan, due, seconds)

    def run(self, plan: StepPlan) -> StepResult:
        return self.launch(plan)()

    def improve(self) -> bool:
        return False

    def sleep(self) -> None:
        """There is no memory to give back."""

    def wake_up(self) -> None:
        """As `sleep`."""

    def _finish(self, plan: StepPlan, due: float, seconds: float) -> StepResult:
        self._open -= 1
        if (wait := due - time.perf_counter()) > 0:
            time.sleep(wait)
        self._pause()
        tokens = list(self._sample(plan))
        self.lateness.busy_s += seconds
        self.lateness.seen(max(0.0, time.perf_counter() - due))
        self.progress += 1
        return StepResult(step=plan.step, tokens=tokens, seconds=seconds)

    def _sample(self, plan: StepPlan) -> Iterator[list[int]]:
        for seq in plan.new:
            self._rows[seq.slot] = _Row.of(seq)
        for slot, start, count, wanted in zip(
            plan.slots, plan.starts, plan.counts, plan.samples, strict=True
        ):
            if not wanted:
                yield []
                continue
            row, position = self._rows[slot], start + count
            assert position == row.known, "a token is sampled once, after all before it"
            token = self._words.next(row.state, row.seed, position - row.prompt >= row.min_tokens)
            row.state, row.known = _fold((token,), row.state), position + 1
            yield [token]
