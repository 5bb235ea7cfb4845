"""What the scheduler believes of a store that other engines use as well: which names it has and which it has not.

What a store holds changes without a word to us. So an answer counts for a while only, and to be wrong costs no more than
a load that ends early or a block computed once more. Not thread-safe: it belongs to the scheduler's thread.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from xllm.core.transfer import Seen, TierStats

REMOTE = "REMOTE"
HELD_S = 60.0  # for so long a name is taken to be there once it was
ABSENT_S = (
    2.0  # and not to be: long enough for a burst of one prompt, soon over once somebody has computed it
)
MOST_NAMES = 1 << 18  # that anything is known of


class StoreView:
    """Beliefs with an end, and the questions under way. `now` (seconds, any origin) is set by whoever has a clock."""

    def __init__(self, most_names: int = MOST_NAMES):
        self.now = 0.0
        self._most = most_names
        self._believed: OrderedDict[bytes, tuple[bool, float]] = OrderedDict()  # held or not, and until when
        self._disowned: OrderedDict[bytes, None] = OrderedDict()  # what lies there may be unsound
        self._silent_until = 0.0
        self._looks: dict[int, Sequence[bytes]] = {}  # by ticket; nothing of those that became void
        self.hits = self.stored = self.failures = self.skipped = 0  # ever growing

    @property
    def silent(self) -> bool:
        """It did not answer a while ago: nothing is asked of it, or sent there."""
        return self.now < self._silent_until

    def has(self, name: bytes) -> bool:
        """Whether a load of it may be tried."""
        held, until = self._believed.get(name, (False, 0.0))
        return held and self.now < until and not self.silent and name not in self._disowned

    def is_open(self, name: bytes) -> bool:
        """Whether it makes sense to ask for this name."""
        _, until = self._believed.get(name, (False, 0.0))
        return self.now >= until and not self.silent and name not in self._disowned

    def wants(self, name: bytes) -> bool:
        """Whether to send a block there that has just been computed."""
        if self.silent or name in self._disowned:
            self.skipped += 1
            return False
        return not self.has(name)

    # questions

    def look(self, ticket: int, names: Sequence[bytes]) -> None:
        self._looks[ticket] = names

    def seen(self, news: Seen) -> bool:
        """Take in an answer; `KeyError` where nobody asked. False where the store did not answer."""
        names = self._looks.pop(news.ticket)
        if news.pause > 0:
            self.failures += 1
            self._silent_until = max(self._silent_until, self.now + news.pause)
            return False
        for name in names[: news.count]:
            self._believe(name, True)
        if news.count < len(
            names
        ):  # of those behind it nothing was said, and nothing will be asked before it is there
            self._believe(names[news.count], False)
        return True

    @property
    def looks(self) -> int:
        """Questions under way."""
        return len(self._looks)

    # what else is learnt

    def sent(self, name: bytes, stored: bool) -> None:
        if stored:
            self.stored += 1
            self._believe(name, True)
        else:
            self.failures += 1

    def missed(self, name: bytes) -> None:
        """It was not there, or not sound, when it was to be loaded."""
        self.failures += 1
        self._believe(name, False)

    def disown(self, names: Iterable[bytes]) -> None:
        """What may lie there under these names is not to be trusted, by this engine not for as long as it remembers."""
        for name in names:
            self._believed.pop(name, None)
            self._disowned[name] = None
        while len(self._disowned) > self._most:
            self._disowned.popitem(last=False)

    def clear(self) -> None:
        """Nothing of what it had can be found any more, answers that are under way included."""
        self._believed.clear()
        self._disowned.clear()
        self._looks = dict.fromkeys(self._looks, ())

    def _believe(self, name: bytes, held: bool) -> None:
        self._believed[name] = held, self.now + (HELD_S if held else ABSENT_S)
        self._believed.move_to_end(name)
        while len(self._believed) > self._most:
            self._believed.popitem(last=False)

    @property
    def stats(self) -> TierStats:
        """How much it holds, and what it gives up, only the store itself knows."""
        return TierStats(
            medium=REMOTE, capacity=0, used=0, hits=self.hits, stored=self.stored, evicted=0,
            failures=self.failures, skipped=self.skipped,
        )  # fmt: skip
