"""What the machine and the checkpoint are: measured once, handed to `resolve`, which only computes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Preferences:
    """What suits a kind of hardware, where the user has not said otherwise."""

    block_size: int  # tokens of a KV block
    max_num_seqs: int
    token_budget: int  # of a step; beyond it the arithmetic gains nothing and decoders wait longer
    # of --gpu-memory-utilization that the engine takes: less where others live in this memory
    memory_share: float
    graphs: bool = False  # a decode step can be captured and replayed as a whole
    page_bytes: int = 4096  # memory is mapped in multiples of it
    measured: bool = False  # the KV cache is sized in the engine, by what a full step was seen to need


# On a CPU the page cache, the front end and the user's other programs live in the same memory.
CPU_PREFERENCES = Preferences(block_size=16, max_num_seqs=64, token_budget=512, memory_share=0.5)


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    name: str  # "cpu" | "cuda" | "reference"
    description: str  # e.g. "2 cores of AMD EPYC, avx512f avx512_bf16"
    cores: int  # physical cores this process may use
    total_bytes: int
    free_bytes: int  # available to new allocations now, cgroup limits included
    preferences: Preferences = CPU_PREFERENCES


@dataclass(frozen=True, slots=True)
class ModelFacts:
    dtype: str  # of the checkpoint: "bfloat16" | "float16" | "float32"
    weight_bytes: dict[str, int]  # resident bytes by what they could be kept in, see `kept_in`
    kv_bytes_per_token: dict[str, int]  # over all layers, by dtype of the cache
    quantization: str | None = None  # what a quantised checkpoint's weights are in


def kept_in(dtype: str, quantization: str | None) -> str:
    """What a model's weights are in: a dtype, or a scheme for the layers' matrices and a dtype for the rest."""
    return dtype if quantization is None else f"{quantization} and {dtype}"
