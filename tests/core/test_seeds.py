from hypothesis import given
from hypothesis import strategies as st

from xllm.core.seeds import GOLDEN, MASK, mix


def test_the_published_sequence_from_seed_1234567():
    """The first numbers of splitmix64 as its authors' code prints them."""
    found = [mix(1234567 + (i + 1) * GOLDEN) for i in range(3)]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.integers(-(2**70), 2**70))
def test_any_integer_gives_64_bits_of_its_low_64(x):
    assert 0 <= mix(x) <= MASK
    assert mix(x) == mix(x & MASK)


@given(st.sets(st.integers(0, MASK), min_size=2, max_size=50))
def test_different_seeds_stay_different(seeds):
    assert len({mix(seed) for seed in seeds}) == len(seeds)
