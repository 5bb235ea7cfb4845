"""Seeds made from seeds: 64 bits in, 64 well-mixed bits out."""

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: multiples of it spread evenly
MASK = (1 << 64) - 1


def mix(x: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of the low 64 bits of `x`."""
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


class SeedSource:
    """Seeds for requests that bring none: splitmix64 of a seed and a count of requests.

    Sources of one seed give the same seeds again. `stream` (64 bits) tells apart those that work side by side.
    """

    def __init__(self, seed: int, stream: int = 0):
        self._base = seed * GOLDEN + mix(stream)  # mix(0) is 0
        self._drawn = 0

    def draw(self) -> int:
        self._drawn += 1
        return mix(self._base + self._drawn * 0xD1B54A32D192ED03)
