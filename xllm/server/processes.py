"""Several processes of one router on one port: the kernel spreads connections over them, and one that dies is replaced."""

import asyncio
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

from xllm.server.children import Child, GaveUp, Spec
from xllm.server.listen import listen
from xllm.server.log_lines import Line, LogLines
from xllm.server.options import ServerOptions
from xllm.server.siblings import Siblings


def listener(options: ServerOptions) -> socket.socket:
    """Of this process, whether it is one of several or alone."""
    return listen(options.host, options.port, shared=Siblings.from_environment() is not None)


def run_processes(options: ServerOptions, number: int) -> int:
    """The command line again, `number` times, each as one process. Exit code 0 after a signal, 1 where one does not stay alive."""
    with (
        listen(options.host, options.port, shared=True) as reserved,
        tempfile.TemporaryDirectory(prefix="xllm-") as shared,
    ):
        argv = (
            sys.executable, "-m", "xllm.cli", *sys.argv[1:], "--processes", "1", "--port", str(reserved.getsockname()[1])
        )  # fmt: skip
        specs = [Spec(f"router-{i + 1}", argv, Siblings(Path(shared), i).variable()) for i in range(number)]
        return asyncio.run(_run(specs))


async def _run(specs: list[Spec]) -> int:
    lines = LogLines(_show)
    children = [Child(spec, lines) for spec in specs]
    loop = asyncio.get_running_loop()
    asked = 0

    def stop() -> None:
        nonlocal asked
        asked += 1
        for child in children:
            child.stop() if asked == 1 else child.kill()

    for sig in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(sig, stop)
    runs = [asyncio.create_task(child.run()) for child in children]
    try:
        await asyncio.gather(*runs)
    except GaveUp as e:
        print(f"xllm: {e.message}", file=sys.stderr)
        return 1
    finally:
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)
    return 0


def _show(line: Line) -> None:
    who, what = line
    os.write(1, f"{who} | {what}\n".encode(errors="replace"))
