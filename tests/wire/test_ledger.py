from hypothesis import given
from hypothesis import strategies as st

from tests.wire.echoing import ask
from xllm.core.output import Finish, SequenceOutput
from xllm.wire.ledger import NO_STATS, OWNERS_ONLY, Ledger
from xllm.wire.messages import (
    Abort,
    FirstToken,
    FollowKv,
    KvChange,
    KvChanges,
    LimitKv,
    Offer,
    Outputs,
    Provide,
    Provided,
    Reply,
    ResetPrefixCache,
    Shutdown,
    Sleep,
    StartTrace,
    StopTrace,
    Submit,
    SubmitMany,
    Taken,
    ToEngine,
    WakeUp,
)

CLIENTS = st.integers(1, 3)
NAMES = st.sampled_from(["a", "1/a", "2/a", "a/1", ""])


@given(st.lists(st.tuples(st.sampled_from(["ask", "end", "news", "leave"]), CLIENTS, NAMES), max_size=60))
def test_every_client_hears_of_its_own_requests_and_of_nothing_else(steps):
    ledger = Ledger(max_requests=100)
    for client in (1, 2, 3):
        ledger.join(client)
    asked: dict[tuple[int, str], str] = {}  # outstanding, and what the engine calls them
    for what, client, name in steps:
        inner = asked.get((client, name))
        if what == "ask":
            inward, refused = ledger.inward(client, ask(name, [1]), owner=False)
            assert (inward is None) == (inner is not None) == (refused is not None)
            if isinstance(inward, Submit):
                assert inward.request_id not in asked.values()
                asked[client, name] = inward.request_id
        elif what == "leave":
            mine = {key: id for key, id in asked.items() if key[0] == client}
            abort = ledger.leave(client)
            assert sorted(mine.values()) == (list(abort.request_ids) if abort else [])
            asked = {key: id for key, id in asked.items() if key not in mine}
            ledger.join(client)
        else:
            finish = Finish.STOP if what == "end" else None
            output = SequenceOutput(request_id=inner or f"{client}/{name}", token_ids=[3], finish=finish)
            heard = list(ledger.outward(Outputs(outputs=[output], stats=NO_STATS)))
            if inner is not None:
                renamed = SequenceOutput(request_id=name, token_ids=[3], finish=finish)
                assert heard == [(client, Outputs(outputs=[renamed], stats=NO_STATS))]
                if what == "end":
                    del asked[client, name]
        for one in (1, 2, 3):
            assert ledger.outstanding(one) == sum(key[0] == one for key in asked)


def test_requests_that_come_together_go_on_together():
    ledger = Ledger(max_requests=2)
    ledger.join(1)
    inward, refused = ledger.inward(1, SubmitMany(requests=[ask(id, [1]) for id in "abc"]), owner=False)
    assert isinstance(inward, SubmitMany)
    assert [one.request_id for one in inward.requests] == ["1/a", "1/b"]
    assert isinstance(refused, Outputs)
    assert [output.request_id for output in refused.outputs] == ["c"]
    inward, _ = ledger.inward(1, Abort(request_ids=["b", "c"]), owner=False)
    assert inward == Abort(request_ids=["1/b"])


def test_replies_find_who_asked_and_nobody_who_has_left():
    ledger = Ledger(max_requests=2)
    inner = []
    for client in (1, 2):
        ledger.join(client)
        inward, _ = ledger.inward(client, ResetPrefixCache(call_id=5), owner=False)
        assert isinstance(inward, ResetPrefixCache)
        inner.append(inward.call_id)
    ledger.leave(1)
    assert list(ledger.outward(Reply(call_id=inner[0], value=True))) == []
    assert list(ledger.outward(Reply(call_id=inner[1], value=True))) == [(2, Reply(call_id=5, value=True))]
    assert list(ledger.outward(Reply(call_id=inner[1], value=True))) == []  # once


def test_what_concerns_the_whole_engine_is_for_owners():
    ledger = Ledger(max_requests=2)
    ledger.join(1)
    calls: list[ToEngine] = [
        Sleep(call_id=4), WakeUp(call_id=4), LimitKv(call_id=4, blocks=1), StartTrace(call_id=4), StopTrace(call_id=4, directory="/"),
    ]  # fmt: skip
    for call in calls:
        assert ledger.inward(1, call, owner=False) == (None, Reply(call_id=4, refused=OWNERS_ONLY))
        inward, answer = ledger.inward(1, call, owner=True)
        assert type(inward) is type(call)
        assert answer is None
    assert ledger.inward(1, Shutdown(), owner=False) == (None, None)
    assert ledger.inward(1, Shutdown(), owner=True) == (Shutdown(), None)


def test_what_is_cached_is_told_to_those_who_asked_and_after_they_have_heard():
    ledger = Ledger(max_requests=2)
    change = KvChanges(number=0, changes=[KvChange("cleared")])
    inner: list[int] = []
    for client in (1, 2, 3):
        ledger.join(client)
        inward, answer = ledger.inward(client, FollowKv(call_id=7), owner=False)
        assert isinstance(inward, FollowKv)
        assert answer is None
        inner.append(inward.call_id)
    assert list(ledger.outward(change)) == []  # the engine has answered nobody yet
    assert list(ledger.outward(Reply(call_id=inner[0], value={}))) == [(1, Reply(call_id=7, value={}))]
    assert list(ledger.outward(change)) == [(1, change)]
    list(ledger.outward(Reply(call_id=inner[1], refused="no")))
    assert list(ledger.outward(change)) == [(1, change)]
    ledger.leave(3)
    assert list(ledger.outward(Reply(call_id=inner[2], value={}))) == []
    ledger.leave(1)
    assert list(ledger.outward(change)) == []


def test_outstanding_requests_are_counted_over_all_clients():
    ledger = Ledger(max_requests=2)
    for client in (1, 2):
        ledger.join(client)
        ledger.inward(client, ask("a", [1]), owner=client == 1)
    assert ledger.total == 2
    end = SequenceOutput(request_id="1/a", token_ids=[3], finish=Finish.STOP)
    list(ledger.outward(Outputs(outputs=[end], stats=NO_STATS)))
    assert ledger.total == 1
    ledger.leave(2)
    assert ledger.total == 0


def provide(id):
    return Provide(request_id=id, prompt_token_ids=[1], first_block=0, block_size=1, fingerprint="")


def test_what_is_provided_belongs_to_who_asked_until_it_ends():
    ledger = Ledger(max_requests=2)
    for client in (1, 2):
        ledger.join(client)
        inward, answer = ledger.inward(client, provide("a"), owner=False)
        assert (inward, answer) == (provide(f"{client}/a"), None)
    assert ledger.inward(1, Taken("b", 1), owner=False) == (None, None)
    assert ledger.inward(1, Taken("a", 1), owner=False) == (Taken("1/a", 1), None)
    offer = Offer(request_id="2/a", descriptor=b"", first=0, blocks=[1], sums=[2], total=1)
    assert [client for client, _ in ledger.outward(offer)] == [2]
    assert list(ledger.outward(FirstToken("2/a", 5))) == [(2, FirstToken("a", 5))]
    assert list(ledger.outward(Provided("2/a", 1))) == [(2, Provided("a", 1))]
    assert list(ledger.outward(offer)) == []
    assert ledger.total == 1
    assert ledger.leave(1) == Abort(request_ids=["1/a"])
    assert list(ledger.outward(Provided("1/a", 0))) == []


def test_provisions_count_as_requests():
    ledger = Ledger(max_requests=1)
    ledger.join(1)
    ledger.inward(1, ask("a", [1]), owner=False)
    for id in ("a", "b"):
        inward, answer = ledger.inward(1, provide(id), owner=False)
        assert inward is None
        assert isinstance(answer, Provided)
        assert answer.error is not None
