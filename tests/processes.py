"""What tests do to processes."""

import os
import signal
import time
from pathlib import Path


def freeze(pid: int, timeout_s: float = 10.0) -> None:
    """Stops it, and returns when every thread of it stands still: the signal alone leaves others running for a moment."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + timeout_s
    while not all(_stands(task) for task in Path(f"/proc/{pid}/task").iterdir()):
        assert time.monotonic() < deadline, f"process {pid} does not stop"
        time.sleep(0.001)


def _stands(task: Path) -> bool:
    return (task / "stat").read_text().rpartition(")")[2].split()[0] == "T"
