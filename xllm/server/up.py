"""`xllm up MODEL`: a whole cluster on this machine, as one command: etcd, instances, routers, and one Ctrl-C for all."""

import argparse
import asyncio
import contextlib
import logging
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console as Rich
from rich.console import RenderableType
from rich.live import Live

from xllm.cluster.etcd import Etcd
from xllm.cluster.etcd_child import EtcdChild
from xllm.cluster.instance import Keys
from xllm.cluster.membership import Membership
from xllm.config.flags import add_flags, from_namespace
from xllm.config.options import EngineOptions
from xllm.core.errors import ConfigError
from xllm.device.facts import measure
from xllm.server.children import Child, Deaths, GaveUp, Patience
from xllm.server.console import curl
from xllm.server.listen import listen
from xllm.server.log_lines import Line, LogLines, ToLines
from xllm.server.options import ServerOptions
from xllm.server.serve import SIGNALS, add_api_key
from xllm.server.state import served_name
from xllm.server.up_options import UpOptions
from xllm.server.up_plan import Plan, plan, ports, visible_cards
from xllm.server.up_view import Snapshot, instance_rows, prefixed, render
from xllm.server.version import version

VIEW_S = 0.25
ETCD_LOOK_S = 0.5
BEYOND_TIMEOUT_S = 15.0  # that a child may take to end beyond --shutdown-timeout, before it is killed
INTERRUPTED = 130
FAILED = 1


def add_parsers(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("up", help="serve a model with several engines behind a router, here")
    parser.add_argument("model", nargs="?", metavar="MODEL", help="directory, hub id or demo (default: demo)")
    add_api_key(parser)
    add_flags(parser, UpOptions, ServerOptions, EngineOptions)
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Exit code 0 after an orderly end, 1 where a child did not stay alive, 130 after a second Ctrl-C."""
    options = from_namespace(UpOptions, namespace)
    engine, server = from_namespace(EngineOptions, namespace), from_namespace(ServerOptions, namespace)
    facts = measure(engine.device)
    cards = visible_cards() if facts.name == "cuda" else []
    for port in ports(options, server):
        listen(server.host, port).close()  # one that is taken is known before anything is started
    token = secrets.token_urlsafe(24)
    plan(options, engine, server, facts, cards, options.etcd, token)  # refuses what cannot be
    directory = _made(options.log_dir)
    with contextlib.ExitStack() as stack:
        console = Rich(highlight=False, soft_wrap=True)
        console.print(
            f"xLLM {version()} serving {engine.model} with {len(options.roles)} instances",
            style="bold", markup=False,
        )  # fmt: skip
        etcd = None
        if not options.etcd:
            etcd = stack.enter_context(EtcdChild(log=directory / "etcd.log" if directory else None))
        urls = options.etcd if etcd is None else (etcd.url,)
        made = plan(options, engine, server, facts, cards, urls, token)
        lines = LogLines(lambda line: None, directory)
        stack.callback(lines.close)
        logging.basicConfig(level=logging.WARNING, handlers=[ToLines(lines, "up")], force=True)
        up = Up(made, options, server, served_name(engine), urls, etcd, lines, console)
        return asyncio.run(up.run())


def _made(directory: str | None) -> Path | None:
    if directory is None:
        return None
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"--log-dir {directory}: {e.strerror or e}") from e
    return Path(directory)


class Up:
    """`run` once. Signals: the first ends all in order, the second at once."""

    def __init__(
        self,
        made: Plan,
        options: UpOptions,
        server: ServerOptions,
        model: str,
        urls: Sequence[str],
        etcd: EtcdChild | None,
        lines: LogLines,
        console: Rich,
    ):
        self._patience = patience = Patience(restart=options.restart)
        self._options, self._server, self._model, self._etcd = options, server, model, etcd
        self._decisions = made.decisions
        self._lines, self._console = lines, console
        self.instances = [Child(spec, lines, patience, self._look) for spec in made.instances]
        self.routers = [Child(spec, lines, patience, self._look) for spec in made.routers]
        self._children = [*self.instances, *self.routers]
        self._tasks: dict[Child, asyncio.Task[None]] = {}
        self._client = Etcd(",".join(urls))
        self._members = Membership(self._client, Keys(options.cluster))
        self._news = asyncio.Event()
        self._stop, self._hurry = asyncio.Event(), asyncio.Event()
        self._live: Live | None = None
        self._title = f"{model}: starting"
        self._began = time.monotonic()
        lines.show = self._show

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._signalled)
        for decision in self._decisions:
            self._say(f"  {decision}", "dim")
        self._tasks = {child: asyncio.create_task(child.run(), name=child.name) for child in self._children}
        minding = asyncio.create_task(self._mind_etcd())
        watching = [asyncio.create_task(self._watch()), asyncio.create_task(self._follow())]
        try:
            with self._view():
                try:
                    await self._until_over(minding)
                finally:
                    await self._end(minding)
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
            await self._members.close()
            await self._client.aclose()
        if self._hurry.is_set():
            self._say("killed")
            return INTERRUPTED
        self._say("stopped")
        return 0

    # ---- from start to stop

    async def _until_over(self, minding: asyncio.Task[None]) -> None:
        """Returns when a signal came; raises what a child or etcd ended with for good."""
        stopping = asyncio.create_task(self._stop.wait())
        waited: set[asyncio.Task[None] | asyncio.Task[bool]] = {stopping, minding, *self._tasks.values()}
        try:
            while not self._stop.is_set():
                done, _ = await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                waited -= done
                for task in done:
                    task.result()
                for kind, name in ((self.instances, "instance"), (self.routers, "router")):
                    if not self._stop.is_set() and all(self._tasks[child].done() for child in kind):
                        raise GaveUp(f"no {name} is left, and --no-restart was given")
        finally:
            stopping.cancel()

    async def _end(self, minding: asyncio.Task[None]) -> None:
        """Routers first, so that nothing asks an instance that goes; etcd ends last, with its owner's context."""
        self._title = f"{self._model}: stopping"
        self._stop.set()
        patience_s = self._server.shutdown_timeout + BEYOND_TIMEOUT_S
        hurried = asyncio.create_task(self._hurry.wait())
        for kind in (self.routers, self.instances):
            for child in kind:
                child.stop()
            ending = asyncio.gather(*(self._tasks[child] for child in kind), return_exceptions=True)
            either: set[asyncio.Future[Any]] = {ending, hurried}
            await asyncio.wait(either, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            for child in kind if not self._hurry.is_set() else self._children:
                if not self._tasks[child].done():
                    self._lines.add(child.name, "** is killed")
                    child.kill()
            await ending
        hurried.cancel()
        await asyncio.gather(hurried, minding, return_exceptions=True)

    def _signalled(self) -> None:
        if not self._stop.is_set():
            self._say("stopping; once more to end at once")
            self._stop.set()
        else:
            self._hurry.set()

    async def _mind_etcd(self) -> None:
        """Starts it again where it dies. Requests go on without it."""
        deaths = Deaths(self._patience)
        while self._etcd is not None and not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), ETCD_LOOK_S)
            if self._stop.is_set() or self._etcd.alive:
                continue
            words = self._etcd.last_words()
            self._lines.add("etcd", f"** ended unasked: {words}")
            if not self._options.restart:
                break
            if deaths.another() >= self._patience.deaths:
                raise GaveUp(f"etcd does not stay alive: {words}")
            try:
                await asyncio.to_thread(self._etcd.start)
                self._lines.add("etcd", "** is started again")
            except ConfigError as e:
                self._lines.add("etcd", f"** {e.message}")
        await self._stop.wait()

    # ---- what is shown

    async def _follow(self) -> None:
        await self._members.start()
        async for _ in self._members.changes():
            self._look()

    async def _watch(self) -> None:
        """Says once when all is ready, and keeps the view current."""
        said = False
        while True:
            self._news.clear()
            if not said and self._ready():
                said = True
                self._say_ready()
            if self._live is not None:
                self._live.update(self._rendered(), refresh=True)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), None if self._live is None else VIEW_S)
            if self._live is not None:
                await asyncio.sleep(VIEW_S / 2)  # however often there is news

    def _ready(self) -> bool:
        members = self._members.snapshot()
        return all(child.state == "ready" for child in self._children) and all(
            child.name in members for child in self.instances
        )

    def _say_ready(self) -> None:
        seconds = time.monotonic() - self._began
        urls = [child.url for child in self.routers if child.url is not None]
        many = f"{len(self.instances)} instance{'s' if len(self.instances) > 1 else ''}"
        shown = " and ".join(f"{url}/v1" for url in urls)
        self._title = f"{self._model} on {shown}"
        self._say(f"Ready: {shown}  model={self._model}  {many}  ({seconds:.1f} s)", "bold green")
        self._say(f"Try:   {curl(urls[0], self._model, with_key=bool(self._server.api_keys()))}")

    def _rendered(self) -> RenderableType:
        age = self._members.stale_s
        note = f"etcd has not answered for {age:.0f} s" if 2.0 < age < float("inf") else ""
        rows = instance_rows(self.instances, self._members.snapshot())
        return render(Snapshot(self._title, rows, tuple(self._lines.kept), note), self._console.height)

    def _view(self) -> contextlib.AbstractContextManager[object]:
        if not (self._options.view and self._console.is_terminal):
            return contextlib.nullcontext()
        self._live = Live(self._rendered(), console=self._console, auto_refresh=False)
        return self._live

    def _show(self, line: Line) -> None:
        if self._live is None:
            width = max(len(child.name) for child in self._children)
            text = prefixed(line, width)
            text.no_wrap, text.overflow = False, "fold"
            self._console.print(text)
            sys.stdout.flush()

    def _say(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False)
        sys.stdout.flush()

    def _look(self) -> None:
        self._news.set()
