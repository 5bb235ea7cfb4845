"""What lies in etcd, byte for byte and key for key."""

import msgspec
import pytest

from tests.cluster.real import instance
from xllm.cluster.instance import (
    InstanceInfo,
    Keys,
    LoadSummary,
    RegistryError,
    check_name,
    decode,
    encode,
    epoch_now,
)
from xllm.core.errors import ConfigError


@pytest.mark.parametrize("value", [instance(), instance(role="decode", http="http://h:1", draining=True)])
def test_round_trip(value):
    assert decode(encode(value), InstanceInfo) == value
    assert msgspec.json.decode(encode(value))["v"] == 1


def test_fields_of_a_later_reader_are_passed_over():
    said = msgspec.json.decode(encode(LoadSummary(sequence=3, cached_blocks={"GPU": 2})))
    said["body"]["mood"] = "good"
    assert decode(msgspec.json.encode(said), LoadSummary) == LoadSummary(sequence=3, cached_blocks={"GPU": 2})


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"\xff", b'{"v":2,"body":{"sequence":1}}', b'{"v":1,"body":{"sequence":"x"}}']
)
def test_anything_else_is_refused_with_a_sentence(data):
    with pytest.raises(RegistryError, match="LoadSummary"):
        decode(data, LoadSummary)


def test_keys_and_back():
    keys = Keys("c")
    assert keys.instance("a") == b"/xllm/c/instances/a"
    assert keys.split(keys.load("pod-0.b:1")) == ("load", "pod-0.b:1")
    assert keys.split(b"/xllm/cc/load/a") == ("", "")


@pytest.mark.parametrize("name", ["", "a/b", "é", "a b", "a" * 201])
def test_names_that_cannot_be_part_of_a_key(name):
    with pytest.raises(ConfigError):
        check_name(name, "an id")


def test_an_epoch_grows_though_the_clock_went_back():
    later = epoch_now() + 10**6
    assert epoch_now(later) == later + 1
    assert epoch_now() < later
