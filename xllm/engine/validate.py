"""What a request must satisfy against this model and this configuration, checked before it is admitted."""

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from xllm.config.decided import EngineConfig
from xllm.config.memory import blocks_of, gib
from xllm.core.errors import InvalidRequest
from xllm.core.sampling import SamplingParams


class Validator:
    """Bounds that only the model and the configuration know. Raises InvalidRequest naming the field."""

    def __init__(self, *, vocab_size: int, max_model_len: int, max_logprobs: int):
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._max_logprobs = max_logprobs
        self._known_ids = list[Annotated[int, msgspec.Meta(ge=0, lt=vocab_size)]]

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self._check_prompt(prompt_token_ids)
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name)
            if asked is not None and asked > self._max_logprobs:
                raise InvalidRequest(
                    f"{name} may be at most {self._max_logprobs} here (--max-logprobs), not {asked}",
                    param=name,
                )
        self._check_ids("logit_bias", params.logit_bias or ())
        self._check_ids("allowed_token_ids", params.allowed_token_ids or ())
        self._check_ids("stop_token_ids", params.stop_token_ids or ())
        for word in params.bad_words_token_ids or ():
            self._check_ids("bad_words_token_ids", word)
        room = self._max_model_len - len(prompt_token_ids)
        if params.max_tokens is not None and params.max_tokens > room:
            raise InvalidRequest(
                f"This model's maximum context length is {self._max_model_len} tokens. You requested "
                f"{len(prompt_token_ids) + params.max_tokens} tokens ({len(prompt_token_ids)} in the prompt, "
                f"{params.max_tokens} in the completion).",
                param="max_tokens", code="context_length_exceeded",
            )  # fmt: skip

    def _check_prompt(self, ids: Sequence[int]) -> None:
        if not ids:
            raise InvalidRequest("the prompt must hold at least one token", param="prompt")
        if len(ids) >= self._max_model_len:
            raise InvalidRequest(
                f"This model's maximum context length is {self._max_model_len} tokens, prompt and completion together. "
                f"The prompt alone has {len(ids)}.",
                param="prompt", code="context_length_exceeded",
            )  # fmt: skip
        try:
            msgspec.convert(ids, self._known_ids)  # compiled: prompts are long
        except msgspec.ValidationError:
            self._check_ids("prompt", ids)

    def _check_ids(self, name: str, ids: Any) -> None:
        for id in ids:
            if not 0 <= id < self._vocab_size:
                raise InvalidRequest(
                    f"{name}: token id {id} is not in the vocabulary of {self._vocab_size}", param=name
                )


def kv_limit(nbytes: int | None, config: EngineConfig) -> int | None:
    """Blocks of an elastic KV pool in so many bytes, None: no limit. InvalidRequest where the pool has none, or where a
    sequence of the greatest length would wait for good."""
    if config.cache.pool != "elastic":
        raise InvalidRequest("the KV pool has its memory for good; with --kv-pool elastic it can be limited")
    if nbytes is None:
        return None
    each, longest = config.cache.block_bytes, config.scheduler.max_model_len
    needed = blocks_of(longest, config.cache.block_size) * each
    if nbytes < needed:
        raise InvalidRequest(
            f"a limit of {gib(max(0, nbytes))} holds no sequence of {longest} tokens: {gib(needed)} are needed",
            param="gib",
        )
    return nbytes // each
