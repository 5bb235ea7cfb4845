"""Stop strings in a stream of text: held back while they might be coming, found wherever tokens cut them."""

from collections import deque
from collections.abc import Sequence

from xllm.core.errors import InvalidRequest

MAX_STOP_CHARACTERS = (
    8192  # of all stop strings of a request together: the automaton has a node per character
)


class StopMatcher:
    """Finds the first stop string to be *completed*; of several completed by one character, the longest.

    Defined per character, so the way the text is cut into pushes cannot matter. This is the automaton of Aho
    and Corasick ("Efficient string matching", 1975): a node is a beginning of some stop string, and the
    current node the longest one that the text ends with. Its depth is therefore exactly what must be held
    back, and a character costs constant time on average however many stop strings there are.

    Raises `InvalidRequest` if the stop strings are empty strings or together too long.
    """

    def __init__(self, stops: Sequence[str], include: bool = False):
        if not all(stops) or sum(map(len, stops)) > MAX_STOP_CHARACTERS:
            raise InvalidRequest(
                f"stop takes non-empty strings of at most {MAX_STOP_CHARACTERS} characters together",
                param="stop",
            )
        self._include = include
        self._next: list[dict[str, int]] = [{}]  # per node: character -> deeper node
        self._depth = [0]
        self._match: list[str | None] = [None]  # per node: the longest stop string that it ends with
        self._fail = [0]  # per node: the longest other node that it ends with
        for stop in stops:
            self._add(stop)
        self._link()
        self._node = 0
        self._held = ""  # with include nothing is held back: what a match adds only ever follows

    def push(self, text: str, armed: bool = True) -> tuple[str, str | None]:
        """The text that may be shown now, and the stop string that ended it, if one did.

        `armed=False` takes the text without looking for ends in it, as while fewer than `min_tokens` are out;
        a stop string may begin there and be completed later. After a match nothing may be pushed any more.
        """
        node = self._node
        for i, character in enumerate(text):
            while node and character not in self._next[node]:
                node = self._fail[node]
            node = self._next[node].get(character, 0)
            matched = self._match[node]
            if matched is not None and armed:
                return self._end(self._held + text[: i + 1], matched)
        self._node = node
        text = self._held + text
        shown = len(text) if self._include else len(text) - self._depth[node]
        self._held = text[shown:]
        return text[:shown], None

    def finish(self) -> str:
        """What was held back: the text ended before it became a stop string."""
        held, self._held, self._node = self._held, "", 0
        return held

    def _end(self, text: str, matched: str) -> tuple[str, str]:
        self._held = ""
        return text if self._include else text[: len(text) - len(matched)], matched

    def _add(self, stop: str) -> None:
        node = 0
        for character in stop:
            if character not in self._next[node]:
                self._next[node][character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[node] + 1)
                self._match.append(None)
                self._fail.append(0)
            node = self._next[node][character]
        self._match[node] = stop

    def _link(self) -> None:
        """Set `_fail` and inherited matches, nearest nodes first: what a node falls back to is ready."""
        queue = deque(self._next[0].values())
        while queue:
            node = queue.popleft()
            for character, child in self._next[node].items():
                fail = self._fail[node]
                while fail and character not in self._next[fail]:
                    fail = self._fail[fail]
                self._fail[child] = self._next[fail].get(character, 0)
                self._match[child] = self._match[child] or self._match[self._fail[child]]
                queue.append(child)
