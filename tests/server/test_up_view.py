"""The live view out of recorded snapshots."""

import io
from typing import Any

from rich.console import Console

from tests.cluster.real import instance
from xllm.cluster.instance import LoadSummary
from xllm.cluster.membership import Member
from xllm.server.up_view import Row, Snapshot, instance_rows, render

ROWS = (
    Row("instance-1", "ready", "both", 3, 1, 0.5, 120, 0),
    Row("instance-2", "draining", "decode", 1, 0, 1.0, 7, 2),
    Row("instance-3", "starting", restarts=1),
)


def shown(snapshot: Snapshot, height: int = 20, width: int = 90) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(render(snapshot, height))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return [line.rstrip() for line in text.splitlines()]


class Process:
    def __init__(self, name: str, state: str, restarts: int = 0):
        self.name, self.state, self.restarts = name, state, restarts


def rows(members: dict[str, Member], *children: Process) -> list[Row]:
    given: Any = children
    return instance_rows(given, members)


def test_the_table_and_the_last_lines_below():
    lines = (("instance-1", "hello"), ("router", "a request"))
    assert shown(Snapshot("demo on http://127.0.0.1:8000/v1", ROWS, lines)) == [
        "demo on http://127.0.0.1:8000/v1",
        "instance    role    state     running  waiting  KV             cached  restarts",
        "instance-1  both    ready           3        1  ━━━━━━━━  50%     120         0",
        "instance-2  decode  draining        1        0  ━━━━━━━━ 100%       7         2",
        "instance-3          starting                                                  1",
        "",
        "instance-1 | hello",
        "router     | a request",
    ]


def test_it_fits_the_terminal():
    lines = tuple(("router", f"line {i}") for i in range(100))
    found = shown(Snapshot("t", ROWS, lines, "etcd has not answered for 5 s"), height=14)
    assert len(found) == 13 and found[-1] == "router | line 99" and "etcd has not answered for 5 s" in found
    assert len(shown(Snapshot("t", ROWS, lines), height=2)) == 6 + 3  # never without the last lines
    long = (("router", "x" * 500),)
    assert max(map(len, shown(Snapshot("t" * 200, ROWS, long)))) <= 90


def test_what_a_log_line_says_is_not_markup():
    assert shown(Snapshot("t", (), (("a", "[bold]x[/bold] [/]"),)))[-1] == "a | [bold]x[/bold] [/]"


def test_states_are_of_the_process_and_of_the_registry():
    load = LoadSummary(sequence=1, running=2, waiting=3, kv_usage=0.25, cached_blocks={"GPU": 3, "CPU": 4})
    whole = Member(instance("a"), load)
    draining = Member(instance("a", draining=True), load)
    ready = Row("a", "ready", "both", 2, 3, 0.25, 7, 1)
    assert rows({"a": whole}, Process("a", "ready", 1)) == [ready]
    assert rows({"a": draining}, Process("a", "ready"))[0].state == "draining"
    assert rows({}, Process("a", "starting"))[0] == Row("a", "starting", restarts=0)
    assert rows({}, Process("a", "ready"))[0].state == "joining"
    assert rows({"a": whole}, Process("a", "down"))[0] == Row("a", "gone", "both", restarts=0)
    assert (
        rows({"a": whole}, Process("a", "starting"))[0].state == "starting"
    )  # the entry is of the one before
    assert rows({"a": Member(instance("a"))}, Process("a", "ready"))[0].running is None


def test_instances_of_others_are_shown_after_ours():
    members = {id: Member(instance(id)) for id in ("z", "other", "a")}
    found = rows(members, Process("z", "ready"))
    assert [(row.id, row.state, row.restarts) for row in found] == [
        ("z", "ready", 0), ("a", "ready", None), ("other", "ready", None),
    ]  # fmt: skip
