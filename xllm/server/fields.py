"""Request fields that completions and chat share, and the `SamplingParams` they mean.

Every optional field may be null, which means *not given*. Unknown fields are refused by the schema. Fields we
know but cannot honour are declared here: the value that changes nothing passes, any other gets a sentence.
"""

import math
from typing import Any

import msgspec

from xllm.core.errors import InvalidRequest
from xllm.core.sampling import SamplingParams
from xllm.core.targets import Targets
from xllm.server.state import ServerState

MAX_SALT = 256
MAX_DEADLINE_S = 86400.0

# field -> (values that change nothing besides null, why anything else is refused)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "store": ((False,), "answers are not stored here"),
    "service_tier": (("auto", "default"), "there is one service tier here"),
    "structured_outputs": (({},), "constrained decoding is not available yet"),
}


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = (
        None  # padding against traffic analysis: ours has none, the text is the same
    )


class SamplingFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    priority: int | None = None
    deadline_s: float | None = None
    cache_salt: str | None = None
    ttft_slo_ms: float | None = None
    tpot_slo_ms: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # harmless
    user: Any = None
    metadata: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prediction: Any = None
    # refused unless neutral
    store: Any = None
    service_tier: Any = None
    structured_outputs: Any = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def check(self, state: ServerState) -> None:
        """What the schema cannot say. Raises `NotFound` for another model's name, else `InvalidRequest`."""
        state.check_model(self.model)
        refuse_unsupported(self, REFUSED)
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream: true", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequest(
                "prompt_logprobs is not available with stream: true", param="prompt_logprobs"
            )
        self._check_order(state.scheduling)
        if self.cache_salt is not None and len(self.cache_salt) > MAX_SALT:
            raise InvalidRequest(f"cache_salt takes at most {MAX_SALT} characters", param="cache_salt")

        self._check_targets(state.targets is not None)

    def targets(self, state: ServerState) -> Targets:
        """What the answer should take at most, as the request says or the router by default."""
        default = state.targets or Targets()
        ttft_s = default.ttft_s if self.ttft_slo_ms is None else self.ttft_slo_ms / 1000
        tpot_s = default.tpot_s if self.tpot_slo_ms is None else self.tpot_slo_ms / 1000
        return Targets(ttft_s, tpot_s)

    def _check_targets(self, used: bool) -> None:
        for name in ("ttft_slo_ms", "tpot_slo_ms"):
            value = getattr(self, name)
            if value is None:
                continue
            if not used:
                raise InvalidRequest(f"{name} needs a router with --routing-policy slo_aware", param=name)
            if not 0 < value < math.inf:
                raise InvalidRequest(f"{name} must be a positive number of milliseconds", param=name)

    def _check_order(self, order: str) -> None:
        if self.priority and order != "priority":
            raise InvalidRequest(
                f"priority needs a server with --scheduling-policy priority, not {order}", param="priority"
            )
        if self.priority is not None and not -(2**31) <= self.priority < 2**31:
            raise InvalidRequest("priority must fit into 32 bits", param="priority")
        if self.deadline_s is not None:
            if order != "deadline":
                raise InvalidRequest(
                    f"deadline_s needs a server with --scheduling-policy deadline, not {order}",
                    param="deadline_s",
                )
            if not 0 < self.deadline_s <= MAX_DEADLINE_S:
                raise InvalidRequest(
                    f"deadline_s must lie between 0 and {MAX_DEADLINE_S:.0f}", param="deadline_s"
                )

    def sampling(
        self, state: ServerState, *, max_tokens: int | None, logprobs: int | None, **more: Any
    ) -> SamplingParams:
        """The model's own defaults under what the request gives, and `more` over both."""
        given = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        values = state.default_params | given
        values |= {"max_tokens": max_tokens, "logprobs": logprobs} | more
        return SamplingParams(**values)


_SAMPLING = [
    f for f in SamplingParams.__struct_fields__ if f in SamplingFields.__struct_fields__ and f != "max_tokens"
]


def refuse_unsupported(body: msgspec.Struct, table: dict[str, tuple[tuple[Any, ...], str]]) -> None:
    for name, (neutral, why) in table.items():
        value = getattr(body, name)
        if value is not None and not any(type(value) is type(ok) and value == ok for ok in neutral):
            raise InvalidRequest(f"`{name}` is not supported: {why}", param=name, code="unsupported_field")
