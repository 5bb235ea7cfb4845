"""Replays against a client that answers at once or not at all, and a small one over real instances and router."""

import heapq
import importlib.util
import json
import time
from dataclasses import asdict

import pytest

from tests.bench.commands import bench
from xllm.bench import simulate, simulate_report
from xllm.bench.simulate_options import FETCH_US, SimulateOptions, TraceOptions
from xllm.bench.simulate_workers import spread
from xllm.bench.trace import TraceRequest, generate, write
from xllm.cluster.status import InstanceStatus
from xllm.core.errors import ConfigError, Overloaded
from xllm.core.output import Finish, SequenceOutput
from xllm.engine.modelled_runner import Lateness, answer
from xllm.wire.ledger import NO_STATS
from xllm.wire.messages import Outputs


class FakeClient:
    """Answers `after_s` after a request has come, in two pieces; `spoil` changes what it says."""

    def __init__(self, after_s=0.0, spoil=lambda n, tokens: tokens):
        self.after_s, self.spoil = after_s, spoil
        self.asked = []
        self._due = []

    def send(self, message):
        n = len(self.asked)
        self.asked.append((time.perf_counter(), message))
        tokens = self.spoil(n, answer(message.prompt_token_ids, message.params.max_tokens))
        if tokens is None:
            return
        half = len(tokens) // 2
        now = time.perf_counter()
        first = SequenceOutput(request_id=message.request_id, token_ids=tokens[:half], num_cached_tokens=3)
        last = SequenceOutput(
            request_id=message.request_id, token_ids=tokens[half:], finish=Finish.LENGTH, num_cached_tokens=3
        )
        heapq.heappush(self._due, (now + self.after_s / 2, 2 * n, first))
        heapq.heappush(self._due, (now + self.after_s, 2 * n + 1, last))

    def receive(self, timeout_s):
        if self._due and self._due[0][0] - time.perf_counter() <= timeout_s:
            at, _, output = heapq.heappop(self._due)
            time.sleep(max(0.0, at - time.perf_counter()))
            return Outputs(outputs=[output], stats=NO_STATS)
        time.sleep(timeout_s)
        return None

    def instances(self):
        zero = dict.fromkeys(("epoch", "requests", "running", "waiting"), 0)
        return [
            InstanceStatus(
                **zero, id=id, address="", role="both", state="serving", why="", kv_usage=0.0, cached_blocks=(0, 0, 0)
            )
            for id in "ab"
        ]  # fmt: skip

    def instances_of(self, request):
        return ["a"] if int(request) % 4 else ["b", "a"]


ROWS = [TraceRequest(n * 20.0, 20 + n, 8, (n,)) for n in range(10)]


def test_every_request_is_sent_at_its_time_and_its_answer_checked():
    client = FakeClient(0.01)
    done = simulate.replay(ROWS, client, 1.0, 5.0)
    assert [len(message.prompt_token_ids) for _, message in client.asked] == [20 + n for n in range(10)]
    for n, call in enumerate(done.calls):
        assert call.error is None
        assert call.sent - done.begin >= 0.02 * n
        assert call.first is not None
        assert call.end is not None
        assert call.sent <= call.first <= call.end
        assert (call.output, call.cached, call.instance, call.moves) == (8, 3, "a", int(n % 4 == 0))
    assert done.queues


def test_time_is_stretched():
    client = FakeClient(0.04)
    done = simulate.replay(ROWS[:3], client, 4.0, 5.0)
    assert client.asked[-1][0] - client.asked[0][0] >= 0.15
    result = simulate_report.summarise("p", done, ["a", "b"], [])
    assert 0.005 <= result["ttft_p50_s"] < 0.02
    assert result["seconds"] < 0.2


def test_gaps_are_between_tokens_of_an_answer():
    done = simulate.replay(ROWS[:3], FakeClient(0.04), 1.0, 5.0)
    assert [len(call.gaps) for call in done.calls] == [1, 1, 1]
    assert 0.01 < simulate_report.summarise("p", done, ["a", "b"], [])["itl_p50_s"] < 0.1


def test_a_turn_waits_for_the_answer_before():
    rows = [
        TraceRequest(0.0, 30, 6, (1,), "s"),
        TraceRequest(10.0, 60, 6, (1,), "s", 50.0),
        TraceRequest(20.0, 20, 6, (2,)),
    ]
    client = FakeClient(0.1)
    done = simulate.replay(rows, client, 1.0, 5.0)
    first, second, _ = done.calls
    assert first.end is not None
    assert second.sent >= first.end + 0.05
    # and its prompt holds it
    prompt = client.asked[0][1].prompt_token_ids
    assert client.asked[2][1].prompt_token_ids[:36] == prompt + answer(prompt, 6)


def test_wrong_answers_refusals_and_silence_are_failures():
    def spoil(n, tokens):
        if n == 1:
            return [*tokens[:-1], tokens[-1] + 1]
        if n == 2:
            raise Overloaded("all instances are full", retry_after_s=1)
        return None if n == 3 else tokens

    done = simulate.replay(ROWS[:5], FakeClient(0.01, spoil), 1.0, 0.3)
    assert [call.error for call in done.calls] == [
        None, "the answer is wrong", "all instances are full", "nothing was heard any more", None
    ]  # fmt: skip
    result = simulate_report.summarise("p", done, ["a", "b"], [])
    assert result["failed"] == 3
    assert sum(result["errors"].values()) == 3


def test_a_host_that_is_too_slow_is_told():
    done = simulate.replay(ROWS[:2], FakeClient(0.01), 1.0, 5.0)
    good, bad = Lateness(busy_s=1.0), Lateness(busy_s=1.0, bubble_s=0.3)
    good.seen(0.001)
    bad.seen(0.5)
    for lateness, kept_up in (good, True), (bad, False):
        result = simulate_report.summarise("p", done, ["a", "b"], [asdict(lateness)])
        assert result["host"]["kept_up"] is kept_up
        assert ("DID NOT KEEP UP" in simulate_report.line(result)) is not kept_up


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="num-blocks"):
        simulate.fitting([TraceRequest(0, 1000, 30)], SimulateOptions(num_blocks=60))
    rows = simulate.fitting([TraceRequest(0, 10, 0)], SimulateOptions())
    assert rows[0].output_length == 1
    with pytest.raises(ConfigError, match="round_robin"):
        SimulateOptions(policies="nearest")
    with pytest.raises(ConfigError, match="--instances"):
        SimulateOptions(instances=0)
    with pytest.raises(ConfigError, match="--prefill"):
        SimulateOptions(instances=2, prefill=2)
    with pytest.raises(ConfigError, match="--fetch-us"):
        SimulateOptions(fetch_us=-1.0)


def test_each_role_has_processes_of_its_own():
    assert spread(SimulateOptions(instances=5, workers=2)) == [("both", 3), ("both", 2)]
    assert spread(SimulateOptions(instances=4, prefill=1, workers=1)) == [("prefill", 1), ("decode", 3)]
    assert spread(SimulateOptions(instances=8, prefill=4, workers=4)) == [
        ("prefill", 2), ("prefill", 2), ("decode", 2), ("decode", 2)
    ]  # fmt: skip
    assert SimulateOptions(instances=2).moved_us is None
    assert SimulateOptions(instances=2, prefill=1).moved_us == FETCH_US
    assert SimulateOptions(instances=2, fetch_us=3.0).moved_us == 3.0


def test_prompts_may_be_computed_by_some_for_the_others():
    """Streams go on beside long prompts, where those are computed elsewhere."""
    streams = [TraceRequest(0.0, 20, 60, (n,)) for n in range(3)]
    long = [TraceRequest(200.0 * n, 1500, 2, tuple(range(1000 * n, 1000 * n + 3))) for n in range(1, 4)]
    options = SimulateOptions(
        instances=2, prefill=1, fetch_us=5.0, base_ms=10.0, token_us=200.0, context_ns=0.0, plots=False
    )
    done, answering, lateness = simulate.play("prefix_aware", [*streams, *long], options)
    assert [call.error for call in done.calls] == [None] * 6
    assert len(answering) == 1
    assert {call.instance for call in done.calls} == set(answering)
    assert all(call.fetched >= 1400 for call in done.calls[3:])
    result = simulate_report.summarise("prefix_aware", done, answering, lateness)
    assert result["fetched"] > 0.9
    assert result["hit_rate"] == 0


def test_without_matplotlib_a_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pyxllm\\[bench\\]"):
        simulate_report.check(SimulateOptions())
    simulate_report.check(SimulateOptions(plots=False))


@pytest.mark.parametrize("plots", [True, False])
def test_the_command(tmp_path, capsys, plots):
    if plots:
        pytest.importorskip("matplotlib")
    trace, out = tmp_path / "t.jsonl", tmp_path / "out"
    rows = [row for row in generate(TraceOptions(requests=60, rate=60, max_output=30)) if row.delay is None][
        :16
    ]
    write(trace, rows)
    code = bench(
        "simulate", str(trace), "--instances", "3", "--policies", "prefix_aware,round_robin", "--base-ms", "4",
        "--out", str(out), "--plots" if plots else "--no-plots",
    )  # fmt: skip
    assert code == 0
    result = json.loads((out / "result.json").read_text())
    assert [one["policy"] for one in result["policies"]] == ["prefix_aware", "round_robin"]
    for one in result["policies"]:
        assert one["requests"] == len(rows)
        assert one["failed"] == 0
        assert len(one["work"]) == 3
        assert one["host"]["steps"] > 0
        assert 0 < one["ttft_p50_s"] < 60
    page = (out / "report.md").read_text()
    assert "round_robin" in page
    assert ("ttft.svg" in page) is plots
    assert (out / "ttft.svg").exists() is plots
    assert capsys.readouterr().out.count("TTFT p50") == 2
