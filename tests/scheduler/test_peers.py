"""Scheduling with KV that comes from other engines and goes to them: by hand, then whatever hypothesis thinks of."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from tests.scheduler.peer_rig import PEER, PeerRig
from tests.scheduler.rig import request
from tests.scheduler.test_random_loads import MODEL_LEN, Load, arrivals, bursts, limits, names
from tests.state_machines import explore
from xllm.core.errors import InvalidRequest
from xllm.core.output import Finish
from xllm.core.peers import Failure, Fetch, GiveUp

LONG = [1, 2, 3, 4] * 6  # 6 blocks


def rig(**changes):
    return PeerRig(num_blocks=32, max_num_batched_tokens=64, **changes)


def fetching(r, id="fetches", prompt=None, **fields):
    return r.add(request(id, prompt or [*LONG, 5], 2, kv_from=PEER, **fields))


def test_what_a_peer_has_is_not_computed():
    r = rig()
    one = fetching(r)
    assert r.plan() is None
    (order,) = r.fetches.values()
    assert (order.first, len(order.blocks), order.peer) == (0, 6, PEER)
    r.drain().check_outputs()
    assert (one.num_cached_tokens, one.fetched_tokens) == (24, 24)
    assert r.outputs["fetches"][0].fetched_tokens == 24
    assert r.scheduler.stats().peers.fetched_blocks == 6


@pytest.mark.parametrize("prompt", [[*LONG, 5], LONG])
def test_the_first_token_comes_with_the_kv(prompt):
    """And no step is waited for; whole blocks are all fetched, for only the token is left to be computed."""
    r = rig()
    one = fetching(r, prompt=prompt)
    r.plan()
    while not r.fetched:
        r.work()
    r.hear()
    (first,) = r.outputs["fetches"]
    assert (len(first.token_ids), first.fetched_tokens, one.num_cached_tokens) == (1, 24, 24)
    assert first.queued_s >= 0.0
    assert first.prefill_s <= 0.01
    plan = r.plan()
    assert (plan.starts, plan.counts) == ([24], [len(prompt) + 1 - 24])
    r.apply()
    r.drain().check_outputs()


def test_a_first_token_may_be_the_last():
    r = rig()
    one = r.add(request("fetches", [*LONG, 5], 1, kv_from=PEER))
    r.plan()
    while not r.fetched:
        r.work()
    r.hear()
    assert one.id not in r.scheduler._requests
    assert r.outputs["fetches"][0].finish is Finish.LENGTH
    assert r.plan() is None
    r.drain().check_outputs()


@pytest.mark.parametrize("asked", [{"logprobs": 1}, {"prompt_logprobs": 1}])
def test_who_wants_to_know_more_of_a_token_samples_it_here(asked):
    r = rig()
    fetching(r, params=asked)
    r.plan()
    assert [order.opening for order in r.fetches.values()] in ([None], [])
    r.drain().check_outputs()


def test_no_token_is_taken_with_kv_that_did_not_come():
    r = rig()
    fetching(r)
    r.plan()
    r.fails = lambda: True
    r.drain().check_outputs()
    assert len(r.outputs["fetches"]) == 2


@pytest.mark.parametrize("prompt", [LONG, [*LONG, 5, 6], [*LONG, 5, 6, 7]])
@pytest.mark.parametrize("chunk", [4, 7, 64])
def test_a_peer_is_told_the_first_token(prompt, chunk):
    r = rig(long_prefill_token_threshold=chunk)
    for id in ("computed", "cached"):
        r.provide(id, prompt, 0, opening=True)
        serve(r, id)
        assert r.ended[id] == (6, None)
        assert id in r.first
    r.drain()


def test_only_what_is_missing_is_fetched():
    r = rig()
    r.run(request("before", LONG[:10], 2))
    fetching(r)
    assert r.plan() is None
    assert [(order.first, len(order.blocks)) for order in r.fetches.values()] == [(2, 4)]
    r.drain().check_outputs()


def test_what_lies_in_a_lower_tier_is_not_asked_of_a_peer():
    r = rig(host_slots=64)
    r.run(request("before", LONG, 2))
    r.pool.reset_cache()
    r.offload.cost.choose = lambda ways, block_size: 0 if ways else -1
    one = fetching(r, prompt=[*LONG, 5, 6, 7, 8, 9])
    r.drain().check_outputs()
    assert (one.num_cached_tokens, one.fetched_tokens) == (28, 4)
    assert r.offload.stats[0].hits == 6


def test_what_came_from_a_peer_goes_to_lower_tiers_too():
    r = rig(host_slots=64)
    fetching(r)
    r.drain()
    assert r.offload.host.stored >= 6


def test_others_run_while_one_waits_for_a_peer():
    r = rig()
    fetching(r)
    r.add(request("runs", [9] * 5, 2))
    assert [new.request_id for new in r.plan().new] == ["runs"]
    assert (r.scheduler.num_running, r.scheduler.num_waiting) == (1, 1)
    r.apply()
    r.drain().check_outputs()


def test_what_came_before_the_failure_counts():
    r = rig()
    one = fetching(r)
    r.plan()
    for _ in range(3):
        r.work()
    r.fails = lambda: True
    r.drain().check_outputs()
    assert (one.num_cached_tokens, one.fetched_tokens) == (12, 12)
    assert r.scheduler.stats().peers.failures == {Failure.CHECKSUM: 1}


def test_a_request_asks_a_peer_once():
    r = rig()
    r.fails = lambda: True
    fetching(r)
    r.drain().check_outputs()
    assert r.scheduler.stats().peers.fetches == 1


def test_an_aborted_fetch_keeps_its_blocks_until_nobody_writes_there():
    r = rig()
    fetching(r)
    r.plan()
    ticket, order = next(iter(r.fetches.items()))
    assert r.abort("fetches").finish is Finish.ABORT
    assert not r.scheduler.has_work
    assert r.scheduler.peers.busy
    assert r.scheduler.peers.orders() == [GiveUp(ticket)]
    assert not any(r.pool.is_available(block) for block in order.blocks)
    r.end_fetch(ticket, Failure.GIVEN_UP)
    r.hear()
    assert r.pool.usage == 0


def test_what_is_on_its_way_as_the_cache_is_forgotten_serves_nobody():
    r = rig()
    one = fetching(r)
    r.plan()
    for _ in range(4):
        r.work()
    r.scheduler.reset_prefix_cache()
    r.drain().check_outputs()
    assert (one.num_cached_tokens, one.fetched_tokens) == (0, 0)


def test_without_a_prefix_cache_nothing_is_fetched():
    r = rig(prefix_caching=False)
    fetching(r)
    assert r.plan() is not None
    r.drain().check_outputs()


# providing


def serve(r, id="asked", upto=None):
    """The peer takes what is offered, up to `upto` blocks."""
    r.patient = True
    for _ in range(200):
        if id in r.ended:
            return
        r.turn()
        r.look()
        ready = len(r.offered[id])
        r.scheduler.provisions.taken(id, ready if upto is None else min(ready, upto))
        r.provider_turn()
        if upto is not None and ready >= upto:
            return


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("chunk", [4, 7, 64])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_what_is_asked_for_is_computed_and_offered_as_it_comes(chunk, depth, caching):
    r = rig(depth=depth, long_prefill_token_threshold=chunk, prefix_caching=caching)
    r.provide("asked", LONG, 1)
    serve(r)
    assert r.ended["asked"] == (5, None)
    assert r.scheduler.stats().peers.provided_blocks == 5
    r.drain()


def test_what_is_cached_is_offered_at_once():
    r = rig()
    r.run(request("before", LONG, 2))
    r.provide("asked", LONG, 0)
    assert len(r.offered["asked"]) == 6
    assert not r.computing
    r.look()
    r.scheduler.provisions.taken("asked", 6)
    r.provider_turn()
    assert r.ended["asked"] == (6, None)
    r.drain()


def test_what_is_cached_is_offered_once_the_step_that_writes_it_has_run():
    r = rig()
    r.add(request("computes", LONG, 2))
    r.plan()
    r.provide("asked", LONG, 0, compute=False)
    assert r.offered["asked"] == []
    r.apply()
    assert len(r.offered["asked"]) == 6
    r.drain()


def test_what_a_failed_request_computed_is_not_offered():
    r = rig()
    r.add(request("poisoned", LONG, 2))
    r.executor.failing["poisoned"] = "its sampler raised"
    r.plan()
    r.provide("asked", LONG, 0, compute=False)
    r.apply()
    assert r.offered["asked"] == []
    assert r.ended["asked"][1] is not None
    r.drain()


def test_who_is_only_asked_for_what_is_there_computes_nothing():
    r = rig()
    r.provide("nothing", LONG, 0, compute=False)
    assert r.ended["nothing"] == (0, None)
    r.run(request("before", LONG[:9], 2))
    r.provide("some", LONG, 0, compute=False)
    assert len(r.offered["some"]) == 2
    r.drain()


def in_host_memory(r):
    """LONG, and nothing of it on the device."""
    r.run(request("before", LONG, 2))
    r.scheduler.forget_device()
    r.offload.cost.choose = lambda ways, block_size: 0 if ways else -1


def test_what_lies_in_a_lower_tier_comes_up_for_a_peer():
    r = rig(host_slots=64)
    in_host_memory(r)
    r.provide("asked", LONG, 2, compute=False)
    assert r.offered["asked"] == []
    serve(r)
    assert r.ended["asked"] == (4, None)
    assert r.offload.stats[0].hits == 6
    r.drain()


def test_a_peer_gets_less_where_less_came_up():
    r = rig(host_slots=64)
    in_host_memory(r)
    r.provide("asked", LONG, 0, compute=False)
    ((_, load),) = r.scheduler.lower._fetches.items()
    load.trusted = False
    serve(r)
    assert r.ended["asked"] == (0, None)
    r.drain()


def test_a_peer_that_goes_does_not_wait_for_what_comes_up():
    r = rig(host_slots=64)
    in_host_memory(r)
    r.provide("asked", LONG, 0, compute=False)
    r.scheduler.provisions.end("asked", "it is gone")
    r.provider_turn()
    assert r.ended["asked"] == (0, "it is gone")
    r.drain()
    r.add(request("after", [*LONG, 5], 2))
    r.plan()
    assert r.added["after"].num_cached_tokens == 24, "it has come for whoever wants it"
    r.drain().check_outputs()


def test_a_peer_that_goes_leaves_nothing():
    r = rig(long_prefill_token_threshold=4)
    r.provide("asked", LONG, 0)
    serve(r, upto=2)
    assert r.pool.usage > 0
    r.scheduler.provisions.end("asked", "it is gone")
    r.provider_turn()
    assert not r.computing
    r.drain()


def test_blocks_stay_while_their_checksums_are_made():
    r = rig()
    r.run(request("before", LONG, 2))
    r.provide("asked", LONG, 0)
    r.scheduler.provisions.end("asked", "it is gone")
    r.provider_turn()
    assert not any(r.pool.is_available(block) for block in r.offered["asked"])
    r.look()
    assert r.pool.usage == 0


def test_a_crash_ends_what_is_provided_and_what_is_fetched():
    r = rig()
    r.provide("asked", [9, *LONG], 0)
    fetching(r)
    r.plan()
    r.fail_all()
    assert r.ended["asked"][1] is not None
    r.drain().check_outputs()


def test_what_can_never_be_computed_here_is_refused():
    r = rig()
    with pytest.raises(InvalidRequest):
        r.provide("asked", [1] * 64, 0)
    assert not r.scheduler.provisions
    r.drain()


def test_a_fetch_names_salt_priority_and_deadline():
    r = rig()
    fetching(r, priority=3, cache_salt="tenant", deadline=5.0)
    r.plan()
    (order,) = r.fetches.values()
    assert isinstance(order, Fetch)
    assert (order.priority, order.cache_salt) == (3, "tenant")
    assert order.deadline_s == pytest.approx(5.0 - r.now)
    r.drain()


class PeerLoad(Load):
    """Requests that fetch and peers that ask, with what goes wrong between them."""

    rig: PeerRig

    @initialize(
        limits=limits, names=names, burst=bursts, scarce=st.booleans(), host=st.sampled_from([0, 0, 5, 20]),
        recorded=st.booleans(), trouble=st.sampled_from([0, 0, 3, 7]), samples=st.booleans(), pool=st.sampled_from(["", "", "elastic", "ranges"]),
    )  # fmt: skip
    def start(self, limits, names, burst, scarce, host, recorded, trouble, samples, pool):
        limits["num_blocks"] = 14 + limits["num_blocks"] % 8
        if limits["prefix_caching"]:
            limits["host_slots"] = host
        if pool == "elastic":
            limits["blocks_per_segment"] = 3
        elif pool == "ranges":
            limits["spare_ranges"] = 2
        if names["admission"] == "no_eviction":  # what peers hold is promised to nobody
            names |= {"admission": "optimistic"}
        self.scarce = scarce
        if not limits["chunked_prefill"]:
            limits |= {"max_num_batched_tokens": MODEL_LEN, "long_prefill_token_threshold": 0}
        if burst > 1:
            limits["depth"] = 1
        self.rig = PeerRig(max_model_len=MODEL_LEN, burst=burst, recorded=recorded, **limits, **names)
        self.rig.samples = samples
        asked = iter(range(1, 10**9))
        self.rig.fails = lambda: bool(trouble) and next(asked) % trouble == 0
        if (offload := self.rig.offload) is not None:
            offload.cost.choose = lambda ways, block_size: 0 if ways else -1  # type: ignore[method-assign]

    @rule(arrival=arrivals, more=st.integers(0, 12))
    def arrive_with_a_peer(self, arrival, more):
        prompt = arrival["prefix"] + [4] * more + arrival["suffix"] or [5]
        one = request(
            f"r{len(self.rig.added)}", prompt, arrival["max_tokens"], arrival=self.rig.now, kv_from=PEER,
            priority=arrival["priority"], cache_salt=arrival["salt"], seed=arrival["seed"], max_total_tokens=MODEL_LEN,
            params={"prompt_logprobs": arrival["prompt_logprobs"]},
        )  # fmt: skip
        self.rig.add(one)

    @rule(arrival=arrivals, more=st.integers(4, 12), first=st.integers(0, 3), compute=st.booleans(), opening=st.booleans())  # fmt: skip
    def a_peer_asks(self, arrival, more, first, compute, opening):
        prompt = [*arrival["prefix"], *[4] * more, *arrival["suffix"]]
        first = min(first, len(prompt) // 4 - 1)
        self.rig.provide(f"p{len(self.rig.asked)}", prompt, first, compute, arrival["salt"], opening)

    @rule(count=st.integers(1, 9))
    def blocks_come(self, count):
        for _ in range(count):
            self.rig.work()

    @precondition(lambda self: self.rig.fetched)
    @rule()
    def hear(self):
        self.rig.hear()

    @precondition(lambda self: self.rig.offers)
    @rule()
    def look(self):
        self.rig.look()

    @precondition(lambda self: self.rig.scheduler.provisions.waiting_for_peers)
    @rule(which=st.integers(0, 9), upto=st.integers(0, 12))
    def a_peer_takes(self, which, upto):
        ids = self.rig.scheduler.provisions.waiting_for_peers
        self.rig.scheduler.provisions.taken(ids[which % len(ids)], upto)
        self.rig.provider_turn()

    @precondition(lambda self: self.rig.offload and self.rig.offload.host.stored)
    @rule(which=st.integers(0, 9), first=st.integers(0, 2))
    def a_peer_asks_for_what_only_lower_tiers_remember(self, which, first):
        rig = self.rig
        if not rig.scheduler.num_running:
            rig.scheduler.forget_device()
        one = list(rig.added.values())[which % len(rig.added)]
        if whole := len(one.prompt_token_ids) // 4:
            prompt = list(one.prompt_token_ids)
            rig.provide(f"p{len(rig.asked)}", prompt, min(first, whole - 1), False, one.cache_salt)

    @precondition(lambda self: self.rig.asked)
    @rule(which=st.integers(0, 99))
    def a_peer_goes(self, which):
        self.rig.scheduler.provisions.end(f"p{which % len(self.rig.asked)}", "it is gone")
        self.rig.provider_turn()

    @invariant()
    def nobody_is_lost(self):
        if hasattr(self, "rig"):
            r = self.rig
            living = {id for id in r.added if r.finish(id) is None} | r.computing
            assert len(living) == r.scheduler.num_running + r.scheduler.num_waiting


def test_random_loads():
    explore(PeerLoad, examples=100, moves=40)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_random_loads_in_depth():
    explore(PeerLoad, examples=600, moves=80)
