"""The counter-based random numbers: the same as in Python integers, and random enough."""

import math
from collections.abc import Iterable

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.executor import exact
from xllm.executor.sampling.random import start_of, uniforms


def starts(seeds: Iterable[int]) -> torch.Tensor:
    return torch.tensor([start_of(seed) for seed in seeds])


seeds = st.integers(-(2**63), 2**64 - 1)


@given(
    rows=st.lists(st.tuples(seeds, st.integers(0, 2**31)), min_size=1, max_size=8), attempt=st.integers(0, 50)
)
def test_equals_the_integers(rows: list[tuple[int, int]], attempt: int):
    found = uniforms(starts(s for s, _ in rows), torch.tensor([p for _, p in rows]), attempt)
    assert found.tolist() == [float(exact.uniform(s, p, attempt)) for s, p in rows]
    assert ((found >= 0) & (found < 1)).all()


def test_uniform_and_independent_over_positions_seeds_and_attempts():
    n = 200_000
    count = torch.arange(n)
    series = {
        "positions": uniforms(starts([7]).expand(n), count),
        "seeds": uniforms(starts(range(n)), torch.full((n,), 7)),
        "seeds a golden step apart": uniforms(
            starts(i * 0x9E3779B97F4A7C15 for i in range(n)), torch.zeros_like(count)
        ),
        "attempts": torch.cat([uniforms(starts([3]), count[: n // 20], a) for a in range(20)]),
    }
    for name, values in series.items():
        cells = torch.bincount((values * 256).long(), minlength=256).tolist()
        assert abs(exact.chi_square(cells, [1 / 256] * 256)) < 5, name
        pairs = torch.bincount(
            (values[:-1] * 16).long() * 16 + (values[1:] * 16).long(), minlength=256
        ).tolist()
        assert abs(exact.chi_square(pairs, [1 / 256] * 256)) < 5, name
        centred = values - 0.5
        for lag in (1, 2, 3, 16):
            correlation = float((centred[:-lag] * centred[lag:]).mean() * 12)
            assert abs(correlation) < 5 / math.sqrt(n), (name, lag)
