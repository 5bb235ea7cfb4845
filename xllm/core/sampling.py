"""How the next token of a request is chosen and when the request ends: the public `SamplingParams`."""

import math
from collections.abc import Sequence

import msgspec

from xllm.core.errors import InvalidRequest

MAX_LOGPROBS = 1000
MAX_N = 128
MAX_STOP = 64
MAX_BAD_WORDS = 256
MAX_BIASES = 1024
MAX_PENALTY = 2.0


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Names and defaults are those of the OpenAI API and of vLLM.

    Raises `InvalidRequest` naming the field when a value makes no sense. `top_k` 0 or -1 means all tokens.
    `max_tokens=None` means what is left of the context. `bad_words` and `stop` are text: the front end turns
    bad words into `bad_words_token_ids` and watches for stop strings itself, so the engine sees only ids.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    bad_words_token_ids: list[list[int]] | None = None
    seed: int | None = None
    stop: Sequence[str] | str | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", [self.stop])
        if self.top_k == -1:
            msgspec.structs.force_setattr(self, "top_k", 0)
        self._check_numbers()
        self._check_lists()

    def _check_numbers(self) -> None:
        _between("n", self.n, 1, MAX_N)
        _between("temperature", self.temperature, 0.0, 100.0)
        _between("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _between("top_k", self.top_k, 0, 2**31 - 1)
        _between("min_p", self.min_p, 0.0, 1.0)
        _between("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
        _between("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
        _between("repetition_penalty", self.repetition_penalty, 0.0, 10.0, low_open=True)
        _between("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None:
            _between("max_tokens", self.max_tokens, 1, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise InvalidRequest("min_tokens must not exceed max_tokens", param="min_tokens")
        if self.seed is not None:
            _between("seed", self.seed, -(2**63), 2**64 - 1)
        if self.logprobs is not None:
            _between("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _between("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.n > 1 and self.temperature == 0.0:
            raise InvalidRequest("n > 1 needs temperature > 0: greedy copies would be equal", param="n")

    def _check_lists(self) -> None:
        stop = self.stop or ()
        if len(stop) > MAX_STOP or any(not s for s in stop):
            raise InvalidRequest(f"stop takes at most {MAX_STOP} non-empty strings", param="stop")
        if len(self.stop_token_ids or ()) > MAX_STOP:
            raise InvalidRequest(f"stop_token_ids takes at most {MAX_STOP} ids", param="stop_token_ids")
        if len(self.bad_words or ()) > MAX_BAD_WORDS or any(not w for w in self.bad_words or ()):
            raise InvalidRequest(
                f"bad_words takes at most {MAX_BAD_WORDS} non-empty strings", param="bad_words"
            )
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequest("allowed_token_ids must not be empty", param="allowed_token_ids")
        bias = self.logit_bias or {}
        if len(bias) > MAX_BIASES:
            raise InvalidRequest(f"logit_bias takes at most {MAX_BIASES} tokens", param="logit_bias")
        if any(not math.isfinite(v) or abs(v) > 100 for v in bias.values()):
            raise InvalidRequest("logit_bias values must lie between -100 and 100", param="logit_bias")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def stop_strings(self) -> Sequence[str]:
        return self.stop or ()


def _between(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    # `not (a <= v)` rather than `v < a`, so that NaN is refused too
    if not (low < value if low_open else low <= value) or not value <= high:
        raise InvalidRequest(
            f"{name} must be {'above' if low_open else 'at least'} {low} and at most {high}, not {value}",
            param=name,
        )
