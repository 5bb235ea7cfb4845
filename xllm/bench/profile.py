"""`--profile` of benches that hold the engine themselves."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path


def profiled_if(wanted: bool, directory: str) -> AbstractContextManager[None]:
    """A context for the run to be looked at; does nothing where that is not wanted."""
    return profiled(Path(directory)) if wanted else nullcontext()


@contextmanager
def profiled(directory: Path) -> Iterator[None]:
    """Writes a trace, prints what took most of the time."""
    from xllm.executor.trace import Trace  # brings torch

    trace = Trace()
    try:
        yield
    finally:
        path, table = trace.stop(directory)
    print(table)
    print(f"trace written to {path}")
