import pytest

from tests.config.test_resolve import decide
from xllm.config.decided import TierConfig
from xllm.core.errors import ConfigError


def test_nobody_asked():
    assert decide().tiers is None


def test_sizes_become_whole_blocks_and_are_told():
    config = decide(kv_offloading_size=1.0)
    blocks = (1 << 30) // config.cache.block_bytes
    assert config.tiers == TierConfig(host_blocks=blocks, disk_blocks=0, disk_path=None)
    assert any("host memory" in reason and "disk" not in reason for reason in config.reasons)

    config = decide(kv_offloading_size=0.5, kv_disk_path="/somewhere", kv_disk_size=4.0)
    assert config.tiers is not None
    assert (config.tiers.disk_blocks, config.tiers.disk_path) == (4 * blocks, "/somewhere")
    assert any("disk" in reason and "/somewhere" in reason for reason in config.reasons)


def test_a_store_is_told_too():
    config = decide(kv_offloading_size=1.0, kv_remote="file:///shared")
    assert config.tiers is not None
    assert config.tiers.remote == "file:///shared"
    assert any("shared with other engines through file:///shared" in reason for reason in config.reasons)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"kv_offloading_size": -1.0}, "must not be negative"),
        ({"kv_disk_path": "/d"}, "belong together"),
        ({"kv_disk_size": 3.0, "kv_offloading_size": 1.0}, "belong together"),
        ({"kv_disk_path": "/d", "kv_disk_size": 3.0}, "--kv-offloading-size"),
        ({"kv_remote": "file:///d"}, "give it some with --kv-offloading-size"),
        ({"kv_remote": "file:///d", "kv_offloading_size": 1.0, "enable_prefix_caching": False}, "prefix"),
        ({"kv_offloading_size": 1.0, "enable_prefix_caching": False}, "--no-enable-prefix-caching"),
        ({"kv_offloading_size": 1e-9}, "must hold one at least"),
        ({"kv_offloading_size": 1.0, "kv_disk_path": "/d", "kv_disk_size": 1e-9}, "must hold one at least"),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(asked, says):
    with pytest.raises(ConfigError) as refused:
        decide(**asked)
    assert says in refused.value.message
