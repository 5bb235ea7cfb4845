import psutil
import pytest

from xllm.core.errors import ConfigError
from xllm.device import facts


def test_the_cpu_is_measured():
    found = facts.measure("auto")
    assert found.name == "cpu"
    assert 1 <= found.cores <= (psutil.cpu_count() or 1)
    assert 0 < found.free_bytes <= found.total_bytes
    assert f"{found.cores} core" in found.description


def test_an_unknown_device_lists_the_known_ones():
    with pytest.raises(ConfigError, match="known: cpu"):
        facts.measure("abacus")


@pytest.mark.parametrize(
    ("limit", "current", "inactive", "expected"),
    [("max", "5", "0", (None, 0)), ("1000", "600", "200", (1000, 400)), ("1000", "100", "200", (1000, 0))],
)
def test_a_containers_memory_limit_counts(tmp_path, monkeypatch, limit, current, inactive, expected):
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(current + "\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\n")
    monkeypatch.setattr(facts, "_CGROUP", tmp_path)
    assert facts._cgroup_memory() == expected
    (tmp_path / "memory.max").unlink()
    assert facts._cgroup_memory() == (None, 0)


def test_a_containers_limit_bounds_what_is_offered(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    (tmp_path / "memory.stat").write_text("inactive_file 0\n")
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    monkeypatch.setattr(facts, "_CGROUP", tmp_path)
    found = facts.cpu_facts()
    assert (found.total_bytes, found.free_bytes, found.cores) == (1_000_000, 600_000, 1)


@pytest.mark.parametrize(("text", "expected"), [("max 100000", None), ("250000 100000", 2.5), ("junk", None)])
def test_a_containers_cpu_quota(tmp_path, monkeypatch, text, expected):
    (tmp_path / "cpu.max").write_text(text + "\n")
    monkeypatch.setattr(facts, "_CGROUP", tmp_path)
    assert facts._cgroup_cpus() == expected
