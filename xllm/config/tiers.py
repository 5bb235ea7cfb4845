"""How many KV blocks each tier below the device holds. Pure."""

from xllm.config.decided import CacheConfig, TierConfig
from xllm.config.memory import GIB, gib
from xllm.config.options import EngineOptions
from xllm.core.errors import ConfigError


def decide_tiers(asked: EngineOptions, cache: CacheConfig) -> tuple[TierConfig | None, str]:
    """(what was decided, the reason for it in one sentence); None and "" where nobody asked. ConfigError for what cannot
    work."""
    host_gib, disk_gib, path = asked.kv_offloading_size, asked.kv_disk_size, asked.kv_disk_path
    for flag, size in (("--kv-offloading-size", host_gib), ("--kv-disk-size", disk_gib)):
        if size < 0:
            raise ConfigError(f"{flag} must not be negative")
    if (path is None) != (disk_gib == 0):
        raise ConfigError(
            "--kv-disk-path and --kv-disk-size belong together: where the blocks go, and how many GiB"
        )
    remote = asked.kv_remote
    if not host_gib:
        if remote is not None:
            raise ConfigError(
                "--kv-remote: blocks reach the store through the host's memory; give it some with --kv-offloading-size"
            )
        if path is not None:
            raise ConfigError(
                "--kv-disk-path: blocks reach the disk through the host's memory; give it some with --kv-offloading-size"
            )
        return None, ""
    if not cache.prefix_caching:
        raise ConfigError(
            "--kv-offloading-size: tiers keep what the prefix cache knows, which --no-enable-prefix-caching switches off"
        )
    host, disk = (int(size * GIB) // cache.block_bytes for size in (host_gib, disk_gib))
    if not host or (path is not None and not disk):
        raise ConfigError(f"one KV block takes {gib(cache.block_bytes)}: a tier must hold one at least")
    tokens = cache.block_size
    why = f"KV blocks are kept in {host * tokens} tokens of host memory ({gib(host * cache.block_bytes)})"
    if path is not None:
        why += f" and {disk * tokens} tokens on disk ({gib(disk * cache.block_bytes)} in {path})"
    if remote is not None:
        why += f", shared with other engines through {remote}"
    return TierConfig(host_blocks=host, disk_blocks=disk, disk_path=path, remote=remote), why
