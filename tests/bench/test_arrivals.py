import itertools
import math
import random
import statistics

import pytest

from xllm.bench.arrivals import arrival_times


def gaps(rate: float, burstiness: float, count: int = 20_000) -> list[float]:
    times = list(itertools.islice(arrival_times(rate, burstiness, random.Random(0)), count + 1))
    assert times[0] == 0.0
    return [b - a for a, b in itertools.pairwise(times)]


@pytest.mark.parametrize("rate", [0.5, 10.0])
@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_spread_of_their_distribution(rate, burstiness):
    sample = gaps(rate, burstiness)
    mean = statistics.fmean(sample)
    error = 1 / rate / math.sqrt(burstiness * len(sample))  # standard error of the mean
    assert abs(mean - 1 / rate) < 4 * error
    variation = statistics.stdev(sample) / mean
    assert variation == pytest.approx(1 / math.sqrt(burstiness), rel=0.06)


def test_a_poisson_process_has_poisson_counts():
    times = itertools.accumulate(gaps(5.0, 1.0))
    per_second = [0] * 3000
    for t in times:
        if t < len(per_second):
            per_second[int(t)] += 1
    assert statistics.fmean(per_second) == pytest.approx(5.0, rel=0.05)
    assert statistics.variance(per_second) == pytest.approx(5.0, rel=0.1)


def test_an_infinite_rate_sends_everything_at_once():
    assert gaps(math.inf, 1.0, 10) == [0.0] * 10


def test_the_seed_decides():
    def first(seed):
        return list(itertools.islice(arrival_times(3.0, 1.0, random.Random(seed)), 5))

    assert first(1) == first(1) != first(2)


@pytest.mark.parametrize(("rate", "burstiness"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (1.0, -1.0)])
def test_senseless_values_are_refused(rate, burstiness):
    with pytest.raises(ValueError, match="positive"):
        next(arrival_times(rate, burstiness, random.Random(0)))
