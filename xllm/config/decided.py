"""What was decided: frozen, complete, written once by `resolve`. Nobody patches it afterwards."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    max_model_len: int
    max_num_seqs: int  # slots
    max_num_batched_tokens: int  # token budget of a step
    chunked_prefill: bool
    long_prefill_token_threshold: int  # 0: none
    batching: str  # chunked | prefill_first | decode_first
    order: str  # fcfs | priority | deadline | shortest
    admission: str  # optimistic | no_eviction
    depth: int  # steps in flight at most


@dataclass(frozen=True, slots=True)
class CacheConfig:
    block_size: int  # tokens
    num_blocks: int
    prefix_caching: bool
    block_bytes: int  # of one block over all layers


@dataclass(frozen=True, slots=True)
class ExecutorConfig:
    device: str  # "cpu"
    dtype: str  # "bfloat16" | "float32"
    threads: int
    seed: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The checkpoint's config.json, read once; families pick what is theirs out of `hf`."""

    directory: str
    architecture: str  # e.g. "Qwen3ForCausalLM"
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int  # context the checkpoint was made for, rope scaling included
    eos_ids: tuple[int, ...]
    load_format: str
    hf: dict[str, Any]  # the text part of config.json after --hf-overrides


@dataclass(frozen=True, slots=True)
class EngineConfig:
    model: ModelConfig
    scheduler: SchedulerConfig
    cache: CacheConfig
    executor: ExecutorConfig
    reasons: tuple[str, ...]  # what was decided and why, one sentence each, for the start-up plan
