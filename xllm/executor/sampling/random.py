"""Random numbers as a pure function of seed and position: nothing beside or before a request matters."""

from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def start_of(seed: int) -> int:
    """Where a request's stream begins, as an int64. Takes any 64 bits, signed or not; on the host."""
    x = seed & _MASK
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return _signed(x ^ (x >> 31))


def uniforms(starts_R: Tensor, positions_R: Tensor, attempt: int = 0) -> Tensor:
    """[R] int64 starts and token positions -> [R] float64, uniform in [0, 1) on multiples of 2**-53.

    For one seed and successive positions this is the stream of splitmix64 (Steele, Lea and Flood, "Fast
    splittable pseudorandom number generators", 2014) from a start that is itself a mixed seed. Further draws
    at one position, by `attempt`, mix the first one again.
    """
    x = _mix(starts_R + (positions_R + 1) * _signed(_GOLDEN))
    if attempt:
        x = _mix(x + attempt)
    return _shift(x, 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """To the right, filling with zeros: int64 has only the shift that repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """The int64 with the same 64 bits."""
    return x - (1 << 64) if x >= 1 << 63 else x
