import json

import pytest

from tests.bench.commands import bench
from tests.checkpoints import save_qwen3
from xllm.bench.options import StartupOptions
from xllm.bench.startup import measure_parts, report, run
from xllm.config.options import EngineOptions
from xllm.core.errors import ConfigError, XllmError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_qwen3(tmp_path_factory.mktemp("model")))


def test_startup_of_a_real_server(model, tmp_path, capsys):
    path = tmp_path / "result.json"
    assert bench("startup", model, "--rounds", "1", "--dtype", "float32", "--output-json", str(path)) == 0
    result = json.loads(path.read_text())
    assert result["engine_flags"] == ["--dtype", "float32"]
    assert 0 < result["median_s"]["ready"] <= result["median_s"]["first token"]
    assert {"engine: import", "engine: weights", "front end: first token"} <= result["parts_s"].keys()
    assert "round 1 of 1" in capsys.readouterr().out


def test_what_does_not_start_says_why(tmp_path):
    with pytest.raises(XllmError, match="no directory"):
        run(EngineOptions(model=str(tmp_path / "nowhere")), StartupOptions(rounds=1))
    with pytest.raises(XllmError, match="the engine did not start"):
        measure_parts(str(tmp_path / "nowhere"), [], timeout_s=60)


def test_no_rounds():
    with pytest.raises(ConfigError, match="--rounds"):
        run(EngineOptions(), StartupOptions(rounds=0))


def test_report_has_a_line_per_part():
    text = report({"median_s": {"ready": 1.5, "first token": 2.0}, "parts_s": {"engine: import": 1.0}})
    assert len(text.splitlines()) == 6
    assert "first token" in text
