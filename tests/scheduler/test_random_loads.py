"""hypothesis drives scheduler, pool and a suspicious executor through loads nobody would think of.

After every move the books are audited (`Rig.check`); at the end every request must have ended exactly once with what it
outputs alone, whatever ran beside it, was cancelled, preempted or failed.
"""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.scheduler.fake_executor import VOCAB
from tests.scheduler.rig import Rig, begun_elsewhere, request
from tests.state_machines import explore
from xllm.core.errors import InvalidRequest
from xllm.core.output import Finish
from xllm.scheduler import policies

PREFIXES: tuple[list[int], ...] = ([], [1] * 4, [1] * 8, [1] * 8 + [2] * 9, [3] * 17)
MODEL_LEN = 48

limits = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(12, 30),
        "max_num_seqs": st.integers(1, 6),
        "max_num_batched_tokens": st.integers(1, 20),
        "long_prefill_token_threshold": st.sampled_from([0, 0, 1, 5]),
        "chunked_prefill": st.sampled_from([True, True, False]),
        "prefix_caching": st.sampled_from([True, True, True, False]),
        "depth": st.integers(1, 3),
        "step_s": st.sampled_from([0.01, 20.0]),
    }
)
names = st.fixed_dictionaries(
    {
        "batching": st.sampled_from(sorted(policies.BATCHING)),
        "order": st.sampled_from(sorted(policies.ORDER)),
        "admission": st.sampled_from(sorted(policies.ADMISSION)),
    }
)
bursts = st.sampled_from([1, 1, 1, 2, 5])
arrivals = st.fixed_dictionaries(
    {
        "prefix": st.sampled_from(PREFIXES),
        "suffix": st.lists(st.integers(0, 2), min_size=0, max_size=14),
        "max_tokens": st.one_of(st.integers(1, 25), st.none()),
        "priority": st.integers(-2, 2),
        "slack": st.one_of(st.none(), st.floats(-5, 100)),
        "salt": st.sampled_from(["", "", "tenant"]),
        "stop_ids": st.frozensets(st.integers(0, VOCAB - 1), max_size=2),
        "min_tokens": st.integers(0, 3),
        "seed": st.integers(0, 2),
        "logprobs": st.sampled_from([None, None, 0]),
        "prompt_logprobs": st.sampled_from([None, None, None, 0]),
        "begun": st.sampled_from([0, 0, 0, 0, 1, 2, 5, 99]),
    }
)


class Load(RuleBasedStateMachine):
    """One engine's life."""

    rig: Rig
    scarce: bool
    recorded = False

    @initialize(limits=limits, names=names, burst=bursts, scarce=st.booleans())
    def start(self, limits, names, burst, scarce):
        self.scarce = scarce
        if scarce:  # memory for one long request, slots for more: preemptions for sure
            limits |= {
                "num_blocks": 12 + limits["num_blocks"] % 2,
                "max_num_seqs": 3 + limits["max_num_seqs"],
            }
            names |= {"admission": "optimistic"}
        if not limits["chunked_prefill"]:
            limits |= {"max_num_batched_tokens": MODEL_LEN, "long_prefill_token_threshold": 0}
        if burst > 1:
            limits["depth"] = 1  # several tokens a step need that nothing later is in flight
        self.rig = Rig(max_model_len=MODEL_LEN, burst=burst, recorded=self.recorded, **limits, **names)

    @rule(crowd=st.lists(arrivals, min_size=2, max_size=6))
    def arrive_together(self, crowd):
        for arrival in crowd:
            self.arrive(arrival)

    @rule(arrival=arrivals)
    def arrive_alone(self, arrival):
        self.arrive(arrival)

    def arrive(self, arrival):
        prompt = arrival["prefix"] + arrival["suffix"] or [5]
        params = {key: arrival[key] for key in ("logprobs", "prompt_logprobs")}
        if self.scarce:
            arrival |= {"max_tokens": None, "stop_ids": frozenset()}
        params["min_tokens"] = min(arrival["min_tokens"], arrival["max_tokens"] or 3)
        new = request(
            f"r{len(self.rig.added)}",
            prompt,
            arrival["max_tokens"],
            arrival=self.rig.now,
            params=params,
            priority=arrival["priority"],
            deadline=None if arrival["slack"] is None else self.rig.now + arrival["slack"],
            cache_salt=arrival["salt"],
            stop_ids=arrival["stop_ids"],
            seed=arrival["seed"],
            max_total_tokens=MODEL_LEN,
        )
        self.rig.add(begun_elsewhere(new, arrival["begun"]))

    @rule()
    def refuse(self):
        with pytest.raises(InvalidRequest):
            self.rig.add(request("too long", [1] * MODEL_LEN))

    @precondition(lambda self: len(self.rig.executor.queue) < self.rig.config.depth)
    @rule()
    def plan(self):
        self.rig.plan()

    @rule()
    def apply(self):
        self.rig.apply()

    @rule(turns=st.integers(1, 12))
    def run(self, turns):
        for _ in range(turns):
            self.rig.turn()

    @precondition(lambda self: self.rig.added)
    @rule(data=st.data())
    def cancel(self, data):
        id = data.draw(st.sampled_from(sorted(self.rig.added)))
        alive = self.rig.finish(id) is None
        output = self.rig.abort(id)
        assert (output is not None) == alive
        assert output is None or output.finish is Finish.ABORT

    @precondition(lambda self: self.rig.added)
    @rule(data=st.data())
    def poison(self, data):
        self.rig.executor.failing[data.draw(st.sampled_from(sorted(self.rig.added)))] = "its sampler raised"

    @rule()
    def forget_prefixes(self):
        self.rig.scheduler.reset_prefix_cache()
        self.rig.check()

    @precondition(lambda self: self.rig.scheduler.num_running > 2)
    @rule(really=st.integers(0, 3))
    def crash(self, really):
        if really == 3:
            self.rig.fail_all()
            assert not self.rig.scheduler.has_work

    @invariant()
    def nobody_is_lost(self):
        if hasattr(self, "rig"):
            living = {id for id in self.rig.added if self.rig.finish(id) is None}
            assert len(living) == self.rig.scheduler.num_running + self.rig.scheduler.num_waiting

    def teardown(self):
        if hasattr(self, "rig"):
            self.rig.drain()
            self.rig.check_outputs()


def test_random_loads():
    explore(Load, examples=150, moves=40)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_random_loads_in_depth():
    explore(Load, examples=3000, moves=80)
