from typing import Any

from xllm.engine.health import GIVE_UP_AFTER_S, SILENT_AFTER_S, STALLED_AFTER_S, HealthMonitor

ALIVE: dict[str, Any] = {"silent_s": 0.1, "dead": None}


def test_an_idle_engine_is_healthy_however_long():
    monitor = HealthMonitor(0.0)
    assert monitor.observe(1000.0, progress=5, busy=False, **ALIVE).ok
    assert monitor.observe(9000.0, progress=5, busy=False, **ALIVE).ok


def test_a_long_step_that_advances_is_healthy():
    monitor = HealthMonitor(0.0)
    for t in range(100):
        assert monitor.observe(float(t), progress=t, busy=True, **ALIVE).ok


def test_work_without_progress_is_not_health_and_then_hopeless():
    monitor = HealthMonitor(0.0)
    monitor.observe(0.0, progress=7, busy=True, **ALIVE)
    assert monitor.observe(STALLED_AFTER_S - 0.1, progress=7, busy=True, **ALIVE).ok
    sick = monitor.observe(STALLED_AFTER_S + 0.1, progress=7, busy=True, **ALIVE)
    assert not sick.ok
    assert "no progress" in sick.reason
    assert not monitor.hopeless
    monitor.observe(GIVE_UP_AFTER_S + 0.1, progress=7, busy=True, **ALIVE)
    assert monitor.hopeless


def test_progress_again_is_health_again():
    monitor = HealthMonitor(0.0)
    monitor.observe(0.0, progress=7, busy=True, **ALIVE)
    monitor.observe(50.0, progress=7, busy=True, **ALIVE)
    assert monitor.hopeless
    assert monitor.observe(51.0, progress=8, busy=True, **ALIVE).ok
    assert not monitor.hopeless


def test_silence_and_death_are_named():
    monitor = HealthMonitor(0.0)
    silent = monitor.observe(1.0, progress=1, busy=False, silent_s=SILENT_AFTER_S + 1, dead=None)
    assert not silent.ok
    assert "no sign of life" in silent.reason
    assert (
        monitor.observe(1.0, progress=1, busy=False, silent_s=0.0, dead="signal SIGKILL").reason
        == "signal SIGKILL"
    )


def test_unhealthy_within_ten_seconds_and_requests_fail_within_fifteen():
    """RELIABILITY 10 sets both bars; the watch adds half a second and the heartbeat a quarter."""
    assert max(SILENT_AFTER_S, STALLED_AFTER_S) + 1.0 < 10
    assert GIVE_UP_AFTER_S + 1.0 < 15
