"""Nobody starves, though a stream of requests that every order likes better never ends."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduler.rig import Rig, request
from xllm.scheduler import policies
from xllm.scheduler.order import DEFAULT_DEADLINE_S, PRIORITY_STEP_S, SECONDS_PER_TOKEN

STEP_S = 2.0
LEVELS = 3  # of priority below the stream's
PROMPT = 30


def bound(order: str) -> float:
    """Seconds of arrivals that may overtake the request: what its place in the order is worth."""
    return {
        "fcfs": 0.0,
        "priority": LEVELS * PRIORITY_STEP_S,
        "deadline": DEFAULT_DEADLINE_S,
        "shortest": PROMPT * SECONDS_PER_TOKEN,
    }[order]


def flooded(seed: int, **policy: Any) -> Rig:
    """Run until the least liked request ends under a stream of twice what the engine can do."""
    rig = Rig(
        **policy, step_s=STEP_S, num_blocks=20, max_num_seqs=3, max_num_batched_tokens=12, check_every=False
    )
    arrivals = 0

    def arrive() -> None:
        nonlocal arrivals
        arrivals += 1
        prompt = [arrivals % 5, seed % 7, arrivals % 3]
        rig.add(request(f"r{arrivals}", prompt, 5, arrival=rig.now, deadline=rig.now + 1.0))

    for _ in range(5):
        arrive()
    rig.add(request("unloved", [9] * PROMPT, 12, arrival=rig.now, priority=LEVELS))
    backlog = 10  # what stood before it, and a prompt and output of its own
    turns = 4 * (backlog + bound(policy["order"]) / STEP_S) * 5
    while rig.finish("unloved") is None:
        turns -= 1
        assert turns > 0, "it starves"
        if (arrivals + seed) % 3:
            arrive()
        arrive()
        rig.turn()
    return rig


@pytest.mark.parametrize("admission", sorted(policies.ADMISSION))
@pytest.mark.parametrize("order", sorted(policies.ORDER))
@pytest.mark.parametrize("batching", sorted(policies.BATCHING))
def test_the_least_liked_request_ends_under_an_endless_stream(batching, order, admission):
    rig = flooded(0, batching=batching, order=order, admission=admission)
    assert rig.scheduler.num_waiting > 0, "the stream was more than the engine could do"
    assert [output.finish for output in rig.outputs["unloved"]][-1] == "length"


@given(
    st.sampled_from(sorted(policies.BATCHING)),
    st.sampled_from(sorted(policies.ORDER)),
    st.sampled_from(sorted(policies.ADMISSION)),
    st.integers(0, 20),
)
@settings(max_examples=10, deadline=None)
def test_whatever_the_stream(batching, order, admission, seed):
    flooded(seed, batching=batching, order=order, admission=admission)


def test_nobody_is_preempted_and_readmitted_for_ever():
    """A sequence that takes more than one block a step was once starved by the very request it had preempted: that one
    was let in again with the blocks it had just given back, and both stood still."""
    rig = Rig(
        num_blocks=12, max_num_seqs=8, max_num_batched_tokens=6, long_prefill_token_threshold=1, depth=1,
        batching="prefill_first", order="deadline", max_model_len=48, burst=5,
    )  # fmt: skip
    for i, length in enumerate([4, 14, 14, 5, 9, 6]):
        rig.add(request(f"r{i}", [0] * length, None, seed=0))
    rig.drain(turns=400).check_outputs()
