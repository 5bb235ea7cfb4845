"""What `xllm up` shows on a terminal: a table of instances over the last log lines. Pure: a snapshot in, a renderable out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from xllm.cluster.membership import Member
from xllm.server.children import Child
from xllm.server.log_lines import Line, colour

BAR = 8  # characters of a full bar: all columns fit into 80
FEWEST_LINES = 3
STYLES = {
    "starting": "yellow",
    "joining": "yellow",
    "ready": "green",
    "draining": "magenta",
    "down": "red",
    "gone": "red",
    "stopped": "dim",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One process. What is None is not known, or means nothing for it."""

    id: str
    state: str
    role: str = ""
    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None  # 0 to 1
    cached: int | None = None  # blocks over all tiers
    restarts: int | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    title: str
    rows: Sequence[Row]
    lines: Sequence[Line]
    note: str = ""  # such as that etcd is away


def instance_rows(children: Iterable[Child], members: Mapping[str, Member]) -> list[Row]:
    """Our own in their order, then those that others have brought into the cluster."""
    rows, ours = [], set()
    for child in children:
        ours.add(child.name)
        rows.append(_row(child.name, child.state, members.get(child.name), child.restarts))
    rows += [_row(id, None, members[id], None) for id in sorted(members) if id not in ours]
    return rows


def _row(id: str, process: str | None, member: Member | None, restarts: int | None) -> Row:
    if member is None:
        state = {"ready": "joining", None: "gone"}.get(process, process or "gone")
        return Row(id, state, restarts=restarts)
    if process in ("down", "stopped"):
        state = "gone"  # its entry lasts as long as its lease
    elif process == "starting":
        state = "starting"
    else:
        state = "draining" if member.info.draining else "ready"
    load = member.load
    if load is None or state in ("gone", "starting"):
        return Row(id, state, member.info.role, restarts=restarts)
    cached = sum(load.cached_blocks.values())
    return Row(id, state, member.info.role, load.running, load.waiting, load.kv_usage, cached, restarts)


def render(snapshot: Snapshot, height: int) -> RenderableType:
    """At most `height` lines, unless there are more processes than that."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("instance", "role", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("running", "waiting"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("KV", no_wrap=True)
    for name in ("cached", "restarts"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in snapshot.rows:
        table.add_row(
            Text(row.id, colour(row.id)),
            row.role,
            Text(row.state, STYLES.get(row.state, "")),
            _number(row.running),
            _number(row.waiting),
            _bar(row.kv_usage),
            _number(row.cached),
            _number(row.restarts),
        )
    parts: list[RenderableType] = [Text(snapshot.title, "bold", no_wrap=True, overflow="ellipsis"), table]
    if snapshot.note:
        parts.append(Text(snapshot.note, "yellow", no_wrap=True, overflow="ellipsis"))
    used = len(snapshot.rows) + len(parts) + 1  # the table's head and an empty line
    room = max(FEWEST_LINES, height - used - 1)
    parts.append(Text(""))
    width = max((len(who) for who, _ in snapshot.lines), default=0)
    parts += [prefixed(line, width) for line in list(snapshot.lines)[-room:]]
    return Group(*parts)


def prefixed(line: Line, width: int) -> Text:
    """`instance-1 | what it said`, on one line of the terminal in the live view."""
    who, what = line
    return Text.assemble((f"{who:<{width}} | ", colour(who)), what, no_wrap=True, overflow="ellipsis")


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def _bar(share: float | None) -> Text:
    if share is None:
        return Text("")
    share = min(max(share, 0.0), 1.0)
    full = round(share * BAR)
    style = "red" if share > 0.95 else "yellow" if share > 0.8 else "green"
    return Text.assemble(("━" * full, style), ("━" * (BAR - full), "bright_black"), f" {share:4.0%}")
