import pytest

from tests.scheduler.fake_executor import alone
from tests.scheduler.rig import Rig, request
from xllm.core.errors import EngineFault, InvalidRequest
from xllm.core.output import Finish
from xllm.core.plan import StepResult


def entries(plan) -> list[tuple[int, int, int, bool]]:
    return list(zip(plan.slots, plan.starts, plan.counts, plan.samples, strict=True))


def warmed_up(rig: Rig, turns: int) -> Rig:
    for _ in range(turns):
        rig.turn()
    return rig


class TestOneRequest:
    def test_a_prompt_in_chunks_then_tokens(self):
        rig = Rig(depth=1, max_num_batched_tokens=4)
        rig.run(request("a", [1] * 9, 3)).check_outputs()
        assert [entries(plan) for plan in rig.plans] == [
            [(0, 0, 4, False)],
            [(0, 4, 4, False)],
            [(0, 8, 1, True)],
            [(0, 9, 1, True)],
            [(0, 10, 1, True)],
        ]
        assert [plan.step for plan in rig.plans] == [1, 2, 3, 4, 5]
        assert rig.plans[0].new[0].token_ids == (1,) * 9
        assert not any(plan.new for plan in rig.plans[1:])

    def test_the_next_step_is_planned_before_the_token_is_known(self):
        rig = Rig(depth=3)
        rig.add(request("a", [1, 2, 3], 8))
        for expected in ((0, 0, 3, True), (0, 3, 1, True), (0, 4, 1, True)):
            plan = rig.plan()
            assert plan is not None
            assert entries(plan) == [expected]
        assert rig.scheduler.steps_in_flight == 3
        rig.drain().check_outputs()

    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_nothing_is_sampled_past_the_length_limit(self, depth):
        rig = Rig(depth=depth)
        rig.run(request("a", [1, 2, 3], 5)).check_outputs()
        assert sum(sum(plan.samples) for plan in rig.plans) == 5
        assert rig.finish("a") is Finish.LENGTH

    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_what_ran_past_a_stop_is_dropped(self, depth):
        probe = request("a", [1, 2, 3], 20)
        stop = alone(probe)[0][5]
        rig = Rig(depth=depth)
        rig.run(request("a", [1, 2, 3], 20, stop_ids=frozenset({stop}))).check_outputs()
        output = rig.outputs["a"][-1]
        assert (output.finish, output.stop_reason, list(output.token_ids)) == (Finish.STOP, stop, [stop])
        overrun = sum(sum(plan.samples) for plan in rig.plans) - len(rig.tokens("a"))
        assert overrun == depth - 1

    def test_blocks_of_an_ended_request_wait_for_steps_in_flight(self):
        stop = alone(request("a", [1, 2, 3], 20))[0][0]
        rig = Rig(depth=2, prefix_caching=False)
        rig.add(request("a", [1, 2, 3], 20, stop_ids=frozenset({stop})))
        rig.plan()
        rig.plan()
        (output,) = rig.apply()
        assert output.finish is Finish.STOP
        assert rig.pool.num_returning == 1
        assert rig.scheduler.num_running == 0
        assert rig.scheduler.has_work, "a step is still in flight"
        rig.apply()
        assert rig.pool.num_available == 64
        assert not rig.scheduler.has_work

    def test_times_are_told_once(self):
        rig = Rig(depth=1)
        rig.now = 5.0
        rig.run(request("a", [1] * 20, 3, arrival=4.0))
        first, *rest = rig.outputs["a"]
        assert first.queued_s == pytest.approx(1.01)
        assert first.prefill_s == pytest.approx(0.01), "the prompt took a second step"
        assert all(output.queued_s is None and output.prefill_s is None for output in rest)

    def test_nothing_to_do_is_no_plan(self):
        assert Rig().plan() is None


class TestBatch:
    def test_requests_join_and_leave_at_any_step(self):
        rig = Rig(depth=2, max_num_seqs=3)
        for i in range(9):
            rig.add(request(f"r{i}", [i] * (i + 1), 1 + i % 4, arrival=rig.now))
            rig.turn()
        rig.drain().check_outputs()

    def test_a_slot_is_handed_on_while_its_last_step_runs(self):
        rig = Rig(depth=2, max_num_seqs=1)
        rig.add(request("a", [1, 2], 1))
        rig.plan()
        rig.add(request("b", [1, 2], 1))
        rig.abort("a")
        plan = rig.plan()
        assert plan is not None
        assert [(new.slot, new.request_id) for new in plan.new] == [(0, "b")]
        rig.drain().check_outputs()

    def test_decodes_take_turns_when_the_budget_is_smaller_than_the_batch(self):
        rig = Rig(depth=1, batching="prefill_first", max_num_seqs=4, max_num_batched_tokens=3)
        rig.run(*[request(f"r{i}", [i], 12) for i in range(4)]).check_outputs()
        left_out = [({0, 1, 2, 3} - set(plan.slots)).pop() for plan in rig.plans[2:6]]
        assert len(set(left_out)) == 4

    def test_one_long_prompt_is_capped(self):
        rig = Rig(depth=1, long_prefill_token_threshold=5)
        rig.add(request("long", [1] * 20, 1))
        rig.add(request("short", [2] * 6, 1))
        plan = rig.plan()
        assert plan is not None
        assert plan.counts == [5, 5]
        rig.drain().check_outputs()

    def test_a_begun_prompt_gives_way_to_a_better_one(self):
        rig = Rig(depth=1, order="priority")
        rig.add(request("long", [1] * 40, 1))
        rig.plan()
        rig.add(request("urgent", [2] * 10, 1, priority=-1))
        plan = rig.plan()
        assert plan is not None
        assert list(zip(plan.slots, plan.counts, strict=True)) == [(1, 10), (0, 6)]
        rig.drain().check_outputs()

    def test_whole_prompts_wait_until_they_fit_and_nobody_overtakes(self):
        rig = Rig(depth=1, chunked_prefill=False, max_num_batched_tokens=64)
        rig.add(request("a", [1] * 40, 2))
        rig.add(request("b", [2] * 30, 2))
        rig.add(request("c", [3] * 4, 2))
        first, second = rig.plan(), (rig.apply(), rig.plan())[1]
        assert first is not None
        assert second is not None
        assert [new.request_id for new in first.new] == ["a"]
        assert [new.request_id for new in second.new] == ["b", "c"]
        assert second.counts == [1, 30, 4]
        rig.drain().check_outputs()


class TestBatchingPolicies:
    def mixed(self, batching: str) -> Rig:
        """Two sequences decode; a prompt of two chunks arrives."""
        rig = Rig(depth=1, batching=batching, max_num_batched_tokens=16)
        for i in range(2):
            rig.add(request(f"r{i}", [i], 40))
        warmed_up(rig, 3)
        rig.add(request("prompt", [5] * 24, 2))
        rig.plans.clear()
        return rig

    def counts(self, rig: Rig, turns: int) -> list[list[int]]:
        warmed_up(rig, turns)
        return [list(plan.counts) for plan in rig.plans]

    def test_chunked(self):
        assert self.counts(self.mixed("chunked"), 2) == [[1, 1, 14], [1, 1, 10]]

    def test_prefill_first(self):
        assert self.counts(self.mixed("prefill_first"), 3) == [[16], [8, 1, 1], [1, 1, 1]]

    def test_decode_first(self):
        counts = self.counts(self.mixed("decode_first"), 10)
        assert counts == [[1, 1]] * 8 + [[1, 1, 14], [1, 1]]

    def test_decode_first_fills_steps_that_no_decode_needs(self):
        rig = Rig(depth=2, batching="decode_first", max_num_seqs=2)
        rig.add(request("a", [1], 1))
        rig.plan()  # its only token is in flight: it decodes no more, but is not known to have ended
        rig.add(request("b", [2], 1))
        plan = rig.plan()
        assert plan is not None
        assert plan.new[0].request_id == "b"
        rig.drain().check_outputs()

    @pytest.mark.parametrize("batching", ["chunked", "prefill_first", "decode_first"])
    def test_a_stream_of_prompts_stops_nobody(self, batching):
        """A slot and memory for everybody, and more prompt tokens than fit a step: only the policy makes room."""
        rig = Rig(
            depth=2,
            batching=batching,
            max_num_batched_tokens=8,
            max_num_seqs=300,
            num_blocks=1200,
            check_every=False,
        )
        rig.add(request("old", [1], 20))
        for i in range(220):
            rig.add(request(f"r{i}", [i % 256, i % 5, i % 7] * 4, 2, arrival=rig.now))
            rig.turn()
        assert rig.finish("old") is Finish.LENGTH
        rig.drain().check_outputs()


class TestPrefixCache:
    def test_prompts_are_shared_within_one_step(self):
        rig = Rig(depth=1, max_num_batched_tokens=64)
        rig.run(*[request(f"r{i}", [1] * 9 + [i], 3) for i in range(3)]).check_outputs()
        assert rig.plans[0].counts == [10, 2, 2]
        assert [rig.outputs[f"r{i}"][0].num_cached_tokens for i in range(3)] == [0, 8, 8]
        stats = rig.scheduler.stats()
        assert (stats.prefix_queried_tokens, stats.prefix_hit_tokens) == (30, 16)

    def test_an_equal_prompt_still_computes_its_last_block(self):
        rig = Rig(depth=1)
        rig.run(request("a", [1] * 8, 1))
        rig.run(request("b", [1] * 8, 1)).check_outputs()
        assert entries(rig.plans[-1]) == [(0, 4, 4, True)]

    def test_a_conversation_finds_its_answer_cached(self):
        rig = Rig(depth=2)
        rig.run(request("a", [1] * 6, 8))
        rig.run(request("b", [1] * 6 + rig.tokens("a") + [2, 3], 2)).check_outputs()
        assert rig.outputs["b"][0].num_cached_tokens == 12

    def test_switched_off_nothing_is_found(self):
        rig = Rig(prefix_caching=False)
        rig.run(request("a", [1] * 9, 1))
        rig.run(request("b", [1] * 9, 1)).check_outputs()
        assert rig.outputs["b"][0].num_cached_tokens == 0
        assert rig.scheduler.stats().prefix_queried_tokens == 18

    def test_reset_forgets_and_what_runs_publishes_no_more(self):
        rig = Rig(depth=2)
        rig.run(request("old", [1] * 9, 1))
        rig.add(request("running", [2] * 9, 12))
        warmed_up(rig, 4)
        rig.scheduler.reset_prefix_cache()
        rig.drain()
        for id, prompt in (("a", [1] * 9), ("b", [2] * 9)):
            rig.run(request(id, prompt, 1))
            assert rig.outputs[id][0].num_cached_tokens == 0
        rig.check_outputs()

    def test_what_ran_across_a_reset_serves_nobody_even_once_its_beginning_is_back(self):
        rig = Rig(depth=2)
        rig.add(request("running", [2] * 9, 12))
        warmed_up(rig, 4)
        rig.scheduler.reset_prefix_cache()
        rig.drain()
        sequence = [2] * 9 + rig.tokens("running")
        rig.run(request("beginning", sequence[:13], 1))
        rig.run(request("all", sequence, 1)).check_outputs()
        assert rig.outputs["all"][0].num_cached_tokens == 12

    def test_prompt_logprobs_are_computed_not_cached(self):
        rig = Rig(depth=2, max_num_batched_tokens=4)
        rig.run(request("a", [1, 2, 3, 4, 5, 6, 7, 8, 9], 1))
        rig.run(request("b", [1, 2, 3, 4, 5, 6, 7, 8, 9], 2, params={"prompt_logprobs": 0})).check_outputs()
        assert rig.outputs["b"][0].num_cached_tokens == 0
        rig.run(request("c", [1, 2, 3, 4, 5, 6, 7, 8, 9], 2)).check_outputs()
        assert rig.outputs["c"][0].num_cached_tokens == 8


class TestPreemption:
    def test_the_last_in_rank_yields_and_resumes_where_it_was(self):
        rig = Rig(depth=1, num_blocks=8, prefix_caching=False)
        rig.run(request("a", [1] * 8, 20), request("b", [2] * 8, 20)).check_outputs()
        assert rig.outputs["a"][-1].num_preemptions == 0
        assert rig.outputs["b"][-1].num_preemptions > 0
        assert rig.scheduler.stats().preemptions == rig.outputs["b"][-1].num_preemptions
        resumed = [new for plan in rig.plans for new in plan.new if new.request_id == "b"][1]
        known = len(resumed.token_ids) - resumed.prompt_len
        assert known > 0
        assert list(resumed.token_ids) == [2] * 8 + rig.tokens("b")[:known]

    @pytest.mark.parametrize("order", ["priority", "deadline", "shortest"])
    def test_importance_decides_who_yields(self, order):
        rig = Rig(depth=2, num_blocks=8, order=order)
        rig.add(request("unimportant", [1] * 9, 22, priority=1, deadline=90.0))
        rig.add(request("important", [2] * 8, 22, deadline=10.0))
        rig.drain().check_outputs()
        assert rig.outputs["important"][-1].num_preemptions == 0
        assert rig.outputs["unimportant"][-1].num_preemptions > 0

    def test_resuming_finds_its_own_blocks_cached(self):
        rig = Rig(depth=2, num_blocks=9)
        rig.run(request("a", [1] * 8, 20), request("b", [2] * 8, 20)).check_outputs()
        resumed = [plan for plan in rig.plans for new in plan.new if new.request_id == "b"][1]
        start = resumed.starts[resumed.slots.index(next(n.slot for n in resumed.new if n.request_id == "b"))]
        assert start > 0
        assert rig.outputs["b"][0].num_cached_tokens == 0, "what counts is the first admission"

    def test_prompt_logprobs_are_not_sent_twice(self):
        rig = Rig(depth=2, num_blocks=8, max_num_batched_tokens=5)
        rig.add(request("a", [1] * 8, 22))
        rig.add(request("b", [2, 3] * 4, 20, params={"prompt_logprobs": 0, "logprobs": 0}))
        rig.drain().check_outputs()
        assert rig.outputs["b"][-1].num_preemptions > 0

    def test_no_eviction_never_preempts(self):
        rig = Rig(depth=2, num_blocks=12, admission="no_eviction")
        rig.run(*[request(f"r{i}", [i] * 6, 20) for i in range(8)]).check_outputs()
        assert rig.scheduler.stats().preemptions == 0
        assert max(len(plan.slots) for plan in rig.plans) == 1, "7 blocks each at worst: one at a time"

    def test_no_eviction_counts_shared_prefixes_once(self):
        rig = Rig(depth=2, num_blocks=12, admission="no_eviction")
        rig.run(*[request(f"r{i}", [1] * 16 + [i], 7) for i in range(4)]).check_outputs()
        assert max(len(plan.slots) for plan in rig.plans) == 4, "4 blocks shared, 2 each of their own"

    @pytest.mark.parametrize("batching", ["chunked", "prefill_first", "decode_first"])
    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_a_pool_for_two_and_a_long_queue(self, batching, depth):
        rig = Rig(batching=batching, depth=depth, num_blocks=16, max_num_seqs=8)
        rig.run(*[request(f"r{i}", [i % 3] * (i % 9 + 1), 10 + i % 20) for i in range(60)]).check_outputs()
        assert rig.scheduler.stats().preemptions > 0

    @pytest.mark.slow
    def test_a_pool_for_two_and_five_hundred(self):
        rig = Rig(depth=2, num_blocks=16, max_num_seqs=8)
        rig.run(*[request(f"r{i}", [i % 3] * (i % 9 + 1), 10 + i % 20) for i in range(500)]).check_outputs()
        assert rig.scheduler.stats().preemptions > 0


class TestCancellation:
    @pytest.mark.parametrize("stage", ["waiting", "mid-prefill", "decoding", "about to end"])
    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_in_every_state(self, stage, depth):
        rig = Rig(depth=depth, max_num_batched_tokens=12)
        rig.add(request("canary", [1] * 5, 40))
        warmed_up(rig, depth)
        rig.add(request("a", [2] * 20, 8))
        warmed_up(rig, 0 if stage == "waiting" else 1)
        known = {"decoding": 2, "about to end": 7}.get(stage, 0)
        while len(rig.tokens("a")) < known:
            rig.turn()
        output = rig.abort("a")
        assert output is not None
        assert output.finish is Finish.ABORT
        assert rig.abort("a") is None
        rig.drain().check_outputs()
        assert sum(output.finish is not None for output in rig.outputs["a"]) == 1
        assert rig.finish("canary") is Finish.LENGTH

    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_after_a_preemption(self, depth):
        rig = Rig(depth=depth, num_blocks=8)
        rig.add(request("a", [1] * 8, 20))
        rig.add(request("b", [2] * 8, 20))
        while rig.scheduler.stats().preemptions == 0:
            rig.turn()
        assert rig.abort("b") is not None
        rig.drain().check_outputs()
        assert rig.finish("a") is Finish.LENGTH

    def test_of_nobody(self):
        assert Rig().abort("nobody") is None

    @pytest.mark.parametrize("depth", [1, 3])
    def test_a_thousand_times_no_block_leaks(self, depth):
        rig = Rig(depth=depth, num_blocks=24, check_every=False)
        for i in range(1000):
            rig.add(request(f"r{i}", [i % 3] * (i % 13 + 1), 9, arrival=rig.now))
            for _ in range(i % 4):
                rig.turn()
            rig.abort(f"r{i - i % 3}")
        rig.drain().check_outputs()
        assert rig.pool.usage == 0


class TestFailure:
    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_one_request_fails_alone(self, depth):
        rig = Rig(depth=depth)
        rig.add(request("good", [1] * 5, 12))
        rig.add(request("bad", [2] * 9, 12))
        warmed_up(rig, 3)
        rig.executor.failing["bad"] = "its grammar raised"
        rig.drain().check_outputs()
        assert rig.outputs["bad"][-1].error == "its grammar raised"
        assert rig.finish("good") is Finish.LENGTH
        rig.run(request("again", [2] * 9, 1))
        assert rig.outputs["again"][0].num_cached_tokens == 0, "what it left in the cache is not trusted"

    def test_failing_in_the_middle_of_the_prompt(self):
        rig = Rig(depth=2, max_num_batched_tokens=4)
        rig.add(request("bad", [2] * 20, 12))
        rig.executor.failing["bad"] = ""
        rig.drain().check_outputs()
        assert (rig.finish("bad"), rig.outputs["bad"][-1].error) == (Finish.ERROR, "")

    def test_the_executor_fails_as_a_whole(self):
        rig = Rig(depth=2, max_num_seqs=2)
        for i in range(4):
            rig.add(request(f"r{i}", [1] * 9, 12))
        warmed_up(rig, 4)
        outputs = rig.fail_all("out of memory")
        assert {output.request_id for output in outputs} == {"r0", "r1", "r2", "r3"}
        assert all((output.finish, output.error) == (Finish.ERROR, "out of memory") for output in outputs)
        assert not rig.scheduler.has_work
        assert rig.pool.usage == 0
        rig.run(request("after", [1] * 9, 3)).check_outputs()
        assert rig.outputs["after"][0].num_cached_tokens == 0

    def test_a_result_of_another_step_is_a_fault(self):
        rig = Rig()
        with pytest.raises(EngineFault, match="does not belong to the oldest step"):
            rig.scheduler.apply(StepResult(1, []), 0.0)
        rig.add(request("a", [1], 3))
        rig.plan()
        for wrong in (StepResult(2, [[1]]), StepResult(1, []), StepResult(1, [[1], [1]])):
            with pytest.raises(EngineFault, match="does not belong"):
                rig.scheduler.apply(wrong, 0.0)
        rig.drain().check_outputs()

    @pytest.mark.parametrize(
        ("tokens", "error"), [([], "brought no token"), ([1, 2], "brought 2 tokens at once")]
    )
    def test_a_wrong_number_of_tokens_fails_the_request_only(self, tokens, error):
        rig = Rig(depth=2)
        rig.add(request("a", [1], 5))
        rig.plan()
        rig.plan()
        rig.executor.result()
        (output,) = rig.take(rig.scheduler.apply(StepResult(1, [tokens]), 0.0))
        assert output.finish is Finish.ERROR
        assert error in (output.error or "")
        rig.drain()

    def test_a_second_request_of_the_same_name_is_refused(self):
        rig = Rig()
        rig.add(request("a", [1], 5))
        with pytest.raises(InvalidRequest, match="'a' is already here"):
            rig.scheduler.add(request("a", [1], 5))
        rig.drain().check_outputs()

    def test_a_refused_request_leaves_no_trace(self):
        rig = Rig(order="deadline")
        with pytest.raises(InvalidRequest):
            rig.scheduler.add(request("a", [1], 5, deadline=float("nan")))
        assert not rig.scheduler.has_work
        assert rig.abort("a") is None


class TestSeveralTokensAStep:
    @pytest.mark.parametrize("burst", [2, 3, 9])
    @pytest.mark.parametrize("budget", [1, 2, 16])
    def test_they_are_the_same_tokens(self, burst, budget):
        rig = Rig(depth=1, burst=burst, max_num_batched_tokens=budget, num_blocks=24)
        stop = frozenset({alone(request("s", [3], 20, seed=5))[0][6]})
        rig.run(
            *[request(f"r{i}", [i] * (i + 1), 13) for i in range(3)],
            request("s", [3], 20, seed=5, stop_ids=stop),
        ).check_outputs()

    def test_they_may_need_several_blocks_each(self):
        rig = Rig(depth=1, burst=12, num_blocks=10, max_model_len=40, prefix_caching=False)
        rig.run(*[request(f"r{i}", [i] * 4, 36) for i in range(2)]).check_outputs()
        assert rig.scheduler.stats().preemptions > 0, (
            "two blocks are left for two sequences, but each needs three"
        )


class TestHowItStands:
    def test_stats(self):
        rig = Rig(depth=2, max_num_seqs=2, num_blocks=32)
        for i in range(3):
            rig.add(request(f"r{i}", [i] * 5, 4))
        rig.plan()
        stats = rig.scheduler.stats()
        assert (stats.running, stats.waiting, stats.steps_in_flight, stats.step_tokens) == (2, 1, 1, 10)
        assert stats.kv_usage == pytest.approx(4 / 32)
        rig.drain()
        stats = rig.scheduler.stats()
        assert (stats.running, stats.waiting, stats.steps_in_flight, stats.kv_usage) == (0, 0, 0, 0)
        assert (stats.prompt_tokens, stats.generation_tokens, stats.preemptions) == (15, 12, 0)

    def test_audit_finds_a_request_on_no_list(self):
        rig = Rig(depth=1)
        rig.add(request("a", [1], 5))
        rig.scheduler._entrance.waiting.pop()
        with pytest.raises(AssertionError, match="1 requests live, but 0 run and 0 wait"):
            rig.scheduler.audit()

    def test_audit_finds_blocks_held_for_nobody(self):
        rig = Rig()
        rig.pool.release(rig.pool.allocate(1) or [], after=99)
        with pytest.raises(AssertionError, match=r"nobody lives, but 1\.6% of the blocks are held"):
            rig.scheduler.audit()
