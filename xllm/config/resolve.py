"""From what was asked to what is decided. Pure: the same options and facts always give the same decisions."""

from dataclasses import dataclass, field, replace

from xllm.config.decided import (
    CacheConfig,
    EngineConfig,
    ExecutorConfig,
    KvEventsConfig,
    MemoryConfig,
    ModelConfig,
    SchedulerConfig,
)
from xllm.config.facts import DeviceFacts, ModelFacts, kept_in
from xllm.config.kv_events import read_kv_events
from xllm.config.memory import fit_cache, gib
from xllm.config.options import EngineOptions
from xllm.config.tiers import decide_tiers
from xllm.core.errors import ConfigError

BLOCK_SIZES = (8, 16, 32, 64, 128)
LARGER_BLOCKS = (*BLOCK_SIZES, 256, 512)  # where blocks had better be whole pages of memory


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
    suits = device.preferences
    _positive(asked)
    if asked.enable_sleep_mode and not suits.graphs:
        raise ConfigError(
            f"--enable-sleep-mode: weights rest in the host's memory, which is where the device {device.name} has them"
        )
    max_num_seqs = asked.max_num_seqs or suits.max_num_seqs
    executor = _executor(asked, facts, device, max_num_seqs, draft)
    max_model_len = asked.max_model_len or model.max_position
    if max_model_len > model.max_position:
        raise ConfigError(
            f"--max-model-len {max_model_len} is beyond the model's own {model.max_position} positions"
        )
    if asked.kv_pool == "elastic" and asked.admission == "no_eviction":
        raise ConfigError(
            "--admission no_eviction promises memory to whoever runs, which --kv-pool elastic may have given to somebody else"
        )
    kv_dtype = _kv_dtype(asked, executor.dtype, device, draft)
    block_size = _block_size(asked, facts.kv_bytes_per_token[kv_dtype], device)
    cache = CacheConfig(
        block_size=block_size,
        num_blocks=0,
        prefix_caching=asked.enable_prefix_caching,
        block_bytes=facts.kv_bytes_per_token[kv_dtype] * block_size,
        kv_dtype=kv_dtype,
        pool=asked.kv_pool,
        page_bytes=_page_bytes(asked, facts.kv_bytes_per_token[kv_dtype] * block_size, device, draft),
    )
    memory = MemoryConfig(
        kv_bytes=asked.kv_cache_memory_bytes,
        utilization=asked.gpu_memory_utilization,
        length_asked=asked.max_model_len is not None,
    )
    scheduler = _scheduler(asked, suits.token_budget, max_num_seqs, max_model_len, draft)
    tiers, why = decide_tiers(asked, cache)
    if tiers is not None:
        draft.say(why)
    config = EngineConfig(
        model=model, scheduler=scheduler, cache=cache, memory=memory, executor=executor, reasons=(),
        kv_events=_kv_events(asked, draft), tiers=tiers,
    )  # fmt: skip
    weights = facts.weight_bytes[kept_in(executor.dtype, executor.quantization)]
    return _with_cache(config, weights, device, draft)


def _block_size(asked: EngineOptions, bytes_per_token: int, device: DeviceFacts) -> int:
    """Tokens. Where blocks are mapped one by one they had better be whole pages of memory."""
    suits = device.preferences
    if asked.block_size is None:
        whole = (
            each
            for each in LARGER_BLOCKS
            if each >= suits.block_size and each * bytes_per_token % suits.page_bytes == 0
        )
        return next(whole, suits.block_size) if asked.kv_pool == "contiguous" else suits.block_size
    if asked.block_size not in BLOCK_SIZES:
        *others, last = BLOCK_SIZES
        raise ConfigError(
            f"--block-size must be {', '.join(map(str, others))} or {last}, not {asked.block_size}"
        )
    return asked.block_size


def _page_bytes(asked: EngineOptions, block_bytes: int, device: DeviceFacts, draft: _Draft) -> int:
    if asked.kv_pool != "contiguous":
        return 0
    page = device.preferences.page_bytes
    page_bytes = -(-block_bytes // page) * page
    wasted = 1 - block_bytes / page_bytes
    if wasted > 0:
        draft.say(
            f"a block of {gib(block_bytes)} takes {gib(page_bytes)}, whole pages of memory: {wasted:.0%} of the KV cache is lost"
        )
    return page_bytes


def _with_cache(config: EngineConfig, weights: int, device: DeviceFacts, draft: _Draft) -> EngineConfig:
    """Sizes the KV cache where what is free says enough; checks what can be checked where the engine will."""
    asked = config.memory.kv_bytes
    if asked is not None and asked + weights > device.total_bytes:
        raise ConfigError(
            f"--kv-cache-memory-bytes {asked} and {gib(weights)} of weights exceed the machine's {gib(device.total_bytes)}"
        )
    room = device.free_bytes - weights
    if asked is None and room <= 0:
        raise ConfigError(
            f"the weights take {gib(weights)} in {kept_in(config.executor.dtype, config.executor.quantization)}, but only {gib(device.free_bytes)} of memory is free"
        )
    decided = replace(config, reasons=tuple(draft.reasons))
    if asked is not None:
        return fit_cache(decided, asked, "as asked")
    if device.preferences.measured:
        return decided
    share = config.memory.utilization * device.preferences.memory_share
    why = f"{share:.2f} of {gib(device.free_bytes)} free minus {gib(weights)} of weights"
    return fit_cache(decided, int(room * share), why)


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


def _executor(
    asked: EngineOptions, facts: ModelFacts, device: DeviceFacts, max_num_seqs: int, draft: _Draft
) -> ExecutorConfig:
    dtype = asked.dtype
    quantization = _quantization(asked, facts, device, draft)
    if dtype == "auto":
        dtype = "float32" if facts.dtype == "float32" and quantization is None else "bfloat16"
        why = f"the checkpoint is {facts.dtype}"
        draft.say(
            f"dtype {dtype}: {why}"
            + ("; half-precision floats run as bfloat16" if facts.dtype == "float16" else "")
            + ("; products with quantised weights are in bfloat16" if quantization else "")
        )
    else:
        draft.say(f"dtype {dtype}: as asked")
    threads = asked.threads or device.cores
    draft.say(
        f"device {device.name}: {device.description}; {threads} threads: "
        + ("as asked" if asked.threads else "one a physical core")
    )
    return ExecutorConfig(
        device=device.name, dtype=dtype, threads=threads, seed=asked.seed,
        graph_sizes=_graph_sizes(asked, device, max_num_seqs, draft), quantization=quantization,
    )  # fmt: skip


def _quantization(asked: EngineOptions, facts: ModelFacts, device: DeviceFacts, draft: _Draft) -> str | None:
    wanted, found = asked.quantization, facts.quantization
    if wanted is not None and found is not None and wanted != found:
        raise ConfigError(f"--quantization {wanted}: the checkpoint is already quantised, in {found}")
    if wanted in ("awq", "gptq") and found is None:
        raise ConfigError(
            f"--quantization {wanted}: the checkpoint is not quantised that way; fp8, int8 and int4 quantise a float "
            "checkpoint as it loads"
        )
    scheme = found or wanted
    if scheme is None:
        return None
    if device.name == "cpu":
        raise ConfigError(
            f"weights in {scheme} run on a GPU only: on a CPU every product would first turn them back into floats; "
            "take the float checkpoint there, without --quantization"
        )
    draft.say(f"weights of the layers in {scheme}: " + ("as the checkpoint is" if found else "as asked"))
    return scheme


def _kv_dtype(asked: EngineOptions, dtype: str, device: DeviceFacts, draft: _Draft) -> str:
    if asked.kv_cache_dtype == "auto":
        return dtype
    if device.name == "cpu":
        raise ConfigError("--kv-cache-dtype fp8 runs on a GPU only: a CPU has no arithmetic for 8-bit floats")
    draft.say("KV cache in float8_e4m3fn: as asked; half the memory, three bits of mantissa")
    return "float8_e4m3fn"


def _kv_events(asked: EngineOptions, draft: _Draft) -> KvEventsConfig | None:
    wanted = None if asked.kv_events_config is None else read_kv_events(asked.kv_events_config)
    if wanted is None:
        return None
    if not asked.enable_prefix_caching:
        raise ConfigError(
            "--kv-events-config: events tell what the prefix cache holds, which --no-enable-prefix-caching switches off"
        )
    draft.say(
        f"KV events {'at' if wanted.bind else 'to the collector at'} {wanted.endpoint}, "
        + (
            f"the last {wanted.buffer_steps} batches again at {wanted.replay_endpoint}"
            if wanted.replay_endpoint
            else "no replay of what a subscriber missed"
        )
    )
    return wanted


def _graph_sizes(
    asked: EngineOptions, device: DeviceFacts, max_num_seqs: int, draft: _Draft
) -> tuple[int, ...]:
    given = asked.cudagraph_capture_sizes
    if given is not None and not device.preferences.graphs:
        raise ConfigError(f"--cudagraph-capture-sizes: the device {device.name} has no graphs")
    if not device.preferences.graphs:
        return ()
    if asked.enforce_eager:
        if given is not None:
            raise ConfigError("--enforce-eager and --cudagraph-capture-sizes ask for opposite things")
        draft.say("no graphs: as asked; small batches are bound by launches then")
        return ()
    sizes = tuple(sorted(set(given))) if given is not None else default_graph_sizes(max_num_seqs)
    if not sizes or not 1 <= sizes[0] <= sizes[-1] <= max_num_seqs:
        raise ConfigError(f"--cudagraph-capture-sizes must lie between 1 and --max-num-seqs {max_num_seqs}")
    draft.say(
        f"decode steps of up to {sizes[-1]} sequences run as graphs of {len(sizes)} sizes"
        + (": as asked" if given is not None else "")
    )
    return sizes


def default_graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Finer where a row more or less costs most; the largest is `max_num_seqs`, so that every decode step has one."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 1025, 32)]
    return (*(size for size in sizes if size < max_num_seqs), max_num_seqs)


def _scheduler(
    asked: EngineOptions, suits_budget: int, max_num_seqs: int, max_model_len: int, draft: _Draft
) -> SchedulerConfig:
    budget = asked.max_num_batched_tokens
    if budget is None:
        budget = max(suits_budget, max_num_seqs)
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
