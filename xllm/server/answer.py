"""What a terminal command gets from whoever answers: the engine in this process, or a server."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of an answer. `total_tokens` is of the whole answer, where the server says so at its end."""

    text: str
    tokens: int = 0
    total_tokens: int | None = None


Answer = Generator[Piece, None, None]


class Model(Protocol):
    """Closing an answer before its end stops the model."""

    def chat(self, messages: list[dict[str, str]]) -> Answer: ...

    def complete(self, prompt: str) -> Answer: ...

    def close(self) -> None: ...
