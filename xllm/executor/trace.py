"""What ran on the device and when: PyTorch's profiler from a start to a stop, as a file to look at and a table to read."""

import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

ROWS = 15


class Trace:
    """Runs from its making to `stop`. Both belong to the thread that submits steps; others are seen on a card only."""

    def __init__(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities, acc_events=True)
        self._profiler.start()

    def stop(self, directory: Path) -> tuple[Path, str]:
        """Writes `xllm-trace-<time>.json.gz` (opens in Perfetto or chrome://tracing): its path, and what took most time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profiler.stop()
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"xllm-trace-{time.strftime('%Y%m%d-%H%M%S')}.json.gz"
        self._profiler.export_chrome_trace(str(path))
        sort = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = self._profiler.key_averages().table(
            sort_by=sort, row_limit=ROWS, max_name_column_width=60, max_src_column_width=20
        )
        return path, table
