"""Random numbers as a pure function of seed and position: nothing beside or before a request matters."""

from xllm.core.seeds import mix
from xllm.ops.sampling import uniforms

__all__ = ["start_of", "uniforms"]


def start_of(seed: int) -> int:
    """Where a request's stream begins, as an int64. Takes any 64 bits, signed or not; on the host."""
    x = mix(seed)
    return x - (1 << 64) if x >= 1 << 63 else x
