"""The engine core as a process: `python -m xllm.engine.process`, started by `ProcessClient` and by nobody else."""

import faulthandler
import gc
import os
import shutil
import signal
import sys
import threading
import traceback
from pathlib import Path

import msgspec
import zmq

from xllm.config.decided import EngineConfig
from xllm.core.errors import XllmError
from xllm.engine.build import build_core
from xllm.engine.core import EngineCore
from xllm.wire.channel import ZmqChannel, ZmqSender
from xllm.wire.messages import Fault, Heartbeat, Ready

HEARTBEAT_S = 0.25
ORPHAN_GRACE_S = 2.0  # a told Shutdown is carried out within this, or the process ends without it


class Launch(msgspec.Struct, frozen=True):
    """First line on the child's standard input, as JSON. The line's pipe stays open as long as the parent lives."""

    config: EngineConfig
    receive_from: str  # ZMQ addresses
    send_to: str


def main() -> None:
    # a Ctrl-C in the terminal reaches us too; the parent decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # written in C: works while the interpreter hangs
    launch = msgspec.json.decode(sys.stdin.buffer.readline(), type=Launch)
    threading.Thread(target=_end_with_parent, args=(launch,), name="xllm-lifeline", daemon=True).start()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    channel = ZmqChannel(context, send_to=launch.send_to, receive_from=launch.receive_from, bind=False)
    try:
        startup_s: dict[str, float] = {}
        core, config = build_core(launch.config, channel, channel.send, startup_s)
        gc.freeze()  # what is there stays: collections are to walk what steps leave behind, and nothing else
        channel.send(Ready(config=config, seconds=startup_s))
        stop = threading.Event()
        heart = threading.Thread(
            target=_beat, args=(context, launch.send_to, core, stop), name="xllm-heart", daemon=True
        )
        heart.start()
        core.run()
        stop.set()
        heart.join()
        core.close()
    except XllmError as e:
        channel.send(Fault(reason=e.message))
        raise SystemExit(1) from None
    except Exception as e:
        traceback.print_exc()
        channel.send(Fault(reason=f"{type(e).__name__}: {e}"))
        raise SystemExit(1) from e
    finally:
        channel.close()
        context.term()


def _end_with_parent(launch: Launch) -> None:
    while os.read(sys.stdin.fileno(), 4096):  # nothing until the parent closed its end or died
        pass  # not through sys.stdin: its lock, held here, would abort an exit of our own
    threading.Event().wait(ORPHAN_GRACE_S)
    # still here, so there was no Shutdown: the parent died, and its sockets' directory is ours to remove
    shutil.rmtree(Path(launch.send_to.removeprefix("ipc://")).parent, ignore_errors=True)
    os._exit(1)


def _beat(
    context: "zmq.Context[zmq.Socket[bytes]]", address: str, core: EngineCore, stop: threading.Event
) -> None:
    """Tells the front end a few times a second that the process lives, and whether work advances."""
    sender = ZmqSender(context, address)
    while not stop.wait(HEARTBEAT_S):
        sender.send(Heartbeat(progress=core.executor.progress, busy=core.busy, stats=core.last_stats))
    sender.close()


if __name__ == "__main__":
    main()
