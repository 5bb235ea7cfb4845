"""Who holds which KV block. Integers only: the memory itself belongs to the executor.

Every block is in exactly one state:

    free       nobody's, nameless; the next to be handed out
    reusable   nobody's, but its KV is known to the prefix index; evicted least recently used first
    held       someone counts on it: requests that share it, or steps in flight that may still write it

The trick that makes overlap safe is that a release *after step n* leaves its reference in place until `settle(n)`.
So a block that a submitted step writes cannot be handed out, a prefix hit on it is an ordinary second reference, and
nobody has to ask what is in flight. Not thread-safe: it belongs to the scheduler's thread.

An *elastic* pool has memory for some of its blocks only; the others do not exist until `add` brings them, and `drop`
takes them away while nobody holds them. It hands out the lowest free block first, so that use gathers there and the
upper end comes to be unused. See `xllm.kv.elastic` for who decides.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence

from xllm.kv.events import EventLog, Origin
from xllm.kv.free import FreeBlocks, Lowest, Ordered, Stack
from xllm.kv.index import PrefixIndex

_MISSING = -1  # counts as the references of a block that does not exist


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens. Hot operations are O(1) per block and allocate no objects per block.

    With `events`, what becomes and ceases to be cached is recorded there. With `mapped` the pool is elastic and only
    its first `mapped` blocks exist at the start; taking and giving back are O(log num_blocks) per block then. With
    `claimable` somebody may `claim` certain blocks.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        prefix_caching: bool = True,
        events: EventLog | None = None,
        mapped: int | None = None,
        claimable: bool = False,
    ):
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks and tokens in them, not {num_blocks} x {block_size}")
        if mapped is not None and not 0 <= mapped <= num_blocks:
            raise ValueError(f"of {num_blocks} blocks {mapped} cannot exist")
        self.num_blocks = num_blocks  # those that do not exist included
        self.elastic = mapped is not None
        self.num_mapped = num_blocks if mapped is None else mapped  # blocks that exist
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.events = events
        self.index = PrefixIndex(num_blocks, events)
        self._free: FreeBlocks = (
            Lowest(self.num_mapped)
            if self.elastic
            else Ordered(num_blocks)
            if claimable
            else Stack(num_blocks)
        )
        self._references = [0] * self.num_mapped  # holders, those that leave after a step included
        self._references += [_MISSING] * (num_blocks - self.num_mapped)
        self._leaving = [0] * num_blocks  # of the references, those that end when a step settles
        self._departures: deque[tuple[int, Sequence[int]]] = deque()  # (step, blocks), steps ascending
        self._num_returning = 0  # blocks all of whose references are leaving

        self.moment = 0.0  # what time it is for `last_used`; who asks there sets it
        self._left_at = [0.0] * num_blocks if self.elastic else []  # moment a reference to it last ended

        # statistics, ever growing
        self.queried_tokens = 0
        self.hit_tokens = 0
        self.evictions = 0

    # how full it is

    @property
    def num_available(self) -> int:
        """Blocks `allocate` can hand out now: free and reusable ones."""
        return len(self._free) + self.index.num_shelved

    @property
    def num_free(self) -> int:
        """Of these, the ones that are cached nowhere."""
        return len(self._free)

    @property
    def num_returning(self) -> int:
        """Blocks that become available by themselves once the steps in flight have run."""
        return self._num_returning

    @property
    def usage(self) -> float:
        """Share of all `num_blocks` that is held, 0 to 1. Reusable blocks do not count: they cost nobody anything."""
        return (self.num_mapped - self.num_available) / self.num_blocks

    # taking

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each, or None (and nothing done) where fewer are available."""
        free, references = self._free, self._references
        if count <= len(free):
            blocks = free.take(count)
        elif count > self.num_available:
            return None
        else:
            blocks = free.take(len(free))
            while len(blocks) < count:
                blocks.append(self.index.evict())
                self.evictions += 1
        for block in blocks:
            references[block] = 1
        return blocks

    def claim(self, block: int, *, cached: bool) -> bool:
        """This block with one reference, as from `allocate`. False where somebody holds it, or where it is cached and only
        one that is not will do. The pool is a `claimable` one."""
        if self._references[block] != 0:
            return False
        if self.index.is_shelved(block):
            if not cached:
                return False
            self.index.discard(block)
            self.evictions += 1
        else:
            self._free.remove(block)
        self._references[block] = 1
        return True

    def free_blocks(self) -> Iterator[int]:
        """Those that are free, of a `claimable` pool those first that `allocate` hands out last. Not to be kept while
        blocks are taken or given back."""
        return iter(self._free)

    def is_free(self, block: int) -> bool:
        """Whether the block exists, nobody holds it and it is cached nowhere."""
        return self._references[block] == 0 and not self.index.is_shelved(block)

    @property
    def oldest(self) -> int | None:
        """The cached block that would be given up first, if there is one that nobody holds."""
        return self.index.oldest

    def match(self, names: Sequence[bytes], limit: int | None = None) -> list[int]:
        """Blocks of the longest cached prefix of `names`, at most `limit`; not yet held: see `share`."""
        return self.index.find(names, limit) if self.prefix_caching else []

    def num_reusable(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are reusable: sharing them makes that many fewer available."""
        references = self._references
        return sum(references[block] == 0 for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each of `blocks`, as `match` found them. A free block cannot be shared: ValueError."""
        references, leaving = self._references, self._leaving
        for block in blocks:
            if references[block] <= 0:
                if not self.index.is_shelved(block):
                    raise ValueError(f"block {block} is free: there is nothing in it to share")
                self.index.unshelve(block)
            elif references[block] == leaving[block]:
                self._num_returning -= 1
            references[block] += 1

    # giving back

    def release(self, blocks: Sequence[int], after: int | None = None) -> None:
        """End one reference to each block of a sequence, in table order; with `after`, when that step settles.

        None means at once: nothing in flight can touch them. Of a sequence, the tail becomes the least recently
        used, so that eviction eats prefixes last. `ValueError` where a block has no reference left to end, or where
        `after` lies before an earlier one; nothing is done then.
        """
        self._check_releasable(blocks, after)
        references, leaving = self._references, self._leaving
        if after is None:
            for block in reversed(blocks):
                self._end_reference(block)
                if references[block] == leaving[block] > 0:
                    self._num_returning += 1
            if self.elastic:
                self._note_use(blocks)
            return
        for block in blocks:
            leaving[block] += 1
            if leaving[block] == references[block]:
                self._num_returning += 1
        self._departures.append((after, tuple(blocks)))

    def settle(self, step: int) -> None:
        """Steps up to `step` have run: what was to leave after them leaves."""
        departures, leaving = self._departures, self._leaving
        while departures and departures[0][0] <= step:
            blocks = departures.popleft()[1]
            for block in reversed(blocks):
                if leaving[block] == self._references[block] == 1:
                    self._num_returning -= 1
                leaving[block] -= 1
                self._end_reference(block)
            if self.elastic:
                self._note_use(blocks)

    def _check_releasable(self, blocks: Sequence[int], after: int | None) -> None:
        if len(set(blocks)) != len(blocks):
            raise ValueError("a block stands twice in what is released")
        for block in blocks:
            if self._references[block] <= self._leaving[block]:
                raise ValueError(f"block {block} is released more often than it is held")
        if after is not None and self._departures and after < self._departures[-1][0]:
            raise ValueError(
                f"released after step {after}, but others after step {self._departures[-1][0]} already"
            )

    def _note_use(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._left_at[block] = self.moment

    def _end_reference(self, block: int) -> None:
        self._references[block] -= 1
        if self._references[block] == 0:
            if self.index.name_of(block) is None:
                self._free.put(block)
            else:
                self.index.shelve(block)

    # the prefix cache

    def publish(self, block: int, name: bytes, origin: Origin | None = None) -> bool:
        """From now on `match` finds `block` under `name`. Steps run in order, so a block may be published as soon as
        the step that fills it is planned. False where caching is off or the name (or the block) is taken.

        A pool that records events needs the name's `origin`.
        """
        if not self.prefix_caching:
            return False
        if self._references[block] <= 0:
            raise ValueError(f"block {block} is not held: its content is nobody's to publish")
        return self.index.add(block, name, origin)

    def withdraw(self, block: int) -> None:
        """The content of a held block is not to be trusted: nobody new shall find it."""
        if self._references[block] <= 0:
            raise ValueError(f"block {block} is not held")
        self.index.remove(block)

    def count_lookup(self, queried: int, hit: int) -> None:
        """Account one request's lookup, in tokens."""
        self.queried_tokens += queried
        self.hit_tokens += hit

    def reset_cache(self, *, everywhere: bool = True) -> None:
        """Forget all names. Held blocks stay held and become free, not reusable, in the end. `everywhere`: so do lower tiers."""
        for block in reversed(self.index.clear(everywhere=everywhere)):
            self._free.put(block)

    # blocks that come and go

    def add(self, first: int, count: int) -> None:
        """The blocks from `first` on come into being, free. `ValueError` where one of them exists, nothing is done."""
        if any(references != _MISSING for references in self._span(first, count)):
            raise ValueError(f"of the blocks {first} to {first + count - 1} some exist already")
        for block in range(first, first + count):
            self._references[block] = 0
            self._free.put(block)
        self._left_at[first : first + count] = [self.moment] * count
        self.num_mapped += count

    def drop(self, first: int, count: int) -> bool:
        """The blocks from `first` on cease to exist, and with them what is cached there. False, and nothing done, where
        somebody holds one of them; `ValueError` where one does not exist. O(count)."""
        span = self._span(first, count)
        if _MISSING in span:
            raise ValueError(f"of the blocks {first} to {first + count - 1} some do not exist")
        if any(span):
            return False
        self._remove(range(first, first + count))
        return True

    def drop_unheld(self, first: int, count: int) -> int:
        """Like `drop`, but of those that exist only the ones that nobody holds go. Returns how many are left. O(count),
        and little more than a look where there is nothing to do."""
        span = self._span(first, count)
        unheld = span.count(0)
        if unheld:
            self._remove([first + i for i, references in enumerate(span) if references == 0])
        return count - span.count(_MISSING) - unheld

    def last_used(self, first: int, count: int) -> float | None:
        """The moment from which on nobody has held any of the blocks from `first` on, all of which exist; None where
        somebody does. O(count)."""
        return None if any(self._span(first, count)) else max(self._left_at[first : first + count])

    def exists(self, block: int) -> bool:
        return self._references[block] != _MISSING

    def _span(self, first: int, count: int) -> list[int]:
        """References of the blocks from `first` on. `ValueError` where they are not this pool's to add or drop."""
        if not self.elastic:
            raise ValueError("this pool was made with all its blocks: none come and go")
        if first < 0 or count < 1 or first + count > self.num_blocks:
            raise ValueError(f"{count} blocks from {first} on are not among {self.num_blocks}")
        return self._references[first : first + count]

    def _remove(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if self.index.is_shelved(block):
                self.index.discard(block)
                self.evictions += 1
            else:
                self._free.remove(block)
            self._references[block] = _MISSING
        self.num_mapped -= len(blocks)

    # integrity

    def is_available(self, block: int) -> bool:
        """Whether the block exists and nobody holds it."""
        return self._references[block] == 0

    def audit(self, holders: Iterable[Sequence[int]] = ()) -> None:
        """Raise `AssertionError` with a sentence on any inconsistency. `holders` are all live block tables. O(blocks)."""
        self.index.audit()
        held = Counter(block for table in holders for block in table)
        leaving = Counter(block for _, blocks in self._departures for block in blocks)
        free = Counter(self._free)
        for block in range(self.num_blocks):
            references = self._references[block]
            if references == _MISSING:
                self._audit_missing(block, held[block] + leaving[block] + free[block])
                continue
            if references != held[block] + leaving[block]:
                raise AssertionError(
                    f"block {block} counts {references} references, but {held[block]} sequences hold it and "
                    f"{leaving[block]} releases wait for it"
                )
            if leaving[block] != self._leaving[block]:
                raise AssertionError(
                    f"block {block}: {self._leaving[block]} releases counted, {leaving[block]} waiting"
                )
            states = free[block] + self.index.is_shelved(block) + (references > 0)
            if states != 1:
                raise AssertionError(
                    f"block {block} is in {states} states; free, reusable or held is one each"
                )
            if free[block] and self.index.name_of(block) is not None:
                raise AssertionError(f"block {block} is free but has a name")
        returning = sum(r > 0 and r == m for r, m in zip(self._references, self._leaving, strict=True))
        if returning != self._num_returning:
            raise AssertionError(f"{self._num_returning} blocks counted as returning, {returning} are")
        if self.num_blocks - self._references.count(_MISSING) != self.num_mapped:
            raise AssertionError(f"{self.num_mapped} blocks are said to exist, but others do")

    def _audit_missing(self, block: int, owners: int) -> None:
        if owners or self.index.name_of(block) is not None or self._leaving[block]:
            raise AssertionError(f"block {block} does not exist, but somebody has it or it has a name")
