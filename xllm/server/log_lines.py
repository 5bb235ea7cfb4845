"""What child processes write, as lines: for a terminal with the name of who said it, for the last words of who died, for files."""

import logging
import re
import zlib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO

LONGEST = 8000  # characters of a line
KEPT = 200  # lines for the view and for last words
COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "bright_cyan", "bright_green", "bright_magenta")

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")

Line = tuple[str, str]  # who, what


class Splitter:
    """Bytes as they come -> lines as a person would have seen them: of a progress bar that draws over itself the last state,
    no colours, no control characters, and an end to lines that have none."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        *whole, rest = (self._rest + data).split(b"\n")
        if len(rest) > LONGEST:
            head, _, tail = rest.rpartition(b"\r")
            if len(tail) > LONGEST or not tail:
                whole.append(rest)
                tail = b""
            del head  # was drawn over
            rest = tail
        self._rest = rest
        return [line for raw in whole if (line := _clean(raw))]

    def end(self) -> list[str]:
        rest, self._rest = self._rest, b""
        return [line] if (line := _clean(rest)) else []


def _clean(raw: bytes) -> str:
    text = raw.decode(errors="replace").rstrip()
    shown = [part for part in text.split("\r") if part.strip()]
    line = _CONTROL.sub("", _ESCAPES.sub("", shown[-1] if shown else "")).rstrip()
    return line if len(line) <= LONGEST else line[:LONGEST] + " …"


class LogLines:
    """Collects lines; `show` is called with each, and `directory` gets one file per speaker, added to at its end."""

    def __init__(self, show: Callable[[Line], None], directory: Path | None = None):
        self.show = show
        self.kept: deque[Line] = deque(maxlen=KEPT)
        self._directory = directory
        self._files: dict[str, IO[str]] = {}

    def add(self, who: str, what: str) -> None:
        self.kept.append((who, what))
        if self._directory is not None:
            file = self._files.get(who)
            if file is None:
                file = (self._directory / f"{who}.log").open("a", encoding="utf-8", buffering=1)
                self._files[who] = file
            file.write(what + "\n")
        self.show((who, what))

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


class ToLines(logging.Handler):
    """Our own log, as one more speaker."""

    def __init__(self, lines: LogLines, who: str):
        super().__init__()
        self._lines, self._who = lines, who

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.add(self._who, self.format(record))


def colour(who: str) -> str:
    """The same for a name whenever it is asked."""
    name, _, number = who.rpartition("-")
    first = zlib.crc32(name.encode()) if name else zlib.crc32(who.encode())
    return COLOURS[(first + (int(number) if number.isdigit() else 0)) % len(COLOURS)]
