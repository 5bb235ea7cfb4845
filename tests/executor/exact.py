"""The sampler's rules once more, one token at a time in Python integers: what the tensors must agree with."""

from collections.abc import Iterable, Sequence
from fractions import Fraction

MASK = (1 << 64) - 1


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def uniform(seed: int, position: int, attempt: int = 0) -> Fraction:
    x = mix((mix(seed & MASK) + (position + 1) * 0x9E3779B97F4A7C15) & MASK)
    if attempt:
        x = mix((x + attempt) & MASK)
    return Fraction(x >> 11, 2**53)


def inverse(weights: Sequence[int], u: Fraction | float) -> int:
    """The first token whose running sum exceeds floor(u x total), rounded as a float64 product is."""
    total = sum(weights)
    target = min(int(float(u) * float(total)), total - 1)
    running = 0
    for token, weight in enumerate(weights):
        running += weight
        if running > target:
            return token
    raise AssertionError("no weight at all")


def kept_by_top_p(weights: Sequence[int], top_p: float) -> list[int]:
    """Those below whose strict betters' mass is less than top_p of all."""
    limit = top_p * float(sum(weights))
    by_weight = sorted(set(weights), reverse=True)
    threshold, better = by_weight[0], 0
    for weight in by_weight:
        if not better < limit:
            break
        threshold = weight
        better += weight * weights.count(weight)
    return [weight if weight >= threshold else 0 for weight in weights]


def top_p(weights: Sequence[int], top_p: float, seed: int, position: int) -> int:
    """By rejection: draw, refuse, go on among what is likelier."""
    allowed = top_p * float(sum(weights))
    left = list(weights)
    attempt = 0
    while True:
        token = inverse(left, uniform(seed, position, attempt))
        bar = left[token]
        left = [weight if weight > bar else 0 for weight in left]
        if not sum(left) >= allowed:
            return token
        attempt += 1


def kept_by_top_k(logits: Sequence[float], weights: Sequence[int], k: int) -> list[int]:
    """Those whose logit is not below the k-th best."""
    bar = sorted(logits, reverse=True)[k - 1]
    return [weight if logit >= bar else 0 for logit, weight in zip(logits, weights, strict=True)]


def chi_square(counts: Iterable[int], probabilities: Iterable[float]) -> float:
    """How many standard deviations the statistic lies above its mean, over cells of at least 5 expected."""
    pairs = list(zip(counts, probabilities, strict=True))
    n = sum(count for count, _ in pairs)
    cells = [(count, n * p) for count, p in pairs if n * p >= 5]
    rest = (n - sum(count for count, _ in cells), n - sum(expected for _, expected in cells))
    cells += [rest] if rest[1] >= 5 else []
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    freedom = len(cells) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5
