"""Server-sent events as OpenAI-style servers write them, cut out of a byte stream however it was chunked."""

import re

_LINE_END = re.compile(rb"\r\n|\n|\r")


class SseParser:
    """Feed bytes, get the `data` of each complete event. One parser per response.

    Comments, `event`, `id` and `retry` lines are skipped; several `data` lines of one event are joined by a newline,
    as the WHATWG specification says.
    """

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        buffer = self._buffer + chunk
        held = b""
        if buffer.endswith(b"\r"):  # the \n of a \r\n may still be on its way
            buffer, held = buffer[:-1], b"\r"
        lines = _LINE_END.split(buffer) if b"\r" in buffer else buffer.split(b"\n")
        self._buffer = lines.pop() + held
        events = []
        for line in lines:
            if line:
                self._field(line)
            elif self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events

    def close(self) -> list[bytes]:
        """The last event when the server ended without the blank line after it."""
        if line := self._buffer.rstrip(b"\r"):
            self._field(line)
        self._buffer = b""
        rest, self._data = self._data, []
        return [b"\n".join(rest)] if rest else []

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
