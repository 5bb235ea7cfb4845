import dataclasses
import json
from typing import Any

import pytest

from tests.bench.commands import bench
from tests.bench.fake_api import FakeApi
from xllm.bench.options import DatasetOptions, ServeBenchOptions
from xllm.bench.serve import DETAILS, measure, parse_goodput, run
from xllm.core.errors import ConfigError, XllmError

DATA = DatasetOptions(num_prompts=12, random_input_len=8, random_output_len=4)
KEYS = {
    "duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput",
    "request_goodput", "output_throughput", "total_token_throughput",
} | {f"{stat}_{name}_ms" for stat in ("mean", "median", "std", "p99") for name in ("ttft", "tpot", "itl", "e2el")}  # fmt: skip


def options(api: FakeApi, **changes: Any) -> ServeBenchOptions:
    return ServeBenchOptions(base_url=api.url, disable_tqdm=True, **changes)


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
async def test_counts_and_keys(api, backend):
    result = await measure(options(api, backend=backend, metric_percentiles="50,99"), DATA)
    assert result.keys() >= KEYS | {"p50_ttft_ms"} | set(DETAILS)
    assert (result["completed"], result["failed"], result["error_counts"]) == (12, 0, {})
    assert result["total_input_tokens"] == 12 * 7  # the server's count wins over ours
    assert result["total_output_tokens"] == 12 * 4
    assert result["model_id"] == "toy"
    assert len(api.bodies) == 12
    assert 0 < result["mean_ttft_ms"] < result["mean_e2el_ms"]
    assert result["output_throughput"] == pytest.approx(48 / result["duration"])
    assert result["request_goodput"] is None


async def test_concurrency_is_limited(api):
    await measure(options(api, max_concurrency=3), DATA)
    assert api.peak == 3


async def test_a_rate_spreads_requests_over_time(api):
    result = await measure(options(api, request_rate=100.0, burstiness=50.0), DATA)
    assert result["duration"] > 11 / 100 * 0.6
    assert api.peak < 12


async def test_warm_ups_are_not_counted(api):
    result = await measure(options(api, num_warmups=5), DATA)
    assert result["completed"] == 12
    assert len(api.bodies) == 17


async def test_flags_reach_the_request(api):
    await measure(options(api, ignore_eos=True, temperature=0.7, model="other"), DATA)
    assert all(b["ignore_eos"] and b["temperature"] == 0.7 and b["model"] == "other" for b in api.bodies)


async def test_the_key_goes_into_a_header(api, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    result = await measure(options(api), DATA)
    assert api.headers[0]["authorization"] == "Bearer secret"
    assert "secret" not in json.dumps(result)


async def test_some_hang_up_in_the_middle():
    data = dataclasses.replace(DATA, num_prompts=40, random_output_len=20)
    with FakeApi(delay_s=0.01) as api:
        result = await measure(options(api, cancel_share=0.5), data)
        again = await measure(options(api, cancel_share=0.5), data)
    assert 8 < result["cancelled"] < 32
    assert result["cancelled"] == again["cancelled"], "the seed decides who hangs up"
    assert (result["completed"], result["failed"]) == (40 - result["cancelled"], 0)
    assert result["total_output_tokens"] == 20 * result["completed"]


async def test_the_server_takes_a_trace_of_the_run_alone(api, capsys):
    api.traces = True
    await measure(options(api, profile=True, num_warmups=2), DATA)
    assert api.profiles == [("/start_profile", 2), ("/stop_profile", 14)], "the warm-ups are not in it"
    assert "trace written by the server to /there/trace.json.gz" in capsys.readouterr().out


async def test_a_server_without_traces_is_told_of_before_the_load(api):
    with pytest.raises(XllmError, match="start it with --profiler-dir"):
        await measure(options(api, profile=True), DATA)
    assert not api.bodies


async def test_nobody_hangs_up_unasked(api):
    assert (await measure(options(api), DATA))["cancelled"] == 0


async def test_a_trace_sets_its_own_times(api, tmp_path):
    path = tmp_path / "trace.jsonl"
    lines = [{"timestamp": t, "input_length": 5, "output_length": 2} for t in (0, 50, 200)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    result = await measure(options(api), DatasetOptions(dataset_name="timed_trace", dataset_path=str(path)))
    assert result["completed"] == 3
    assert result["duration"] > 0.2


async def test_failures_are_counted_and_named():
    with FakeApi("http_error") as api:
        result = await measure(options(api), DATA)
    assert (result["completed"], result["failed"]) == (0, 12)
    assert result["error_counts"] == {"HTTP 429: too busy": 12}


async def test_a_tokenizer_gives_token_ids(api, tokenizer_json):
    await measure(options(api, tokenizer=str(tokenizer_json)), DATA)
    assert all(len(b["prompt"]) == 8 and all(isinstance(t, int) for t in b["prompt"]) for b in api.bodies)


def test_run_prints_the_banner_and_saves(api, tmp_path, capsys):
    asked = options(
        api, goodput=("ttft:60000",), save_result=True, result_dir=str(tmp_path / "new"), max_concurrency=2
    )
    assert run(asked, DATA) == 0
    printed = capsys.readouterr().out
    assert "Serving Benchmark Result" in printed
    assert "End-to-end Latency" not in printed  # not among the metrics printed by default
    (path,) = (tmp_path / "new").iterdir()
    assert path.name.startswith("openai-infqps-concurrency2-toy-")
    saved = json.loads(path.read_text())
    assert saved.keys() >= KEYS
    assert not saved.keys() & set(DETAILS)
    assert saved["request_goodput"] == saved["request_throughput"]


def test_from_the_command_line(api, capsys):
    flags = [
        "--disable-tqdm",
        "--num-prompts",
        "3",
        "--random-output-len",
        "2",
        "--metric-percentiles",
        "50,90",
    ]
    assert bench("serve", "--base-url", api.url, "--percentile-metrics", "e2el", *flags) == 0
    printed = capsys.readouterr().out
    assert "P90 E2EL (ms):" in printed
    assert "TTFT" not in printed


def test_run_saves_details_under_a_name(api, tmp_path, capsys):
    run(options(api, save_detailed=True, result_dir=str(tmp_path), result_filename="r.json"), DATA)
    saved = json.loads((tmp_path / "r.json").read_text())
    assert len(saved["ttfts"]) == 12
    assert saved["generated_texts"] == ["t0 t1 t2 t3 "] * 12


def test_run_fails_when_nothing_succeeded(capsys):
    with FakeApi("cut") as api:
        assert run(options(api), DATA) == 1
    assert "12 failed: the server closed the connection" in capsys.readouterr().out


async def test_without_a_model_list_the_name_must_be_given():
    with FakeApi(models=False) as api:
        with pytest.raises(ConfigError, match="name one with --model"):
            await measure(options(api), DATA)
        assert (await measure(options(api, model="toy"), DATA))["completed"] == 12


async def test_no_server_is_one_sentence():
    with pytest.raises(XllmError, match="cannot connect"):
        await measure(ServeBenchOptions(host="127.0.0.1", port=1), DATA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"goodput": ("ttft=5",)}, "write METRIC:MILLISECONDS"),
        ({"goodput": ("itl:5",)}, "the metrics are ttft, tpot and e2el"),
        ({"goodput": ("ttft:-1",)}, "at least 0"),
        ({"percentile_metrics": "ttft,foo"}, "foo unknown"),
        ({"metric_percentiles": "abc"}, "write numbers"),
        ({"metric_percentiles": "101"}, "between 0 and 100"),
        ({"request_rate": 0.0}, "must be positive"),
        ({"cancel_share": 1.5}, "between 0 and 1"),
        ({"base_url": "nowhere"}, "not an http"),
    ],
)
async def test_wrong_options_are_refused(api, change, message):
    asked = dataclasses.replace(options(api), **change)
    with pytest.raises(ConfigError, match=message):
        await measure(asked, DATA)


def test_goodput_targets():
    assert parse_goodput(["ttft:500", "tpot:50.5", "e2el:1e3"]) == {
        "ttft": 500.0,
        "tpot": 50.5,
        "e2el": 1000.0,
    }
    assert parse_goodput(None) is None
