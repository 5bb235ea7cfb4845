"""`--profile`: where the time of a run went, as a trace to look at and a table to read."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

ROWS = 15


def profiled_if(wanted: bool, directory: str) -> AbstractContextManager[None]:
    """A context for the run to be looked at; does nothing where that is not wanted."""
    return profiled(Path(directory)) if wanted else nullcontext()


@contextmanager
def profiled(directory: Path) -> Iterator[None]:
    """Writes `xllm-trace-<time>.json.gz` (opens in Perfetto or chrome://tracing), prints what took most of the time."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    directory.mkdir(parents=True, exist_ok=True)
    with profile(activities=activities) as profiler:
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    path = directory / f"xllm-trace-{time.strftime('%Y%m%d-%H%M%S')}.json.gz"
    profiler.export_chrome_trace(str(path))
    sort = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(
        profiler.key_averages().table(
            sort_by=sort, row_limit=ROWS, max_name_column_width=60, max_src_column_width=20
        )
    )
    print(f"trace written to {path}")
