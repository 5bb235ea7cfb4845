"""The engine for scripts: a list of prompts in, a list of results in the same order out."""

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from xllm.config.options import EngineOptions
from xllm.core.errors import EngineFault, InvalidRequest, Unavailable
from xllm.core.output import RequestOutput, SequenceOutput
from xllm.core.sampling import SamplingParams
from xllm.core.stats import SchedulerStats
from xllm.engine.beam import BeamSearchOutput, BeamSearchParams, beam_search
from xllm.engine.build import decide
from xllm.engine.checkpoint import open_tokenizer, sampling_defaults
from xllm.engine.client import EngineClient, InlineClient, ProcessClient
from xllm.engine.outputs import OutputProcessor
from xllm.engine.prompts import Prompt, PromptReader, as_list
from xllm.engine.validate import Validator, kv_limit
from xllm.text.chat import ChatTemplate
from xllm.text.tokenizer import Tokenizer
from xllm.wire.messages import (
    Abort,
    Fault,
    LimitKv,
    Message,
    Outputs,
    Reply,
    ResetPrefixCache,
    Sleep,
    Submit,
    SubmitMany,
    WakeUp,
)

RECEIVE_S = 1.0
SUBMIT_AT_ONCE = 1024  # requests a message: the engine steps only between messages


class LLM:
    """`LLM(model, **options)`; the options are the fields of `EngineOptions`.

    By default the engine runs in this process; `separate_process=True` gives it one of its own. Use it as a context
    manager, or call `shutdown`, to end its threads and processes early; they end with the program anyway.
    """

    def __init__(self, model: str = "demo", *, separate_process: bool = False, **options: Any):
        self.options = EngineOptions(model=model, **options)
        decided = decide(self.options)
        skipped = self.options.skip_tokenizer_init
        self.tokenizer: Tokenizer | None = None if skipped else open_tokenizer(self.options, decided)
        self._client: EngineClient = (ProcessClient if separate_process else InlineClient)(decided)
        self.config = self._client.config
        self._defaults = sampling_defaults(self.options, self.config)
        self._outputs = OutputProcessor(self.tokenizer)
        self._prompts = PromptReader(self.tokenizer, self.config.scheduler.max_model_len - 1)
        self._validator = Validator(
            vocab_size=self.config.model.vocab_size,
            max_model_len=self.config.scheduler.max_model_len,
            max_logprobs=self.options.max_logprobs,
        )
        self._ids = itertools.count()
        self._calls = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """One result per prompt, in input order. One `SamplingParams` for all, or one each.

        Raises InvalidRequest before anything runs if one of the prompts or parameters is wrong; a request that fails
        later comes back with finish_reason "error" while the others go on.
        """
        batch = as_list(prompts)
        params = self._params_for(batch, sampling_params)
        read = [self._prompts.read(prompt) for prompt in batch]
        for (_, ids), p in zip(read, params, strict=True):
            self._validator.check(ids, p)
        if priority is not None and len(priority) != len(batch):
            raise InvalidRequest(f"{len(priority)} priorities for {len(batch)} prompts", param="priority")
        return self._run(read, params, priority or [0] * len(batch), use_tqdm)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Like `generate`, for one conversation or a list of them, through the model's chat template.

        Without parameters an answer may be as long as the context allows, as over HTTP.
        """
        if sampling_params is None:
            sampling_params = SamplingParams(**{"max_tokens": None, **self._defaults})
        conversations = cast(
            Sequence[Sequence[Mapping[str, Any]]],
            [messages] if messages and isinstance(messages[0], Mapping) else messages,
        )
        tokenizer = self._need_tokenizer("chat")
        template = ChatTemplate.of(tokenizer)
        prompts: list[Prompt] = []
        for conversation in conversations:
            text = template.render(
                conversation, add_generation_prompt=add_generation_prompt, kwargs=chat_template_kwargs
            )
            ids = tokenizer.encode(text, add_special_tokens=False)  # the template wrote the special tokens
            prompts.append({"prompt_token_ids": ids, "prompt": text})
        return self.generate(prompts, sampling_params, use_tqdm)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """The `beam_width` most likely continuations of each prompt; see `xllm.engine.beam`."""
        batch = as_list(prompts)
        starts = [self._prompts.read(prompt)[1] for prompt in batch]
        for ids in starts:
            self._validator.check(ids, SamplingParams(max_tokens=params.max_tokens))
        return beam_search(
            self._step_beams,
            self._need_tokenizer("beam search"),
            starts,
            params,
            eos_ids=frozenset(self.config.model.eos_ids),
        )

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes. What runs keeps its KV and finishes, but shares it with nobody new."""
        return bool(self._ask(lambda id: ResetPrefixCache(call_id=id)))

    def sleep(self) -> None:
        """Give a card's memory back: weights go to the host, cached prefixes are forgotten. `wake_up` before going on."""
        if self.config.executor.device == "cpu":
            raise InvalidRequest("a CPU has no other memory that its weights could rest in")
        self._ask(lambda id: Sleep(call_id=id))

    def wake_up(self) -> None:
        """Raises Unavailable where the memory is not there; the engine sleeps on then."""
        self._ask(lambda id: WakeUp(call_id=id))

    def limit_kv_memory(self, nbytes: int | None) -> int:
        """How much memory an elastic KV cache may have from now on, None: no limit. -> bytes it has at this moment. Raises
        InvalidRequest for any other pool, and where the longest sequence would not fit."""
        blocks = kv_limit(nbytes, self.config)
        return int(self._ask(lambda id: LimitKv(call_id=id, blocks=blocks))) * self.config.cache.block_bytes

    def stats(self) -> SchedulerStats:
        """As of the engine's last step, or its last sign of life where it has a process of its own."""
        stats = self._client.pulse()[0].stats
        if stats is None:
            raise EngineFault("the engine has not told anything of itself yet")
        return stats

    def shutdown(self) -> None:
        self._client.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _ask(self, message: Callable[[int], Message]) -> Any:
        call_id = next(self._calls)
        self._client.send(message(call_id))
        while True:
            reply = self._receive()
            if isinstance(reply, Reply) and reply.call_id == call_id:
                if reply.refused is not None:
                    raise Unavailable(reply.refused)
                return reply.value

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequest(f"{what} needs a tokenizer, and this engine was started without")
        return self.tokenizer

    def _params_for(
        self, batch: Sequence[Prompt], given: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if given is None:
            given = SamplingParams(**self._defaults)
        if isinstance(given, SamplingParams):
            return [given] * len(batch)
        if len(given) != len(batch):
            raise InvalidRequest(f"{len(given)} sampling parameters for {len(batch)} prompts")
        return list(given)

    def _step_beams(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[RequestOutput]:
        # beams need more candidates than --max-logprobs lets users ask for, so the validator is not asked
        return self._run(
            [(None, ids) for ids in prompts], [params] * len(prompts), [0] * len(prompts), use_tqdm=False
        )

    def _run(
        self,
        prompts: Sequence[tuple[str | None, list[int]]],
        params: Sequence[SamplingParams],
        priority: Sequence[int],
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        ids = [f"req-{next(self._ids)}" for _ in prompts]
        try:
            requests = [
                Submit(request_id=child_id, prompt_token_ids=tokens, params=child, priority=rank)
                for id, (text, tokens), p, rank in zip(ids, prompts, params, priority, strict=True)
                for child_id, child in self._outputs.add(id, text, tokens, p, time.monotonic(), stream=False)
            ]
            for i in range(0, len(requests), SUBMIT_AT_ONCE):
                self._client.send(SubmitMany(requests=requests[i : i + SUBMIT_AT_ONCE]))
            with _collecting_news_only():
                ended = self._collect(len(ids), use_tqdm)
        except BaseException:  # Ctrl-C too: leave no request running behind
            for id in ids:
                self._client.send(Abort(request_ids=self._outputs.abort(id)))
            raise
        return [ended[id] for id in ids]

    def _collect(self, requests: int, use_tqdm: bool) -> dict[str, RequestOutput]:
        """So many requests, by id, when they have ended."""
        ended: dict[str, RequestOutput] = {}
        with _progress(requests, use_tqdm) as bar:
            while len(ended) < requests:
                message = self._receive()
                if not isinstance(message, Outputs):
                    continue
                outputs, stopped = self._outputs.process(message.outputs)
                if stopped:
                    self._client.send(Abort(request_ids=stopped))
                ended |= {output.request_id: output for output in outputs}
                bar.count(message.outputs, finished=len(outputs))
        return ended

    def _receive(self) -> Message | None:
        message = self._client.receive(RECEIVE_S)
        if isinstance(message, Fault):
            raise EngineFault(message.reason)
        if message is None and (reason := self._client.dead()):
            raise EngineFault(reason)
        return message


@contextmanager
def _collecting_news_only() -> Iterator[None]:
    """In here the garbage collector leaves alone what was there before: walking all modules and weights of a process takes
    longer than many a step on a card."""
    if gc.get_freeze_count():  # the program does so itself, and for longer
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _progress:
    """A bar of finished requests with generated tokens a second beside it."""

    def __init__(self, total: int, shown: bool):
        self._total, self._shown = total, shown
        self._tokens = 0

    def __enter__(self) -> "_progress":
        from tqdm import tqdm

        self._bar = tqdm(
            total=self._total,
            desc="Processed prompts",
            unit="req",
            disable=not self._shown,
            dynamic_ncols=True,
        )
        self._begin = time.monotonic()
        return self

    def count(self, news: Sequence[SequenceOutput], *, finished: int) -> None:
        if not self._shown:
            return
        self._tokens += sum(len(output.token_ids) for output in news)
        if finished:
            self._bar.set_postfix_str(
                f"{self._tokens / (time.monotonic() - self._begin):.1f} tok/s", refresh=False
            )
            self._bar.update(finished)

    def __exit__(self, *_: object) -> None:
        self._bar.close()
