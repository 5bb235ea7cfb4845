from hypothesis import given
from hypothesis import strategies as st

from xllm.core.seeds import GOLDEN, MASK, SeedSource, mix


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


def test_a_source_gives_the_same_seeds_again_and_other_streams_give_others():
    def drawn(*source: int) -> list[int]:
        seeds = SeedSource(*source)
        return [seeds.draw() for _ in range(50)]

    assert drawn(3) == drawn(3) == drawn(3, 0)
    assert len({*drawn(3), *drawn(4), *drawn(3, 1), *drawn(3, 2), *drawn(-3, MASK)}) == 250
    assert all(0 <= seed <= MASK for seed in drawn(-3, MASK))
