import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.bench.metrics import Record, banner, is_good, percentile, summarise

FLOATS = st.floats(-1e6, 1e6)


@given(st.lists(FLOATS, min_size=1, max_size=50), st.floats(0, 100))
def test_percentiles_are_numpys(values, p):
    assert percentile(values, p) == pytest.approx(float(np.percentile(values, p)), rel=1e-9, abs=1e-9)


def test_percentile_of_nothing():
    assert percentile([], 99) == 0.0


def record(start: float, *arrivals: float, tokens: int | None = None) -> Record:
    return Record(
        start=start,
        arrivals=list(arrivals),
        end=arrivals[-1],
        prompt_tokens=10,
        output_tokens=tokens or len(arrivals),
    )


def test_figures_of_one_request():
    r = record(1.0, 1.5, 1.6, 1.9)
    assert r.ttft == pytest.approx(0.5)
    assert r.latency == pytest.approx(0.9)
    assert r.tpot == pytest.approx(0.2)
    assert r.itls == pytest.approx([0.1, 0.3])
    assert record(1.0, 1.5).tpot is None
    assert record(0.0, 1.0, 2.0, tokens=5).tpot == pytest.approx(0.25)  # several tokens in a piece


def test_summary_is_what_numpy_says():
    rng = np.random.default_rng(0)
    records = [record(s, *(s + np.cumsum(rng.random(8)))) for s in rng.random(40)]
    records.append(Record(start=0.0, end=0.5, error="broken", prompt_tokens=99))
    result = summarise(records, 20.0, percentiles=[50, 99.9])
    good = records[:-1]
    assert (result["completed"], result["failed"]) == (40, 1)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (400, 320)
    assert result["request_throughput"] == 2.0
    assert result["output_throughput"] == 16.0
    assert result["total_token_throughput"] == 36.0
    assert result["request_goodput"] is None
    series = {
        "ttft": [r.ttft for r in good],
        "tpot": [r.tpot for r in good],
        "itl": [gap for r in good for gap in r.itls],
        "e2el": [r.latency for r in good],
    }
    for name, seconds in series.items():
        ms = np.array(seconds) * 1000
        assert result[f"mean_{name}_ms"] == pytest.approx(ms.mean())
        assert result[f"median_{name}_ms"] == pytest.approx(np.median(ms))
        assert result[f"std_{name}_ms"] == pytest.approx(ms.std())
        for p in (50, 99, 99.9):
            assert result[f"p{p}_{name}_ms"] == pytest.approx(np.percentile(ms, p))


def test_nothing_done_is_a_result_too():
    result = summarise([Record(start=0.0, end=1.0, error="x")], 1.0)
    assert (result["completed"], result["failed"], result["p99_ttft_ms"]) == (0, 1, 0.0)
    banner(result, ["ttft"], [99])


def test_peaks():
    result = summarise([record(0.0, 0.1, 0.2, 0.3), record(0.25, 2.0, 2.1), record(0.4, 0.5)], 3.0)
    assert result["max_concurrent_requests"] == 2
    assert result["max_output_tokens_per_s"] == 4.0


def test_one_after_the_other_is_never_two_at_once():
    assert summarise([record(0.0, 1.0), record(1.0, 2.0)], 2.0)["max_concurrent_requests"] == 1


def test_goodput_counts_what_keeps_every_target():
    fast, slow = record(0.0, 0.1, 0.2), record(0.0, 0.1, 0.9)
    assert is_good(fast, {"ttft": 100.0, "tpot": 101.0, "e2el": 201.0})
    assert not is_good(slow, {"tpot": 101.0})
    result = summarise([fast, slow], 2.0, goodput_ms={"tpot": 101.0})
    assert result["request_goodput"] == 0.5


def test_banner():
    result = summarise([record(0.0, 0.1, 0.2)], 2.0, percentiles=[50, 99]) | {
        "max_concurrency": 4,
        "request_rate": 2.5,
    }
    lines = banner(result, ["ttft", "tpot", "itl", "e2el"], [50, 99]).splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert lines[-1] == "=" * 50
    assert "Successful requests:                     1" in lines
    assert "Maximum request concurrency:             4" in lines
    assert "Request rate configured (RPS):           2.50" in lines
    assert "Output token throughput (tok/s):         1.00" in lines
    assert "---------------Time to First Token----------------" in lines
    assert "-----Time per Output Token (excl. 1st token)------" in lines
    assert "---------------Inter-token Latency----------------" in lines
    assert "----------------End-to-end Latency----------------" in lines
    assert "P99 TTFT (ms):                           100.00" in lines
    assert not any(line.startswith("Request goodput") for line in lines)
