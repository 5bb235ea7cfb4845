"""Which KV blocks are on which instance, and in which tier: a router's copy of the prefix indexes of all instances.

Blocks are known by their names on the wire (`xllm.wire.kv_events.block_hash`), fed by the batches that instances
publish (docs/kv-events.md). One dict holds for every block who has it, as one integer: three bits per instance, one
per tier. So a block that four instances hold costs one entry, and one walk over a prompt's blocks finds the longest
cached prefix of every instance at once: two neighbouring blocks with the same integer need no work at all, and where
the integers differ only the instances whose bits changed are looked at.

Instances of other models or block sizes must not share an index: the model is not part of a block's name.
Not thread-safe: it belongs to the router's loop.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from xllm.kv.events import DEVICE, DISK, HOST
from xllm.wire.kv_events import AllBlocksCleared, BlockStored, KVEventBatch

TIERS = (DEVICE, HOST, DISK)  # nearest first; a medium of another name is passed over
Blocks = tuple[int, int, int]  # a count per tier
NOTHING: Blocks = (0, 0, 0)
_BITS = len(TIERS)
_ALL = (1 << _BITS) - 1
_TIER_OF = {medium: tier for tier, medium in enumerate(TIERS)}
# of the tiers that hold a block (a number below 8) the nearest; -1 where none does
_NEAREST = tuple((bits & -bits).bit_length() - 1 for bits in range(_ALL + 1))


@dataclass(slots=True)
class _Source:
    """One instance's stream of batches, and what it has told."""

    slot: int  # its place in the integers
    epoch: int = 0
    next: int = 0  # number of the batch that comes next
    known: bool = True  # no batch is missing
    held: set[int] = field(default_factory=set)  # blocks in any tier
    counts: list[int] = field(default_factory=lambda: [0] * _BITS)  # blocks per tier


class KvIndex:
    """`apply` in, `longest` out; every operation costs O(blocks it speaks of)."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._sources: dict[str, _Source] = {}
        self._instances: list[str] = []  # by slot; "" where the slot is free
        self._free: list[int] = []
        self._trusted = 0  # all bits of the instances whose batches are complete

    def __len__(self) -> int:
        """Different blocks that somebody holds."""
        return len(self._holders)

    def __contains__(self, instance: str) -> bool:
        return instance in self._sources

    # ---- what instances tell

    def apply(self, instance: str, number: int, batch: KVEventBatch) -> bool:
        """Take in one batch. False where batches before it are missing: it is not applied and the instance's blocks
        are left out of answers, until the batches from `wanted(instance)` on have been applied, or `reset` was called
        because nobody has them any more. What is known already, or comes from an earlier epoch, changes nothing.
        """
        source = self._source(instance)
        epoch = batch.events[0].epoch if batch.events else source.epoch
        if epoch < source.epoch:
            return source.known
        if epoch > source.epoch:  # a restarted engine numbers from 0 again
            self._empty(source)
            source.epoch, source.next = epoch, 0
        if number < source.next:
            return source.known
        self._trust(source, number == source.next)
        if not source.known:
            return False
        source.next += 1
        for event in batch.events:
            if isinstance(event, AllBlocksCleared):
                self._empty(source)
            elif (tier := _TIER_OF.get(event.medium or DEVICE)) is None:
                continue
            elif isinstance(event, BlockStored):
                self._store(source, tier, event.block_hashes)
            else:
                self._remove(source, tier, event.block_hashes)
        return True

    def reset(
        self,
        instance: str,
        epoch: int,
        next_number: int,
        blocks: Mapping[str, Iterable[int]] | None = None,
    ) -> None:
        """Begin anew: the instance holds `blocks` (by medium, a snapshot; none by default) and its batches go on from
        `next_number`. An empty beginning where the past is lost misses hits and claims none."""
        source = self._source(instance)
        self._empty(source)
        source.epoch, source.next = epoch, next_number
        self._trust(source, True)
        for medium, hashes in (blocks or {}).items():
            if (tier := _TIER_OF.get(medium)) is not None:
                self._store(source, tier, hashes)

    def drop(self, instance: str) -> None:
        """Forget an instance and all its blocks. A batch that is applied afterwards makes it known again: follow nobody
        who has left."""
        source = self._sources.pop(instance, None)
        if source is None:
            return
        self._empty(source)
        self._instances[source.slot] = ""
        self._free.append(source.slot)

    # ---- what is known

    def known(self, instance: str) -> bool:
        """All that the instance has published has been applied, as far as its numbers tell."""
        source = self._sources.get(instance)
        return source is not None and source.known

    def wanted(self, instance: str) -> int:
        """Number of the first batch that has not been applied."""
        source = self._sources.get(instance)
        return 0 if source is None else source.next

    def totals(self, instance: str) -> Blocks:
        """Blocks it holds per tier; one that lies in two tiers counts in both."""
        source = self._sources.get(instance)
        return NOTHING if source is None else (source.counts[0], source.counts[1], source.counts[2])

    def longest(self, hashes: Sequence[int]) -> dict[str, Blocks]:
        """The longest prefix of `hashes` that each instance holds without a hole, as blocks per tier; a block that
        lies in several tiers counts in the nearest. Instances that hold nothing of it, or whose index is not known,
        are not in the answer.

        O(hashes + changes), where a change is an instance whose tier differs from one block to the next: along one
        prefix an instance moves down a tier or drops out, each about once.
        """
        found: dict[int, list[int]] = {}  # blocks per tier, by the shift of the instance's bits
        since: dict[int, int] = {}  # the position from which its bits have been what they are
        alive, before = self._trusted, 0
        get = self._holders.get
        if not hashes or not get(hashes[0], 0) & alive:
            return {}
        for position, name in enumerate(hashes):
            holders = get(name, 0) & alive
            if holders == before:
                continue
            ended = _turn(found, since, before, holders, position)
            # who does not hold the first block holds no prefix
            alive = alive & ~ended if position else _spread(found)
            before = holders
            if not holders:
                break
        _turn(found, since, before, 0, len(hashes))
        return {self._instances[shift // _BITS]: (n[0], n[1], n[2]) for shift, n in found.items()}

    # ---- inside

    def _source(self, instance: str) -> _Source:
        source = self._sources.get(instance)
        if source is None:
            if self._free:
                slot = self._free.pop()
                self._instances[slot] = instance
            else:
                slot = len(self._instances)
                self._instances.append(instance)
            source = self._sources[instance] = _Source(slot)
            self._trust(source, True)
        return source

    def _trust(self, source: _Source, known: bool) -> None:
        source.known = known
        bits = _ALL << source.slot * _BITS
        self._trusted = self._trusted | bits if known else self._trusted & ~bits

    def _store(self, source: _Source, tier: int, hashes: Iterable[int]) -> None:
        holders, held = self._holders, source.held
        bit = 1 << source.slot * _BITS + tier  # one integer for all blocks that it alone holds there
        before = len(holders)
        stored = 0
        for name in hashes:
            now = holders.setdefault(name, bit)
            if len(holders) > before:
                before += 1
            elif now & bit:
                continue
            else:
                holders[name] = now | bit
            stored += 1
            held.add(name)
        source.counts[tier] += stored

    def _remove(self, source: _Source, tier: int, hashes: Iterable[int]) -> None:
        holders, held = self._holders, source.held
        shift = source.slot * _BITS
        bit = 1 << shift + tier
        for name in hashes:
            now = holders.get(name, 0)
            if not now & bit:
                continue
            source.counts[tier] -= 1
            now ^= bit
            if not now:
                del holders[name]
            else:
                holders[name] = now
            if not now >> shift & _ALL:
                held.discard(name)

    def _empty(self, source: _Source) -> None:
        holders = self._holders
        keep = ~(_ALL << source.slot * _BITS)
        for name in source.held:
            left = holders[name] & keep
            if left:
                holders[name] = left
            else:
                del holders[name]
        source.held = set()
        source.counts = [0] * _BITS


def _turn(
    found: dict[int, list[int]], since: dict[int, int], before: int, holders: int, position: int
) -> int:
    """The integers differ between the blocks before `position` and the one there: count the runs that end. Returns the
    bits of the instances that hold the block there in no tier."""
    changed = before ^ holders
    ended = 0
    while changed:
        shift = ((changed & -changed).bit_length() - 1) // _BITS * _BITS
        bits = _ALL << shift
        changed &= ~bits
        if had := before >> shift & _ALL:
            found[shift][_NEAREST[had]] += position - since[shift]
        else:
            found[shift] = [0] * _BITS
        since[shift] = position
        if not holders & bits:
            ended |= bits
    return ended


def _spread(shifts: Iterable[int]) -> int:
    """All bits of the instances whose bits begin at `shifts`."""
    return sum(_ALL << shift for shift in shifts)
