import pytest

from xllm.core.errors import ConfigError
from xllm.executor.stores.table import STORES, Address, check_url, open_store


@pytest.mark.parametrize("url", ["redis://here", "/a/directory", "directory", "", "FILE", "://"])
def test_what_is_no_store_is_told_what_is(url):
    for use in (check_url, open_store):
        with pytest.raises(ConfigError) as refused:
            use(url)
        assert all(f"{scheme}://" in refused.value.message for scheme in STORES)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("file://host/path", "absolute path"),
        ("file://", "absolute path"),
        ("file:///", "absolute path"),
        ("file:///d?size=much", "size=much is no size"),
        ("file:///d?size=-1", "is no size"),
        ("file:///d?size=nanGiB", "is no size"),
        ("file:///d?quota=1GiB", "no setting 'quota'; there are size"),
        ("mooncake://", "HOST:PORT"),
        ("mooncake://here:there", "HOST:PORT"),
        ("mooncake://:50051", "HOST:PORT"),
        ("mooncake://here:1/more", "HOST:PORT"),
        ("mooncake://here:1?speed=9", "there are segment, metadata, protocol, devices, hostname"),
    ],
)
def test_an_address_that_cannot_be_right(url, says):
    with pytest.raises(ConfigError) as refused:
        check_url(url)
    assert says in refused.value.message


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("123", 123), ("4GiB", 4 << 30), ("1.5MiB", 3 << 19), ("2TiB", 2 << 40), ("8KiB", 8192)],
)
def test_sizes(text, size):
    assert Address(f"file:///d?size={text}").size("size", 7) == size


def test_defaults():
    address = Address("mooncake://host:1")
    assert (address.size("segment", 9), address.text("protocol", "tcp"), address.place) == (
        9,
        "tcp",
        "host:1",
    )
    address.end()


def test_nobody_is_spoken_to_for_a_check(tmp_path):
    assert check_url(f"file://{tmp_path}/not/there") == 0
    assert not (tmp_path / "not").exists()
