"""POST /start_profile and /stop_profile: only where a directory was named, and only of a device that a trace shows."""

import pytest

from tests.server.live import serving
from xllm.core.errors import ConfigError
from xllm.server.options import ServerOptions


def test_a_trace_from_start_to_stop(tmp_path):
    options = ServerOptions(profiler_dir=str(tmp_path / "traces"))
    with serving(tmp_path, options, device="reference") as live:
        assert live.http.post("/start_profile").json() == {"profiling": True}
        again = live.http.post("/start_profile")
        assert again.status_code == 503
        assert "being taken already" in again.json()["error"]["message"]
        stopped = live.http.post("/stop_profile").json()
        assert stopped == {"profiling": False, "trace": f"{tmp_path}/traces/trace.json.gz"}


def test_without_the_flag_there_are_no_such_routes(live):
    assert live.http.post("/start_profile").status_code == 404
    assert live.http.post("/stop_profile").status_code == 404


def test_a_cpu_has_nothing_to_show(tmp_path):
    with (
        pytest.raises(ConfigError, match="on a CPU the operators are plain C"),
        serving(tmp_path, ServerOptions(profiler_dir=str(tmp_path))),
    ):
        pass
