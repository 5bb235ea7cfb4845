"""What steps are said to have taken, with a clock that is told how long each thing takes."""

from types import SimpleNamespace
from typing import Any

import pytest

from xllm.device.reference import ReferenceDevice
from xllm.executor.runner import BEGINS, Runner

STEP, GAP = 1.0, 0.25


class Mark:
    def __init__(self, at):
        self.at = at

    def wait(self):
        pass

    def since(self, earlier):
        return self.at - earlier.at


class Clock(ReferenceDevice):
    """Its time goes on by what is submitted: `now` is when the device will be through with it."""

    def __init__(self):
        super().__init__()
        self.now, self.marks = 0.0, 0

    def mark(self):
        self.marks += 1
        return Mark(self.now)


class Steps(Runner):
    """Every step takes STEP; the device idles for GAP before it."""

    def __init__(self, device):
        self.clock = device
        buffers: Any = SimpleNamespace(spare_slot=8, max_model_len=64, tokens=None)
        nothing: Any = SimpleNamespace(logits=None)
        super().__init__(nothing, nothing, buffers, nothing, device)

    def _admit(self, plan):
        pass

    def _replay_decode(self, plan):
        self.clock.now += STEP
        return lambda seconds: seconds

    def launch(self, plan):
        finish = super().launch(plan)
        self.clock.now += GAP
        return finish


def test_of_steps_that_follow_each_other_few_are_marked_at_both_ends():
    device = Clock()
    steps = Steps(device)
    waiting, seconds = [steps.launch(None)], []
    for _ in range(10 * BEGINS):
        waiting.append(steps.launch(None))
        seconds.append(waiting.pop(0)())
    seconds.append(waiting.pop()())
    assert len(seconds) == 10 * BEGINS + 1
    assert device.marks <= len(seconds) + 10 + 2
    # before the first marked one of those that follow the gap is not known yet, and counts as theirs
    assert seconds[:2] == [STEP, STEP + GAP]
    assert seconds[BEGINS:] == pytest.approx([STEP] * (9 * BEGINS + 1))
    stats = steps.stats
    assert stats.steps == len(seconds)
    assert stats.bubble_s == pytest.approx(GAP * (9 * BEGINS + 1))
    assert stats.device_s + stats.bubble_s == pytest.approx(device.now - GAP)


def test_a_step_that_follows_none_is_marked_at_both_ends():
    device = Clock()
    steps = Steps(device)
    for _ in range(3):
        assert steps.launch(None)() == STEP
        device.now += 100  # nobody asks for anything
    assert device.marks == 6
    assert steps.stats.bubble_s == 0
    assert steps.stats.device_s == 3 * STEP
