"""What `xllm up` starts in tests: says and does what a process of a cluster does, without an engine. MODEL is the manner:

steady    ready, in the registry, until it is told to end
mortal    dies by itself the first time, as `XLLM_FAKE_DIR` remembers
doomed    always dies
refused   ends as a command that refuses its flags
deaf      does not hear SIGTERM
"""

import asyncio
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from tests.cluster.real import instance
from xllm.cluster.etcd import Etcd
from xllm.cluster.instance import Keys, LoadSummary
from xllm.cluster.registration import Registration, next_epoch


def main() -> int:
    command, manner, *flags = sys.argv[1:]
    values = dict(pairwise(flags))
    name = values.get("--instance-id", command)
    print(f"{name}: starting with {' '.join(flags)}")
    print("loading 10%\rloading 50%\rloading 100%")
    if manner == "refused":
        print("xllm: no such thing", file=sys.stderr)
        return 2
    if manner == "doomed" and command == "serve":
        print(f"{name}: the last words")
        return 3
    if manner == "mortal" and command == "serve" and _first_time(name):
        return 4
    engine = subprocess.Popen(["sleep", "600"])  # as an instance has a process of its own for the engine
    asyncio.run(_serve(command, name, manner, values))
    engine.kill()
    engine.wait()
    print(f"{name}: ended in order")
    return 0


def _first_time(name: str) -> bool:
    mark = Path(os.environ["XLLM_FAKE_DIR"]) / name
    if mark.exists():
        return False
    mark.touch()
    return True


async def _serve(command: str, name: str, manner: str, values: dict[str, str]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, lambda: None if manner == "deaf" else stop.set())
    registration, etcd = None, Etcd(values["--etcd"])
    if command == "serve":
        keys = Keys(values["--cluster"])
        info = instance(name, await next_epoch(etcd, keys, name), model=manner)
        registration = Registration(etcd, keys, info, lambda: LoadSummary(sequence=1, running=2), ttl_s=3)
        await registration.start()
        await registration.registered.wait()
    port = int(values.get("--port", "8000")) or 12345
    print(f"Ready: http://127.0.0.1:{port}/v1  model={manner}")
    await stop.wait()
    if registration is not None:
        await registration.close()
    await etcd.aclose()


if __name__ == "__main__":
    sys.exit(main())
