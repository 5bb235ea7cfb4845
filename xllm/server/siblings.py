"""Processes of one router that share a port: a client that asks about a request may reach another one than the request did.

Each listens at a Unix socket of a directory they share as well, and asks the others there what it does not know itself.
"""

import asyncio
import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import httpx

VARIABLE = "XLLM_ROUTER_GROUP"  # set by the first process for those that it starts: directory and number
ASKED = "x-xllm-sibling"  # a question from a sibling is not passed on
PATIENCE_S = 1.0


@dataclass(frozen=True)
class Siblings:
    directory: Path
    number: int

    @classmethod
    def from_environment(cls) -> "Siblings | None":
        directory, _, number = os.environ.get(VARIABLE, "").rpartition(":")
        return cls(Path(directory), int(number)) if directory and number.isdigit() else None

    def variable(self) -> dict[str, str]:
        return {VARIABLE: f"{self.directory}:{self.number}"}

    def listen(self) -> socket.socket:
        """In place of the one that a predecessor has left."""
        path = self._path(self.number)
        path.unlink(missing_ok=True)
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.bind(str(path))
        return made

    async def ask(self, path: str, authorization: str | None) -> list[httpx.Response]:
        """What the others answer to a GET; those that do not answer are left out."""
        headers = {ASKED: "1"} | ({"authorization": authorization} if authorization else {})
        others = [
            other for other in sorted(self.directory.glob("*.sock")) if other != self._path(self.number)
        ]
        answers = await asyncio.gather(*(_get(other, path, headers) for other in others))
        return [answer for answer in answers if answer is not None]

    def _path(self, number: int) -> Path:
        return self.directory / f"{number}.sock"


async def _get(at: Path, path: str, headers: dict[str, str]) -> httpx.Response | None:
    with contextlib.suppress(httpx.HTTPError):
        transport = httpx.AsyncHTTPTransport(uds=str(at))
        async with httpx.AsyncClient(transport=transport, timeout=PATIENCE_S, trust_env=False) as http:
            return await http.get(f"http://router{path}", headers=headers)
    return None
