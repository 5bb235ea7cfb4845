"""The request as the scheduler sees it. Only the scheduler writes one; everybody else gets copies of parts."""

import enum
from dataclasses import dataclass, field

from xllm.core.peers import KvFrom
from xllm.core.sampling import SamplingParams


class Phase(enum.Enum):
    WAITING = "waiting"  # in the queue; holds no slot; blocks only if it was preempted to swap (not yet)
    FETCHING = "fetching"  # stands aside while KV comes up from a lower tier or from a peer; holds neither
    RUNNING = "running"  # holds a slot and blocks
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    # who asked, and what: set once at admission
    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival: float  # seconds, scheduler clock
    max_total_tokens: int  # prompt + output at most: min(max_model_len, prompt + max_tokens)
    seed: int  # resolved: the user's, or drawn at admission
    stop_ids: frozenset[int] = (
        frozenset()
    )  # what ends it: end-of-sequence ids (unless ignored) and stop_token_ids
    eos_ids: frozenset[int] = (
        frozenset()
    )  # of stop_ids, those that are the model's own (stop_reason stays None)
    priority: int = 0  # lower runs first, as in vLLM
    deadline: float | None = None  # scheduler clock; order "deadline" sorts by it
    cache_salt: str = ""
    kv_from: KvFrom | None = None  # whom to ask for KV that is missing; None once that was done

    # where it stands: the scheduler's
    phase: Phase = Phase.WAITING
    # known to the host; lags what is in flight. At the beginning what was generated elsewhere
    output_token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0  # tokens whose KV is written, or will be by a step already submitted
    num_in_flight: int = 0  # sampled tokens the device has or will have but the host does not know yet
    slot: int = -1
    range: int = -1  # of places, where the pool is contiguous
    stood_aside: bool = False  # one step long, for a prefix that another sequence computed in that step
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of full blocks of known tokens
    num_published: int = 0  # of blocks, how many the prefix index knows under their hash
    num_cached_tokens: int = 0
    fetched_tokens: int = 0  # whose KV came from a peer
    fetch_s: float = 0.0  # how long it stood aside for that
    num_preemptions: int = 0
    first_scheduled: float | None = None
    rank: tuple[float, int] = (
        0.0,
        0,
    )  # the order policy's: smaller goes first; the second number breaks ties
    num_prompt_logprobs: int = 0  # of the prompt, how many positions' logprobs have been sent out

    def known_tokens(self, start: int, stop: int) -> list[int]:
        """Tokens at positions start .. stop - 1, as far as the host knows them."""
        prompt = len(self.prompt_token_ids)
        if start >= prompt:
            return self.output_token_ids[start - prompt : stop - prompt]
        return self.prompt_token_ids[start:stop] + self.output_token_ids[: max(0, stop - prompt)]

    @property
    def num_known(self) -> int:
        """Tokens whose value the host knows."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that exist once every submitted step has run."""
        return self.num_known + self.num_in_flight
