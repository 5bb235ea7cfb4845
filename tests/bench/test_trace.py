"""Traces: the same from the same seed, of the shape that was asked for, and the same again out of a file."""

import itertools
import json
import random

import msgspec
import pytest

from tests.bench.commands import bench
from xllm.bench.datasets import load
from xllm.bench.options import DatasetOptions
from xllm.bench.simulate_options import ARRIVALS, KINDS, TraceOptions
from xllm.bench.trace import LogNormal, Prompts, TraceRequest, figures, generate, read, write
from xllm.bench.vocabulary import IdVocabulary
from xllm.core.errors import ConfigError


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_as_many_as_asked_for_in_order_at_about_the_rate(kind, arrivals):
    rows = generate(TraceOptions(kind=kind, arrivals=arrivals, requests=2000, rate=20, period=60, seed=3))
    assert len(rows) == 2000
    assert rows[0].timestamp == 0
    assert [r.timestamp for r in rows] == sorted(r.timestamp for r in rows)
    assert 0.5 * 100 < rows[-1].timestamp / 1000 < 2 * 100
    for row in rows:
        assert 1 <= row.input_length <= 12288
        assert 1 <= row.output_length <= 1024
        assert len(row.hash_ids) == -(-row.input_length // 512)


def test_the_seed_is_all_there_is():
    options = TraceOptions(requests=300)
    assert generate(options) == generate(options)
    assert generate(options) != generate(TraceOptions(requests=300, seed=1))


def test_medians_are_those_that_are_published():
    conversation = figures(generate(TraceOptions(requests=4000)))
    assert 800 < conversation["input_p50"] < 1300
    assert 110 < conversation["output_p50"] < 150
    code = figures(generate(TraceOptions(kind="code", requests=4000)))
    assert 1350 < code["input_p50"] < 1650
    assert 11 <= code["output_p50"] <= 15
    agents = figures(generate(TraceOptions(kind="agents", requests=4000)))
    assert 160 < agents["output_p50"] < 210


def test_gamma_arrivals_are_burstier():
    def gaps_vary(arrivals):
        rows = generate(TraceOptions(kind="code", arrivals=arrivals, requests=3000, burstiness=0.25))
        times = [r.timestamp for r in rows]
        gaps = [b - a for a, b in itertools.pairwise(times)]
        mean = sum(gaps) / len(gaps)
        return (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5 / mean

    assert 0.9 < gaps_vary("poisson") < 1.1
    assert 1.7 < gaps_vary("gamma") < 2.3
    assert gaps_vary("mmpp") > 1.1


def test_turns_repeat_their_session_and_systems_are_shared():
    rows = generate(TraceOptions(requests=2000, systems=3))
    sessions: dict[str, list[TraceRequest]] = {}
    for row in rows:
        assert row.session_id is not None
        sessions.setdefault(row.session_id, []).append(row)
    assert {row.hash_ids[0] for row in rows} == {0, 1, 2}
    assert any(len(turns) > 3 for turns in sessions.values())
    for turns in sessions.values():
        for before, after in itertools.pairwise(turns):
            assert after.delay is not None
            assert after.hash_ids[: len(before.hash_ids)] == before.hash_ids
            assert after.input_length >= min(before.input_length + before.output_length, 12288)
    assert all(row.session_id is None for row in generate(TraceOptions(kind="code", requests=50)))


def test_a_file_says_the_same(tmp_path):
    rows = generate(TraceOptions(requests=50))
    write(tmp_path / "t.jsonl", rows)
    assert [r.hash_ids for r in read(tmp_path / "t.jsonl")] == [list(r.hash_ids) for r in rows]
    assert read(tmp_path / "t.jsonl", 10)[-1].timestamp == rows[9].timestamp
    # as a data set of `bench serve` too
    options = DatasetOptions(
        dataset_name="timed_trace", dataset_path=str(tmp_path / "t.jsonl"), num_prompts=50
    )
    asks = load(options, IdVocabulary(1000), 0)
    assert [ask.prompt_tokens for ask in asks] == [row.input_length for row in rows]


def test_traces_of_others_are_read(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}\n\n'
        '{"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": [46], "more": 1}\n'
    )
    assert [row.timestamp for row in read(path)] == [0, 30535 - 27482]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no request"),
        ("{}\n", "line 1"),
        ('{"timestamp":0,"input_length":0,"output_length":1}\n', "one token"),
    ],
)
def test_files_that_are_no_traces(tmp_path, text, says):
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=says):
        read(tmp_path / "t.jsonl")
    with pytest.raises(ConfigError, match="cannot read"):
        read(tmp_path / "absent.jsonl")


def test_prompts_hold_what_was_answered():
    prompts = Prompts(range(10, 100), lambda prompt, count: [7] * count)
    first = prompts.of(TraceRequest(0, 600, 5, [1, 2], "s"), "a")
    other = prompts.of(TraceRequest(1, 700, 5, [1, 3]), "b")
    second = prompts.of(TraceRequest(2, 1100, 5, [1, 2, 4], "s", 10.0), "c")
    assert len(first) == 600
    assert other[:512] == first[:512]
    assert other[512:] != first[512:]
    assert second[:605] == first + [7] * 5
    assert len(second) == 1100
    prompts.forget("s")
    assert prompts.of(TraceRequest(2, 1100, 5, [1, 2, 4], "s", 10.0), "c")[600:605] != [7] * 5
    short = prompts.of(TraceRequest(3, 900, 5, [1], None), "d")
    assert len(short) == 900
    assert short[:512] == first[:512]


def test_a_log_normal_goes_through_its_quantiles():
    rng = random.Random(0)
    drawn = sorted(LogNormal.through(886, 8310).draw(rng) for _ in range(20_000))
    assert 830 < drawn[10_000] < 940
    assert 7500 < drawn[18_000] < 9100


def test_what_makes_no_sense_is_refused():
    for name, value in ("rate", 0), ("system_tokens", 100), ("max_input", 512), ("requests", -1):
        with pytest.raises(ConfigError):
            msgspec.convert({name: value}, TraceOptions)


def test_the_command(tmp_path, capsys):
    out = tmp_path / "t.jsonl"
    assert bench("trace", "--requests", "20", "--seed", "5", "--out", str(out)) == 0
    said = capsys.readouterr().out
    assert json.loads(said[said.index("{") :])["requests"] == 20
    assert read(out)[-1].input_length == generate(TraceOptions(requests=20, seed=5))[-1].input_length
