"""An etcd of our own: found, started, stopped, started again."""

import importlib.util
import os

import pytest

from xllm.cluster.etcd import Etcd
from xllm.cluster.etcd_child import EtcdChild, find_etcd
from xllm.core.errors import ConfigError


def test_the_one_on_path_comes_first(monkeypatch, tmp_path):
    program = tmp_path / "etcd"
    program.write_bytes(b"\x7fELF")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_etcd() == program
    program.write_text("#!/bin/sh\n")  # what pip puts there for the package
    assert find_etcd().name == "etcd" and find_etcd() != program


def test_where_there_is_none_a_sentence_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--etcd .*pyxllm\[cluster\]"):
        EtcdChild()


async def test_data_outlives_the_process_unless_it_is_wiped(tmp_path):
    with EtcdChild(tmp_path / "data") as child:
        pid = child.pid
        etcd = Etcd(child.url)
        await etcd.put(b"k", b"v")
        child.stop()
        assert not child.alive
        child.start()
        assert child.pid != pid and (await etcd.range(b"k")).count == 1
        child.kill()
        child.wipe()
        child.start()
        assert (await etcd.range(b"k")).count == 0
        await etcd.aclose()
        last = child.pid
        assert last is not None
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)
    assert (tmp_path / "data" / "etcd.log").exists()


def test_one_that_does_not_come_up_is_quoted(tmp_path):
    (tmp_path / "member.etcd").write_text("a file where a directory should be")
    with pytest.raises(ConfigError, match=r"did not come up .*member\.etcd"):
        EtcdChild(tmp_path)


def test_temporary_data_goes_with_it():
    with EtcdChild() as child:
        directory = child.directory
        assert directory.exists()
    assert not directory.exists()
