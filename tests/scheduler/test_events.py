"""Whoever applies the pool's events knows what its index holds, whatever the scheduler did in between."""

from collections import Counter

from hypothesis import strategies as st
from hypothesis.stateful import initialize

from tests.scheduler.rig import Rig, request
from tests.scheduler.test_random_loads import Load, bursts, limits, names
from tests.state_machines import explore
from xllm.kv.events import DEVICE, Cleared, Removed, Stored

seen: Counter[type] = Counter()


class RecordedLoad(Load):
    """The random loads, with a mirror of the index that is compared after every move."""

    recorded = True

    @initialize(
        limits=limits.map(lambda drawn: drawn | {"prefix_caching": True}),
        names=names,
        burst=bursts,
        scarce=st.booleans(),
    )
    def start(self, limits, names, burst, scarce):
        super().start(limits, names, burst, scarce)

    def teardown(self):
        super().teardown()
        if hasattr(self, "rig"):
            assert self.rig.mirror is not None
            seen.update(type(event) for event in self.rig.mirror.seen)


def test_a_mirror_equals_the_index_at_every_step():
    seen.clear()
    explore(RecordedLoad, examples=100, moves=40)
    assert min(seen[Stored], seen[Removed], seen[Cleared]) > 10


def test_a_prompt_is_one_event_with_what_its_names_stand_for():
    rig = Rig(recorded=True, num_blocks=64)
    for id in ("a", "b"):
        rig.add(request(id, list(range(9)), 1, cache_salt="tenant"))
    rig.drain()
    assert rig.mirror is not None
    names = rig.added["a"].block_hashes[:2]
    assert rig.mirror.seen == [Stored(names, None, list(range(8)), "tenant", DEVICE)]


def test_generated_tokens_follow_their_prompt():
    rig = Rig(recorded=True)
    rig.run(request("a", [1, 2, 3, 4, 5], 12))
    assert rig.mirror is not None
    told = [token for event in rig.mirror.seen if isinstance(event, Stored) for token in event.token_ids]
    tokens = [1, 2, 3, 4, 5, *rig.tokens("a")]
    assert told == tokens[: len(told)]
    assert len(told) >= 12
    parents = [event.parent for event in rig.mirror.seen if isinstance(event, Stored)]
    assert parents == [None, *rig.added["a"].block_hashes[: len(parents) - 1]]


def test_nothing_is_recorded_unless_wanted():
    assert Rig().run(request("a", [1] * 9)).pool.events is None
