"""Agents of NIXL: what it needs to know of us, and how we want it.

Its Python interface raises a type of its own for each way to fail, all of them straight from Exception.
"""

import os
import socket
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xllm.core.errors import ConfigError
from xllm.executor.transports.base import Blocks
from xllm.executor.transports.table import nixl_module, nixl_package

SETTINGS = {  # unless somebody has said otherwise
    "UCX_LOG_LEVEL": "error",  # a request that an agent's end ends is worth a warning to them
    "NIXL_LOG_LEVEL": "ERROR",
    # UCX lets a card copy out of another process's memory only where it sees NVLink; without that, on one card too, both
    # processes copy by way of host memory, a thousandth as fast
    "UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "on",
}


def load() -> Any:
    module = nixl_module()
    if module is None:
        raise ConfigError(
            f"--kv-transport nixl: NIXL is not installed; pip install {nixl_package()} brings it, and tcp needs nothing"
        )
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        return import_module(f"{module}._api")
    except (ImportError, OSError) as e:
        raise ConfigError(f"--kv-transport nixl: NIXL is installed and cannot be loaded: {e}") from e


def open_agent(api: Any, name: str, blocks: Blocks, *, same_host: bool) -> Any:
    """An agent that knows the blocks' memory. ConfigError where there can be none."""
    use_card(blocks)
    # UCX tells of a peer that has gone only where it speaks to it by what can tell; within a machine that is TCP alone
    settings = {"ucx_error_handling_mode": "none" if same_host else "peer"}
    if "UCX_TLS" not in os.environ:
        settings["engine_config"] = "TLS=^tcp"
    strict = api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
    try:
        config = api.nixl_agent_config(enable_prog_thread=False, backends=[], sync_mode=strict)
        agent = api.nixl_agent(name, config)
        agent.create_backend("UCX", settings)
        agent.register_memory(blocks.memory_NB, backends=["UCX"])
    except Exception as e:
        raise ConfigError(
            f"--kv-transport nixl: the KV cache cannot be given to NIXL: {e or type(e).__name__}"
        ) from e
    return agent


def this_host() -> str:
    """The same for all processes of this machine, until it starts anew."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def rows_of(
    agent: Any, name: Any, address: int, card: int, count: int, blocks: Blocks, device: str = ""
) -> Any:
    """A prepared list of blocks, of which requests name some by number."""
    memory = "VRAM" if (device or blocks.memory_NB.device.type) == "cuda" else "DRAM"
    rows = np.empty((count, 3), dtype=np.uint64)
    rows[:, 0] = address + np.arange(count, dtype=np.uint64) * np.uint64(blocks.block_bytes)
    rows[:, 1], rows[:, 2] = blocks.block_bytes, card
    return agent.prep_xfer_dlist(name, rows, memory)


_thread = threading.local()


def use_card(blocks: Blocks) -> None:
    """UCX speaks to the driver, for which a thread has no card until the runtime has spoken in it."""
    if blocks.on_card and not hasattr(_thread, "uses"):
        torch.cuda.current_stream(blocks.memory_NB.device).query()
        _thread.uses = True


def card_of(blocks: Blocks) -> int:
    return blocks.memory_NB.device.index or 0
