"""From what was asked to what is decided. Pure: the same options and facts always give the same decisions."""

from dataclasses import dataclass, field

from xllm.config.decided import CacheConfig, EngineConfig, ExecutorConfig, ModelConfig, SchedulerConfig
from xllm.config.facts import DeviceFacts, ModelFacts
from xllm.config.options import EngineOptions
from xllm.core.errors import ConfigError

GIB = 1 << 30
CPU_BLOCK_SIZE = 16
CPU_MAX_NUM_SEQS = 64
CPU_TOKEN_BUDGET = 512  # beyond this a step's linears gain nothing on a CPU and decoders wait longer
# Of a CPU's free memory the KV cache takes at most half of what --gpu-memory-utilization would allow on a card:
# the page cache, the front end and the user's other programs live in the same memory.
CPU_SHARE = 0.5


@dataclass
class _Draft:
    reasons: list[str] = field(default_factory=list)

    def say(self, sentence: str) -> None:
        self.reasons.append(sentence)


def resolve(asked: EngineOptions, model: ModelConfig, facts: ModelFacts, device: DeviceFacts) -> EngineConfig:
    """Raises ConfigError, with a sentence, for what cannot work."""
    draft = _Draft()
    if asked.trust_remote_code:
        raise ConfigError(
            "--trust-remote-code is refused: xLLM implements architectures itself and runs no code out of a checkpoint"
        )
    executor = _executor(asked, facts, device, draft)
    block_size = asked.block_size or CPU_BLOCK_SIZE
    if block_size not in (8, 16, 32, 64, 128):
        raise ConfigError(f"--block-size must be 8, 16, 32, 64 or 128, not {block_size}")
    max_num_seqs = asked.max_num_seqs or CPU_MAX_NUM_SEQS
    _positive(asked)
    kv_per_token = facts.kv_bytes_per_token[executor.dtype]
    block_bytes = kv_per_token * block_size
    num_blocks, max_model_len = _kv(
        asked, model, facts, device, executor.dtype, max_num_seqs, block_size, draft
    )
    scheduler = _scheduler(asked, max_num_seqs, max_model_len, draft)
    cache = CacheConfig(
        block_size=block_size,
        num_blocks=num_blocks,
        prefix_caching=asked.enable_prefix_caching,
        block_bytes=block_bytes,
    )
    return EngineConfig(
        model=model, scheduler=scheduler, cache=cache, executor=executor, reasons=tuple(draft.reasons)
    )


def _positive(asked: EngineOptions) -> None:
    for name in (
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "threads",
        "kv_cache_memory_bytes",
        "async_scheduling",
    ):
        value = getattr(asked, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if asked.long_prefill_token_threshold < 0:
        raise ConfigError("--long-prefill-token-threshold must not be negative")
    if not 0 < asked.gpu_memory_utilization <= 1:
        raise ConfigError(
            f"--gpu-memory-utilization must lie above 0 and at most 1, not {asked.gpu_memory_utilization}"
        )


def _executor(asked: EngineOptions, facts: ModelFacts, device: DeviceFacts, draft: _Draft) -> ExecutorConfig:
    dtype = asked.dtype
    if dtype == "auto":
        dtype = "float32" if facts.dtype == "float32" else "bfloat16"
        why = f"the checkpoint is {facts.dtype}"
        draft.say(
            f"dtype {dtype}: {why}"
            + ("; half-precision floats run as bfloat16" if facts.dtype == "float16" else "")
        )
    else:
        draft.say(f"dtype {dtype}: as asked")
    threads = asked.threads or device.cores
    draft.say(
        f"device {device.name}: {device.description}; {threads} threads: "
        + ("as asked" if asked.threads else "one a physical core")
    )
    return ExecutorConfig(device=device.name, dtype=dtype, threads=threads, seed=asked.seed)


def _kv(
    asked: EngineOptions, model: ModelConfig, facts: ModelFacts, device: DeviceFacts, dtype: str,
    max_num_seqs: int, block_size: int, draft: _Draft,
) -> tuple[int, int]:  # fmt: skip
    """-> (number of blocks, max_model_len)."""
    per_token, weights = facts.kv_bytes_per_token[dtype], facts.weight_bytes[dtype]
    if asked.max_model_len and asked.max_model_len > model.max_position:
        raise ConfigError(
            f"--max-model-len {asked.max_model_len} is beyond the model's own {model.max_position} positions"
        )
    wanted_len = asked.max_model_len or model.max_position
    useful = max_num_seqs * _round_up(wanted_len, block_size) * per_token
    if asked.kv_cache_memory_bytes:
        budget, why = asked.kv_cache_memory_bytes, "as asked"
        if budget + weights > device.total_bytes:
            raise ConfigError(
                f"--kv-cache-memory-bytes {budget} and {_gib(weights)} of weights exceed the machine's {_gib(device.total_bytes)}"
            )
    else:
        share = asked.gpu_memory_utilization * CPU_SHARE
        room = device.free_bytes - weights
        if room <= 0:
            raise ConfigError(
                f"the weights take {_gib(weights)} in {dtype}, but only {_gib(device.free_bytes)} of memory is free"
            )
        budget, why = (
            int(room * share),
            f"{share:.2f} of {_gib(device.free_bytes)} free minus {_gib(weights)} of weights",
        )
        if useful < budget:
            budget, why = (
                useful,
                f"all that {max_num_seqs} sequences of {wanted_len} tokens can use; {why} would allow more",
            )
    num_blocks = budget // (per_token * block_size)
    fits = num_blocks * block_size
    if fits < wanted_len:
        if asked.max_model_len or fits < 2 * block_size:
            raise ConfigError(
                f"the KV cache ({_gib(budget)}: {why}) holds {fits} tokens, less than one sequence of {wanted_len}; "
                "lower --max-model-len or give more memory"
            )
        draft.say(f"max model length {fits} instead of the model's {wanted_len}: all the KV cache can hold")
        wanted_len = fits
    draft.say(
        f"KV cache {_gib(num_blocks * block_size * per_token)} = {fits} tokens in {num_blocks} blocks of {block_size}: {why}"
    )
    return num_blocks, wanted_len


def _scheduler(asked: EngineOptions, max_num_seqs: int, max_model_len: int, draft: _Draft) -> SchedulerConfig:
    budget = asked.max_num_batched_tokens
    if budget is None:
        budget = max(CPU_TOKEN_BUDGET, max_num_seqs)
        if not asked.enable_chunked_prefill:
            budget = max(budget, max_model_len)
        draft.say(
            f"{budget} tokens a step at most, {max_num_seqs} sequences at once, {asked.batching_policy} batching, {asked.scheduling_policy} order"
        )
    elif not asked.enable_chunked_prefill and budget < max_model_len:
        raise ConfigError(
            f"--no-enable-chunked-prefill computes a prompt in one step: --max-num-batched-tokens {budget} must be at least "
            f"the maximum model length {max_model_len}"
        )
    depth = asked.async_scheduling
    if depth > 8:
        raise ConfigError(f"--async-scheduling {depth}: more than 8 steps in flight only delay what ends")
    draft.say(
        f"{depth} step{'s' if depth > 1 else ''} in flight: "
        + ("plan and run in turn" if depth == 1 else "the next step is planned while one runs")
    )
    return SchedulerConfig(
        max_model_len=max_model_len, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget,
        chunked_prefill=asked.enable_chunked_prefill, long_prefill_token_threshold=asked.long_prefill_token_threshold,
        batching=asked.batching_policy, order=asked.scheduling_policy, admission=asked.admission, depth=depth,
    )  # fmt: skip


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _gib(n: int) -> str:
    return f"{n / GIB:.2f} GiB" if n >= GIB // 10 else f"{n / (1 << 20):.1f} MiB"
