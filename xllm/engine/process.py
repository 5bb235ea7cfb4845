"""The engine core as a process: `python -m xllm.engine.process`, started by `ProcessClient` and by nobody else."""

import faulthandler
import gc
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec
import zmq

from xllm.config.decided import EngineConfig
from xllm.core.errors import ConfigError, XllmError
from xllm.engine.build import build_core
from xllm.engine.core import EngineCore
from xllm.wire.channel import ZmqChannel, ZmqSender
from xllm.wire.doors import Listen, Listening
from xllm.wire.hub import Hub
from xllm.wire.messages import Fault, Heartbeat, Ready

if TYPE_CHECKING:
    from xllm.engine.sharing import Sharing  # brings torch

HEARTBEAT_S = 0.25
ORPHAN_GRACE_S = 2.0  # a told Shutdown is carried out within this, or the process ends without it
LAST_WORD_S = 5.0  # an owner that starts is found by then


class Launch(msgspec.Struct, frozen=True):
    """First line on the child's standard input, as JSON. The line's pipe stays open as long as the parent lives."""

    config: EngineConfig
    receive_from: str  # ZMQ addresses in a directory of the parent's
    send_to: str  # where others listen too this is the same one, and the engine listens there
    listening: Listening | None = None  # for others than the parent


def main() -> None:
    # a Ctrl-C in the terminal reaches us too; the parent decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # written in C: works while the interpreter hangs
    launch = msgspec.json.decode(sys.stdin.buffer.readline(), type=Launch)
    threading.Thread(target=_end_with_parent, args=(launch,), name="xllm-lifeline", daemon=True).start()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    channel, failed = _open(context, launch)
    try:
        if failed is not None:
            raise failed
        startup_s: dict[str, float] = {}
        core, config = build_core(
            launch.config, channel, channel.send, startup_s,
            followed=launch.listening is not None, sharing=_sharing(launch.listening),
        )  # fmt: skip
        gc.freeze()  # what is there stays: collections are to walk what steps leave behind, and nothing else
        addresses = channel.addresses[1:] if isinstance(channel, Hub) else ()
        channel.send(
            Ready(config=config, seconds=startup_s, addresses=addresses, kv_transport=core.kv_transport)
        )
        stop = threading.Event()
        heart = threading.Thread(
            target=_beat, args=(context, launch, channel, core, stop), name="xllm-heart", daemon=True
        )
        heart.start()
        core.run()
        stop.set()
        heart.join()
        core.close()
    except XllmError as e:
        _fault(channel, e.message)
        raise SystemExit(1) from None
    except Exception as e:
        traceback.print_exc()
        _fault(channel, f"{type(e).__name__}: {e}")
        raise SystemExit(1) from e
    finally:
        channel.close()
        context.term()


def _open(
    context: "zmq.Context[zmq.Socket[bytes]]", launch: Launch
) -> tuple[ZmqChannel | Hub, ConfigError | None]:
    """The way to the parent and, where they are to come in, to others. Where they cannot, the parent is to hear why."""
    if launch.listening is None:
        return ZmqChannel(context, send_to=launch.send_to, receive_from=launch.receive_from, bind=False), None
    owner = Listen(launch.send_to, owner=True)
    try:
        return Hub([owner, *launch.listening.doors], name=launch.listening.name), None
    except ConfigError as e:
        return Hub([owner]), e


def _sharing(listening: Listening | None) -> "Sharing | None":
    if listening is None or listening.kv_transport is None:
        return None
    from xllm.engine.sharing import Sharing

    return Sharing(
        listening.kv_transport,
        token=listening.token,
        name=listening.name,
        listen=urlsplit(listening.addresses[0]).hostname or "127.0.0.1",
        advertise=listening.advertise,
    )


def _fault(channel: ZmqChannel | Hub, reason: str) -> None:
    channel.send(Fault(reason=reason))
    until = time.monotonic() + LAST_WORD_S
    while isinstance(channel, Hub) and not channel.clients and time.monotonic() < until:
        time.sleep(0.02)  # the parent is still connecting; it is told as it comes in


def _end_with_parent(launch: Launch) -> None:
    while os.read(sys.stdin.fileno(), 4096):  # nothing until the parent closed its end or died
        pass  # not through sys.stdin: its lock, held here, would abort an exit of our own
    threading.Event().wait(ORPHAN_GRACE_S)
    # still here, so there was no Shutdown: the parent died, and its sockets' directory is ours to remove
    shutil.rmtree(Path(launch.send_to.removeprefix("ipc://")).parent, ignore_errors=True)
    os._exit(1)


def _beat(
    context: "zmq.Context[zmq.Socket[bytes]]", launch: Launch, channel: ZmqChannel | Hub, core: EngineCore,
    stop: threading.Event,
) -> None:  # fmt: skip
    """Tells the front ends a few times a second that the process lives, and whether work advances."""
    hub = channel if isinstance(channel, Hub) else None  # any thread may send through that
    sender = ZmqSender(context, launch.send_to) if hub is None else None
    while not stop.wait(HEARTBEAT_S):
        outstanding = 0 if hub is None else hub.outstanding
        beat = Heartbeat(core.progress, core.busy, core.last_stats, outstanding)
        (sender or channel).send(beat)
    if sender is not None:
        sender.close()


if __name__ == "__main__":
    main()
