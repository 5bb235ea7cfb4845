"""A real `AsyncLLM` over an engine core that only pretends: no model, no torch, behaviour on demand."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from xllm.config.decided import (
    CacheConfig,
    EngineConfig,
    ExecutorConfig,
    MemoryConfig,
    ModelConfig,
    SchedulerConfig,
)
from xllm.config.options import EngineOptions
from xllm.core.output import Finish, SequenceOutput
from xllm.core.plan import TokenLogprobs
from xllm.core.stats import SchedulerStats
from xllm.engine.async_llm import AsyncLLM
from xllm.text.tokenizer import Tokenizer
from xllm.wire.messages import (
    Abort,
    Heartbeat,
    Message,
    Outputs,
    Reply,
    ResetPrefixCache,
    Sleep,
    StartTrace,
    StopTrace,
    Submit,
    WakeUp,
)

MAX_LEN = 512
REPLY = "Grüße aus 東京 🗼! That is all."
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
EOS = 2
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(*, template: str | None = TEMPLATE) -> Tokenizer:
    """Three special tokens and one token per byte: every other character of the reply is split across tokens."""
    vocab = {name: i for i, name in enumerate(SPECIALS)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens(SPECIALS)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, {"eos_token": "<|im_end|>"}, {} if template is None else {"default": template})


def engine_config(
    directory: Path, *, order: str = "fcfs", slots: int = 8, device: str = "cpu"
) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(
            directory=str(directory), architecture="Qwen3ForCausalLM", vocab_size=259, hidden_size=8, num_layers=1,
            num_heads=1, num_kv_heads=1, head_dim=8, max_position=MAX_LEN, eos_ids=(EOS,), load_format="dummy", hf={},
        ),
        scheduler=SchedulerConfig(
            max_model_len=MAX_LEN, max_num_seqs=slots, max_num_batched_tokens=512, chunked_prefill=True,
            long_prefill_token_threshold=0, batching="chunked", order=order, admission="optimistic", depth=1,
        ),
        cache=CacheConfig(block_size=16, num_blocks=64, prefix_caching=True, block_bytes=1024, kv_dtype="float32"),
        memory=MemoryConfig(kv_bytes=None, utilization=0.9, length_asked=False),
        executor=ExecutorConfig(device=device, dtype="float32", threads=1, seed=0),
        reasons=("a fake decides nothing",),
    )  # fmt: skip


@dataclass
class _Sequence:
    submit: Submit
    reply: list[int]
    length: int = 0


Script = Callable[[Submit], list[int]]


@dataclass
class FakeClient:
    """An `EngineClient`. One token per step for up to `slots` sequences; everything a test may turn is public."""

    tokenizer: Tokenizer
    config: EngineConfig
    slots: int = 8
    step_s: float = 0.0005
    reply: str = REPLY
    startup_s: dict[str, float] = field(default_factory=dict)
    held: bool = False  # no steps while set
    frozen: bool = False  # neither steps nor signs of life
    fault: str | None = None  # the process died of this
    fail_prompts_with: str | None = None  # error of every new sequence
    fail_after: int | None = None  # tokens after which a sequence fails
    cached: int = 0
    preemptions: int = 0
    submitted: list[Submit] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    closed: bool = False
    tracing: bool = False

    def __post_init__(self) -> None:
        self._news = threading.Condition()
        self._sequences: dict[str, _Sequence] = {}
        self._replies: list[Message] = []
        self._generated = 0
        self._prompted = 0
        self._last_beat = time.monotonic()

    # ---- what AsyncLLM calls

    def send(self, message: Message) -> None:
        with self._news:
            if isinstance(message, Submit):
                self.submitted.append(message)
                self._prompted += len(message.prompt_token_ids)
                self._sequences[message.request_id] = _Sequence(message, self._script(message))
            elif isinstance(message, Abort):
                self.aborted += message.request_ids
                for id in message.request_ids:
                    self._sequences.pop(id, None)
            elif isinstance(message, ResetPrefixCache):
                self._replies.append(Reply(call_id=message.call_id, value=True))
            elif isinstance(message, StartTrace):
                self._replies.append(
                    Reply(
                        call_id=message.call_id,
                        refused="a trace is being taken already" if self.tracing else None,
                    )
                )
                self.tracing = True
            elif isinstance(message, StopTrace):
                self.tracing = False
                self._replies.append(
                    Reply(call_id=message.call_id, value=f"{message.directory}/trace.json.gz")
                )
            elif isinstance(message, Sleep | WakeUp):
                busy = "something runs" if self._sequences else None
                self._replies.append(Reply(call_id=message.call_id, refused=busy))
            self._news.notify()

    def receive(self, timeout_s: float) -> Message | None:
        with self._news:
            if not self._replies and (not self._sequences or self.held or self.frozen):
                self._news.wait(timeout_s)
            if self._replies:
                return self._replies.pop(0)
            if not self._sequences or self.held or self.frozen or self.fault:
                return None
        time.sleep(self.step_s)
        with self._news:
            return Outputs(outputs=self._step(), stats=self._stats())

    def pulse(self) -> tuple[Heartbeat, float]:
        if not self.frozen:
            self._last_beat = time.monotonic()
        beat = Heartbeat(
            progress=self._generated, busy=bool(self._sequences) and not self.held, stats=self._stats()
        )
        return beat, time.monotonic() - self._last_beat

    def dead(self) -> str | None:
        return self.fault

    def missing(self) -> str | None:
        return None

    def dump_stacks(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    # ---- what tests call

    @property
    def active(self) -> int:
        with self._news:
            return len(self._sequences)

    def release(self) -> None:
        with self._news:
            self.held = self.frozen = False
            self._news.notify()

    # ---- the pretended core

    def _script(self, submit: Submit) -> list[int]:
        """The fixed reply when greedy, else letters drawn with the request's seed."""
        if submit.params.greedy or submit.params.seed is None:
            return self.tokenizer.encode(self.reply, add_special_tokens=False)
        drawn = random.Random(submit.params.seed)
        text = "".join(drawn.choice("abcdefghijklmnop ") for _ in range(len(self.reply)))
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _step(self) -> list[SequenceOutput]:
        return [self._advance(id, s) for id, s in list(self._sequences.items())[: self.slots]]

    def _advance(self, id: str, s: _Sequence) -> SequenceOutput:
        params, first = s.submit.params, s.length == 0
        if self.fail_prompts_with is not None or s.length == self.fail_after:
            del self._sequences[id]
            reason = self.fail_prompts_with or "a step failed"
            return SequenceOutput(request_id=id, finish=Finish.ERROR, error=reason)
        ended = s.length >= len(s.reply) and not params.ignore_eos
        token = EOS if ended else s.reply[s.length % len(s.reply)]
        s.length += 1
        self._generated += 1
        room = MAX_LEN - len(s.submit.prompt_token_ids)
        full = s.length >= min(room, params.max_tokens or room)
        stopped = token in (params.stop_token_ids or ())
        finish = Finish.STOP if ended or stopped else Finish.LENGTH if full else None
        if finish:
            del self._sequences[id]
        return SequenceOutput(
            request_id=id,
            token_ids=[token],
            logprobs=[] if params.logprobs is None else [_logprobs(token, params.logprobs)],
            prompt_logprobs=self._prompt_logprobs(s.submit) if first else [],
            num_cached_tokens=self.cached,
            finish=finish,
            stop_reason=token if stopped and not ended else None,
            queued_s=0.001 if first else None,
            prefill_s=0.002 if first else None,
        )

    def _prompt_logprobs(self, submit: Submit) -> list[TokenLogprobs]:
        k = submit.params.prompt_logprobs
        return [] if k is None else [_logprobs(id, k) for id in submit.prompt_token_ids[1:]]

    def _stats(self) -> SchedulerStats:
        running = min(self.slots, len(self._sequences))
        return SchedulerStats(
            running=running, waiting=len(self._sequences) - running, steps_in_flight=0, kv_usage=running / self.slots,
            prefix_queried_tokens=self._prompted, prefix_hit_tokens=0, preemptions=self.preemptions, evictions=0,
            prompt_tokens=self._prompted, generation_tokens=self._generated, step_tokens=running,
        )  # fmt: skip


def _logprobs(token: int, k: int) -> TokenLogprobs:
    """The token itself, then the k likeliest: itself again and its successors; one of them is impossible."""
    others = [token, *((token + i) % 259 for i in range(1, k))] if k else []
    values = [-0.25, *(-1.0 - i for i in range(len(others) - 1))] if k else []
    if len(values) > 2:
        values[-1] = float("-inf")
    return TokenLogprobs(token_ids=[token, *others], logprobs=[-0.25, *values], rank=1)


def make_engine(
    directory: Path,
    *,
    order: str = "fcfs",
    slots: int = 8,
    queue: int = 1024,
    template: str | None = TEMPLATE,
    sleeps: bool = False,
    device: str = "cpu",
) -> AsyncLLM:
    """To be called inside a running event loop. Its `FakeClient` is `client_of(engine)`."""
    tokenizer = byte_tokenizer(template=template)
    options = EngineOptions(
        model="fake", max_num_queued_reqs=queue, scheduling_policy=order, enable_sleep_mode=sleeps
    )
    config = engine_config(directory, order=order, slots=slots, device=device)
    return AsyncLLM(options, config, FakeClient(tokenizer, config, slots), tokenizer)


def client_of(engine: AsyncLLM) -> FakeClient:
    client = engine._client
    assert isinstance(client, FakeClient)
    return client
