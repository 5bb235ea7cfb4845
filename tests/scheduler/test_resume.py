"""A request that another engine began goes on here: with its tokens, its end, and nothing told twice."""

import itertools

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.scheduler.fake_executor import alone
from tests.scheduler.rig import Rig, begun_elsewhere, request
from tests.scheduler.test_equality import CHUNKS
from tests.scheduler.test_random_loads import Load
from tests.state_machines import explore
from xllm.core.errors import InvalidRequest
from xllm.core.output import Finish
from xllm.core.request import Request

LENGTH = 14
CUTS = range(LENGTH + 1)


def long(cut: int = 0, **fields) -> Request:
    fields = {"max_total_tokens": 64, "seed": 3, **fields}
    return begun_elsewhere(request(f"from {cut}", [1] * 9, LENGTH, **fields), cut)


@pytest.mark.parametrize(
    ("chunk", "caching", "depth", "preempted"),
    list(itertools.product(CHUNKS, (True, False), (1, 2, 3), (False, True))),
)
def test_the_rest_does_not_depend_on_where_it_was_cut(chunk, caching, depth, preempted):
    rig = Rig(
        **{"max_num_batched_tokens": 4096, **CHUNKS[chunk]}, depth=depth, prefix_caching=caching, max_num_seqs=16,
        num_blocks=10 if preempted else 256, check_every=False,
    )  # fmt: skip
    rig.run(*(long(cut) for cut in CUTS)).check_outputs()
    assert (rig.scheduler.stats().preemptions > 0) == preempted


def test_what_is_given_is_no_news():
    expected, _ = alone(long())
    rig = Rig().run(long(5))
    first, *_, last = rig.outputs["from 5"]
    assert list(first.token_ids) == expected[5:6]
    assert (first.queued_s, first.prefill_s, first.num_cached_tokens) == (None, None, 0)
    assert last.num_cached_tokens == 0
    assert rig.scheduler.stats().generation_tokens == LENGTH - 5


def test_how_much_of_it_was_cached_is_told_by_who_began_it():
    rig = Rig().run(long(0)).run(long(8))
    assert rig.outputs["from 8"][-1].num_cached_tokens == 0
    assert rig.scheduler.stats().prefix_hit_tokens > 9  # of prompt and output, for all that


@pytest.mark.parametrize(
    ("output", "fields", "finish", "stop_reason"),
    [
        ([5, 6, 7, 8], {}, Finish.LENGTH, None),
        ([5, 9], {}, Finish.STOP, 9),
        ([5, 0], {}, Finish.STOP, None),
        ([9, 9], {"params": {"min_tokens": 2}}, None, None),
        ([9, 9, 9], {"params": {"min_tokens": 2}}, Finish.STOP, 9),
        ([5, 6, 7, 9], {}, Finish.STOP, 9),
        ([5, 9, 6], {}, Finish.STOP, 9),
        ([5, 6], {"max_total_tokens": 5}, Finish.LENGTH, None),
        ([5, 6], {}, None, None),
    ],
)
def test_an_end_in_what_is_given_ends_it_at_once(output, fields, finish, stop_reason):
    rig = Rig()
    new = request("x", [1, 2, 3], 4, stop_ids=frozenset({0, 9}), eos_ids=frozenset({0}), **fields)
    new.output_token_ids = list(output)
    rig.add(new)
    assert new.output_token_ids == output
    assert rig.scheduler.has_work == (finish is None)
    if finish is not None:
        (only,) = rig.outputs["x"]
        assert (only.finish, only.stop_reason, only.token_ids) == (finish, stop_reason, ())
        rig.scheduler.add(request("x", [1], 1))  # the name is free again


@pytest.mark.parametrize(
    ("prompt", "output", "max_tokens", "sentence"),
    [
        (3, [1] * 5, 4, "5 tokens of output are given; after a prompt of 3 tokens there may be at most 4"),
        (60, [1] * 5, None, "after a prompt of 60 tokens there may be at most 4"),
        (3, [1, -1], None, "token id"),
        (3, [2**32], None, "token id"),
    ],
)
def test_what_cannot_have_been_put_out_is_refused(prompt, output, max_tokens, sentence):
    rig = Rig()
    new = request("x", [1] * prompt, max_tokens)
    new.output_token_ids = output
    with pytest.raises(InvalidRequest, match=sentence) as refused:
        rig.add(new)
    assert refused.value.param == "output_token_ids"
    assert not rig.scheduler.has_work


class Moves(Load):
    """Requests leave in the middle and go on from what has come of them, again and again, beside a load of any kind."""

    @precondition(lambda self: self.rig.scheduler.num_running + self.rig.scheduler.num_waiting)
    @rule(data=st.data())
    def move(self, data):
        rig = self.rig
        id = data.draw(st.sampled_from([id for id in rig.added if rig.finish(id) is None]))
        old, (tokens, scored) = rig.added[id], rig.given[id]
        tokens = tokens + rig.tokens(id)
        scored += sum(len(output.prompt_logprobs) for output in rig.outputs[id])
        rig.abort(id)
        rig.add(
            Request(
                id=f"{id}'", prompt_token_ids=old.prompt_token_ids, params=old.params, arrival=rig.now, seed=old.seed,
                max_total_tokens=old.max_total_tokens, stop_ids=old.stop_ids, priority=old.priority,
                deadline=old.deadline, cache_salt=old.cache_salt, output_token_ids=tokens,
                num_prompt_logprobs=max(scored, len(old.prompt_token_ids) - 1 if tokens else 0),
            )
        )  # fmt: skip


def test_requests_that_move_end_as_if_they_had_stayed():
    explore(Moves, examples=80, moves=40)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_requests_that_move_in_depth():
    explore(Moves, examples=2000, moves=80)
