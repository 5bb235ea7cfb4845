import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.cluster.speed import BOUNDS, Correction, StepTimes


def test_the_line_through_steps_of_different_size_is_found():
    steps = StepTimes()
    assert not steps.known and steps.line() == (0, 0)
    for tokens in (1, 700, 30, 2048):
        steps.seen(tokens, 0.005 + 2e-5 * tokens)
    base_s, token_s = steps.line()
    assert base_s == pytest.approx(0.005) and token_s == pytest.approx(2e-5)


def test_old_reports_fade():
    steps = StepTimes()
    for round in range(100):
        for tokens in (10, 1000):
            steps.seen(tokens, (0.01 if round < 20 else 0.002) + 1e-5 * tokens)
    base_s, token_s = steps.line()
    assert base_s == pytest.approx(0.002, rel=0.01) and token_s == pytest.approx(1e-5, rel=0.01)


def test_steps_of_one_size_share_their_time_between_both():
    steps = StepTimes()
    steps.seen(100, 0.02)
    steps.seen(100, 0.02)
    base_s, token_s = steps.line()
    assert base_s == pytest.approx(0.01) and token_s == pytest.approx(1e-4)


@given(st.lists(st.tuples(st.floats(1, 1e4), st.floats(1e-4, 10)), min_size=1, max_size=20))
def test_no_part_of_a_line_is_negative(reports):
    steps = StepTimes()
    for report in reports:
        steps.seen(*report)
    base_s, token_s = steps.line()
    assert base_s >= -1e-9 and token_s >= 0


def test_a_correction_follows_what_is_observed_within_bounds():
    correction = Correction()
    correction.seen(0.0, 5.0)
    correction.seen(5.0, 0.0)
    assert correction.factor == 1
    for _ in range(100):
        correction.seen(1.0, 1000.0)
    assert correction.factor == pytest.approx(BOUNDS[1])
    for _ in range(100):
        correction.seen(1.0, 0.7)
    assert correction.factor == pytest.approx(0.7)
