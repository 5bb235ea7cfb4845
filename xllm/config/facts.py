"""What the machine and the checkpoint are: measured once, handed to `resolve`, which only computes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    name: str  # "cpu"
    description: str  # e.g. "2 cores of AMD EPYC, avx512f avx512_bf16"
    cores: int  # physical cores this process may use
    total_bytes: int
    free_bytes: int  # available to new allocations now, cgroup limits included


@dataclass(frozen=True, slots=True)
class ModelFacts:
    dtype: str  # of the checkpoint: "bfloat16" | "float16" | "float32"
    weight_bytes: dict[str, int]  # resident bytes by dtype we could run in
    kv_bytes_per_token: dict[str, int]  # over all layers, by dtype
