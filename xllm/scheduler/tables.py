"""Block tables: what ties requests to the pool. The only place where `Request.blocks` and its hashes are written."""

from collections.abc import Callable, Sequence

from xllm.core.request import Request
from xllm.kv import hashing
from xllm.kv.events import Origin
from xllm.kv.pool import BlockPool

NEVER = 2**62  # as `num_published`: this sequence publishes nothing more


class BlockTables:
    """Takes, grows, publishes and returns the blocks of running requests. Works in blocks of `block_size` tokens.

    `promised` is what running requests may still allocate if every one grows as long as it may: the ledger of
    no-eviction admission.
    """

    def __init__(self, pool: BlockPool):
        self.pool = pool
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

    def take(self, request: Request, hits: list[int]) -> None:
        """Give an admitted request its table: `hits` shared, the rest allocated for all tokens it has now.

        The caller has seen to it that so many are available; it is a fault otherwise.
        """
        self.pool.share(hits)
        fresh = self.pool.allocate(self.blocks_for(request.num_known) - len(hits))
        if fresh is None:
            raise AssertionError(f"request {request.id} was admitted without the memory for it")
        request.blocks = hits + fresh
        request.num_computed = len(hits) * self.block_size
        request.num_published = len(hits)
        self._at_most += self.at_most(request)
        self._held += len(request.blocks)

    def grow(self, request: Request, count: int) -> list[int] | None:
        """`count` blocks more, or None where the pool has not so many."""
        fresh = self.pool.allocate(count)
        if fresh is not None:
            request.blocks += fresh
            self._held += count
        return fresh

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
