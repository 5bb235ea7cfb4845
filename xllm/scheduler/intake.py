"""What is refused: configurations at start, requests at the door. Nothing that passes here can get stuck later."""

from collections.abc import Sequence

from xllm.config.decided import SchedulerConfig
from xllm.core.errors import ConfigError, InvalidRequest
from xllm.core.request import Request
from xllm.kv import hashing
from xllm.kv.pool import BlockPool


def check_config(config: SchedulerConfig) -> None:
    """`ConfigError` naming the field where a scheduler of this configuration could not work."""
    for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "depth"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} must be at least 1, not {getattr(config, name)}", param=name)
    if config.long_prefill_token_threshold < 0:
        raise ConfigError(
            "long_prefill_token_threshold must not be negative", param="long_prefill_token_threshold"
        )
    if config.chunked_prefill:
        return
    if config.max_num_batched_tokens < config.max_model_len:
        raise ConfigError(
            f"without chunked prefill a step must hold a whole prompt: max_num_batched_tokens "
            f"({config.max_num_batched_tokens}) must be at least max_model_len ({config.max_model_len})",
            param="max_num_batched_tokens",
        )
    if config.long_prefill_token_threshold:
        raise ConfigError(
            "long_prefill_token_threshold cuts prompts into chunks, which chunked prefill switched off forbids",
            param="long_prefill_token_threshold",
        )


def check_request(request: Request, config: SchedulerConfig, pool: BlockPool) -> None:
    """`InvalidRequest` where it could never run here. Tightens `max_total_tokens` to the model's and the request's limits."""
    prompt = len(request.prompt_token_ids)
    if prompt == 0:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if prompt >= config.max_model_len:
        raise InvalidRequest(
            f"the prompt has {prompt} tokens; with at least one to generate, {config.max_model_len} is the limit",
            param="prompt",
        )
    _check_ids("prompt", request.prompt_token_ids)
    limit = min(request.max_total_tokens, config.max_model_len)
    if request.params.max_tokens is not None:
        limit = min(limit, prompt + request.params.max_tokens)
    if limit <= prompt:
        raise InvalidRequest(
            f"a prompt of {prompt} tokens leaves no room to generate below {limit}", param="max_tokens"
        )
    request.max_total_tokens = limit
    given = len(request.output_token_ids)
    if given > limit - prompt:
        raise InvalidRequest(
            f"{given} tokens of output are given; after a prompt of {prompt} tokens there may be at most {limit - prompt}",
            param="output_token_ids",
        )
    _check_ids("output_token_ids", request.output_token_ids)
    blocks = -(-limit // pool.block_size)
    if blocks > pool.num_blocks:
        raise InvalidRequest(
            f"{limit} tokens of prompt and output need {blocks} KV blocks; the whole cache has {pool.num_blocks} of "
            f"{pool.block_size} tokens",
            param="max_tokens",
        )


def _check_ids(name: str, token_ids: Sequence[int]) -> None:
    try:
        hashing.pack(token_ids)
    except ValueError as error:
        raise InvalidRequest(str(error), param=name) from error
