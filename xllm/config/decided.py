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
    num_blocks: int  # 0 until the engine has measured what is left, see `xllm.config.memory`
    prefix_caching: bool
    block_bytes: int  # of one block over all layers
    kv_dtype: str  # "bfloat16" | "float32" | "float8_e4m3fn"
    pool: str = (
        "paged"  # "elastic": its memory comes and goes; "contiguous": sequences have addresses of their own
    )
    page_bytes: int = 0  # of a contiguous pool: what a block takes, whole pages of memory

    @property
    def bytes_each(self) -> int:
        """What a block takes of memory."""
        return self.page_bytes or self.block_bytes


@dataclass(frozen=True, slots=True)
class KvEventsConfig:
    """Where KV cache events go. Endpoints are ZMQ addresses (`tcp://`, `ipc://`)."""

    endpoint: str
    bind: bool  # listen at the endpoint; else a collector listens there and we connect to it
    replay_endpoint: str | None  # listened on
    topic: str
    buffer_steps: int  # batches kept for replay
    hwm: int  # batches that may wait for one subscriber; those beyond are not sent to it
    max_queue_size: int  # batches that may wait to be published at all


@dataclass(frozen=True, slots=True)
class TierConfig:
    """KV blocks below the device."""

    host_blocks: int  # in the host's memory, at least one
    disk_blocks: int  # 0: no disk tier
    disk_path: str | None  # directory
    remote: str | None = None  # address of a store that other engines use as well


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """What was asked about memory, for the engine that sizes its KV cache itself."""

    kv_bytes: int | None  # of the KV cache, where the user gave a number
    utilization: float  # share of the device's memory to use at most
    length_asked: bool  # the user chose the longest sequence; it must fit


@dataclass(frozen=True, slots=True)
class ExecutorConfig:
    device: str  # "cpu" | "cuda" | "reference"
    dtype: str  # "bfloat16" | "float32"
    threads: int
    seed: int
    # sequences of a decode step that graphs are captured for; none: all is eager
    graph_sizes: tuple[int, ...] = ()
    # scheme of the layers' matrices (`xllm.ops.schemes`); none: they are in `dtype`
    quantization: str | None = None


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
    memory: MemoryConfig
    executor: ExecutorConfig
    reasons: tuple[str, ...]  # what was decided and why, one sentence each, for the start-up plan
    kv_events: KvEventsConfig | None = None  # none: nobody wants them
    tiers: TierConfig | None = None  # none: KV lives on the device alone
