"""How many KV blocks the memory holds, and how long a sequence may then be. Pure.

On a CPU `resolve` asks before anything is loaded; on a card the engine asks, once it has seen what a full step needs.
"""

from dataclasses import replace

from xllm.config.decided import EngineConfig
from xllm.core.errors import ConfigError

GIB = 1 << 30


def fit_cache(config: EngineConfig, budget_bytes: int, why: str) -> EngineConfig:
    """The configuration with its KV cache sized to `budget_bytes` (or to what all sequences together can use, if that
    is less), and one more reason. Raises ConfigError where not one sequence of the length asked for fits."""
    cache, scheduler, memory = config.cache, config.scheduler, config.memory
    wanted, size = scheduler.max_model_len, cache.block_size
    useful = scheduler.max_num_seqs * blocks_of(wanted, size)
    num_blocks = budget_bytes // cache.bytes_each
    if memory.kv_bytes is None and useful <= num_blocks:
        num_blocks = useful
        why = (
            f"all that {scheduler.max_num_seqs} sequences of {wanted} tokens can use; {why} would allow more"
        )
    holds = num_blocks * size
    reasons = list(config.reasons)
    if holds < wanted:
        if memory.length_asked or holds < 2 * size:
            raise ConfigError(
                f"the KV cache ({gib(budget_bytes)}: {why}) holds {holds} tokens, less than one sequence of {wanted}; "
                "lower --max-model-len or give more memory"
            )
        reasons.append(f"max model length {holds} instead of the model's {wanted}: all the KV cache can hold")
    reasons.append(
        f"KV cache {gib(num_blocks * cache.bytes_each)} = {holds} tokens in {num_blocks} blocks of {size}: {why}"
    )
    return replace(
        config,
        cache=replace(cache, num_blocks=num_blocks),
        scheduler=replace(scheduler, max_model_len=min(wanted, holds)),
        reasons=tuple(reasons),
    )


def blocks_of(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def gib(n: int) -> str:
    return f"{n / GIB:.2f} GiB" if n >= GIB // 10 else f"{n / (1 << 20):.1f} MiB"
