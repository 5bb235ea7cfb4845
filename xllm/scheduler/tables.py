"""Block tables: what ties requests to the pool. The only place where `Request.blocks` and its hashes are written."""

from collections.abc import Callable, Sequence

from xllm.core.request import Request
from xllm.kv import hashing
from xllm.kv.events import Origin
from xllm.kv.pool import BlockPool
from xllm.kv.ranges import Ranges

NEVER = 2**62  # as `num_published`: this sequence publishes nothing more


class BlockTables:
    """Takes, grows, publishes and returns the blocks of running requests. Works in blocks of `block_size` tokens.

    `promised` is what running requests may still allocate if every one grows as long as it may: the ledger of
    no-eviction admission.
    """

    def __init__(self, pool: BlockPool, ranges: Ranges | None = None):
        """With `ranges` requests see their blocks at places of their own."""
        self.pool = pool
        self._ranges = ranges
        # of the step that is being made
        self._to_publish: list[Request] = []
        self._being_written: set[bytes] = set()  # names
        self.block_size = pool.block_size
        self.on_published: Callable[[int, bytes, Origin | None], None] | None = None  # block, name, origin
        self._at_most = 0  # sum over running requests of the blocks each may hold
        self._held = 0  # sum over running requests of the blocks each holds

    @property
    def promised(self) -> int:
        return self._at_most - self._held

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def at_most(self, request: Request) -> int:
        return self.blocks_for(request.max_total_tokens)

    def blocks_needed(self, decoding: Sequence[Request]) -> int:
        """How many blocks the sequences together lack for their next step."""
        needed = 0
        for request in decoding:
            tokens = request.num_tokens
            if tokens < request.max_total_tokens:
                needed += max(0, self.blocks_for(tokens) - len(request.blocks))
        return needed

    def find(self, request: Request) -> list[int]:
        """Cached blocks a waiting request could start from; never all of its tokens, for the last one's logits are
        needed. Where prompt logprobs are still owed, only what lies before them counts."""
        if not self.pool.prefix_caching:
            return []
        limit = self.limit(request)
        return self.pool.match(request.block_hashes, limit)

    def limit(self, request: Request) -> int:
        """How many blocks of a waiting request could come from a cache; their names are known from then on."""
        reusable = request.num_known - 1
        if (
            request.params.prompt_logprobs is not None
            and request.num_prompt_logprobs < len(request.prompt_token_ids) - 1
        ):
            reusable = min(reusable, request.num_prompt_logprobs)
        limit = reusable // self.block_size
        self._hash(request, limit)
        return limit

    def names(self, request: Request) -> list[bytes]:
        """Of all full blocks of its prompt."""
        count = len(request.prompt_token_ids) // self.block_size
        self._hash(request, count)
        return request.block_hashes[:count]

    def take(self, request: Request, hits: list[int]) -> None:
        """Give an admitted request its table: `hits` shared, the rest allocated for all tokens it has now.

        The caller has seen to it that so many are available; it is a fault otherwise.
        """
        self.pool.share(hits)
        count = self.blocks_for(request.num_known) - len(hits)
        if count > self.pool.num_available:
            raise AssertionError(f"request {request.id} was admitted without the memory for it")
        if self._ranges is None:
            fresh = self.pool.allocate(count) or []
        else:
            request.range, fresh = self._ranges.take(hits, count)
        request.blocks = hits + fresh
        request.num_computed = len(hits) * self.block_size
        request.num_published = len(hits)
        self._at_most += self.at_most(request)
        self._held += len(request.blocks)
        if ahead := self.ahead(1):
            self.grow(request, request.num_known, ahead)

    def ahead(self, decoding: int) -> int:
        """So many tokens before a sequence needs another block it is to have one, when so many decode."""
        plenty = self._ranges is not None and self.pool.num_available > 2 * decoding
        return self._ranges.ahead if self._ranges is not None and plenty else 0

    def grow(self, request: Request, tokens: int, ahead: int = 0) -> list[int] | None:
        """The blocks that it lacks for so many tokens and, where that can be, `ahead` more; None where the pool has not so
        many."""
        have = len(request.blocks)
        count = self.blocks_for(min(tokens + ahead, request.max_total_tokens)) - have
        if count <= 0:
            return []
        if self._ranges is None:
            fresh = self.pool.allocate(count)
        else:
            fresh = self._ranges.grow(request.range, have, count, have * self.block_size - tokens)
        if fresh is not None:
            request.blocks += fresh
            self._held += count
        return fresh

    def shown(self, request: Request, first: int = 0) -> Sequence[int]:
        """Where kernels find a running request's blocks from `first` on."""
        if self._ranges is None:
            return request.blocks[first:]
        return self._ranges.places(request.range, request.blocks, first)

    def publish_in_step(self, request: Request) -> None:
        """The same, while the step is being made that writes the last of them. Others of that step may find them, but for
        pages that are seen through several places: what one kernel writes through one, the next may not see through
        another, where the two overlap."""
        if self._ranges is None:
            self.publish(request)
        elif self.pool.prefix_caching:
            full = min(request.num_computed, request.num_known) // self.block_size
            self._hash(request, full)
            self._being_written.update(request.block_hashes[request.num_published : full])
            self._to_publish.append(request)

    def stands_aside(self, request: Request, hits: int) -> bool:
        """Whether a waiting request had better wait for the next step, once: it lacks a block that this step writes."""
        if request.stood_aside or not self._being_written or hits >= len(request.block_hashes):
            return False
        request.stood_aside = request.block_hashes[hits] in self._being_written
        return request.stood_aside

    def close_step(self, step: int) -> int:
        """The step, the next, is complete. -> how many orders to map pages must have been carried out before it."""
        if self._ranges is None:
            return 0
        for request in self._to_publish:
            self.publish(request)
        self._to_publish.clear()
        self._being_written.clear()
        return self._ranges.due(step)

    def settle(self, step: int) -> None:
        """Steps up to `step` have run."""
        self.pool.settle(step)
        if self._ranges is not None:
            self._ranges.settle(step)

    def publish(self, request: Request) -> None:
        """Name the blocks that are full of known tokens and written by a step already planned."""
        end_of_next = (request.num_published + 1) * self.block_size
        if request.num_computed < end_of_next or not self.pool.prefix_caching:
            return
        full = min(request.num_computed, request.num_known) // self.block_size
        self._hash(request, full)
        recorded = self.pool.events is not None
        for i in range(request.num_published, full):
            origin = self._origin(request, i) if recorded else None
            block, name = request.blocks[i], request.block_hashes[i]
            if self.pool.publish(block, name, origin) and self.on_published is not None:
                self.on_published(block, name, origin)
        request.num_published = full

    def withdraw(self, request: Request) -> None:
        """The request failed, and what is in its blocks is not to be trusted: nobody new shall find them."""
        for block in request.blocks:
            self.pool.withdraw(block)

    def release(self, request: Request, after: int | None) -> None:
        """Give the table back once step `after` has run (None: now). The request is then as it was before `take`."""
        self.pool.release(request.blocks, after)
        if self._ranges is not None:
            self._ranges.release(request.range, after)
            request.range = -1
        self._at_most -= self.at_most(request)
        self._held -= len(request.blocks)
        request.blocks = []
        request.num_computed = 0
        request.num_published = 0

    def audit(self, running: Sequence[Request]) -> None:
        """Raise `AssertionError` where the ledger is not the sum over the running requests."""
        held = sum(len(request.blocks) for request in running)
        at_most = sum(self.at_most(request) for request in running)
        if (held, at_most) != (self._held, self._at_most):
            raise AssertionError(
                f"ledger says {self._held} blocks held and {self._at_most} at most, tables say {held} and {at_most}"
            )
        if self._ranges is not None:
            self._ranges.audit((request.range, request.blocks) for request in running)

    def origins(self, request: Request, first: int, count: int) -> list[Origin | None]:
        """Of `count` blocks from `first` on, where somebody wants to know: of names that exist."""
        if self.pool.events is None:
            return [None] * count
        return [self._origin(request, i) for i in range(first, first + count)]

    def _origin(self, request: Request, i: int) -> Origin:
        tokens = request.known_tokens(i * self.block_size, (i + 1) * self.block_size)
        if i == 0:
            return Origin(None, tokens, request.cache_salt)
        return Origin(request.block_hashes[i - 1], tokens)

    def _hash(self, request: Request, count: int) -> None:
        """Make sure that the first `count` blocks have names; so many must be full of known tokens."""
        names = request.block_hashes
        if len(names) < count:
            parent = names[-1] if names else hashing.root(request.cache_salt)
            tokens = request.known_tokens(len(names) * self.block_size, count * self.block_size)
            names += hashing.chain(parent, tokens, self.block_size)
