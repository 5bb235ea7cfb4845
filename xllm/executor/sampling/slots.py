"""What the sampler knows of the sequence in a slot, on the host and on the device."""

import enum
from dataclasses import dataclass, field

import torch
from torch import Tensor

from xllm.core.plan import NewSequence
from xllm.core.sampling import SamplingParams
from xllm.executor.sampling.random import start_of

_MAX_INVERSE = (
    1e30  # of a temperature so low that only the best token is left; finite, as 0 times it must be 0
)


class Way(enum.Enum):
    """How a row's token is found; min-p is no way of its own, as its threshold is known beforehand."""

    GREEDY = enum.auto()
    PLAIN = enum.auto()
    TOP_P = enum.auto()  # and no top-k
    TOP_K = enum.auto()  # perhaps with top-p


@dataclass(slots=True)
class Slot:
    """Made at admission. What speaks of tokens outside the vocabulary is left out: it can have no effect."""

    params: SamplingParams
    prompt_len: int
    top_k: int  # 0: all
    stop_ids: list[int] = field(default_factory=list)
    bias: dict[int, float] = field(default_factory=dict)
    allowed: list[int] | None = None
    bad_words: list[list[int]] = field(default_factory=list)
    count_row: int = -1  # in `OutputCounts`, if presence or frequency are penalised

    @classmethod
    def of(cls, seq: NewSequence, vocab_size: int) -> "Slot":
        params = seq.params
        known = range(vocab_size)
        allowed = params.allowed_token_ids
        return cls(
            params=params,
            prompt_len=seq.prompt_len,
            top_k=params.top_k if params.top_k < vocab_size else 0,
            stop_ids=[token for token in seq.stop_ids if token in known],
            bias={token: bias for token, bias in (params.logit_bias or {}).items() if token in known},
            allowed=None if allowed is None else [token for token in allowed if token in known],
            bad_words=[list(word) for word in params.bad_words_token_ids or () if word and word[-1] in known],
        )

    @property
    def counted(self) -> bool:
        return self.params.presence_penalty != 0.0 or self.params.frequency_penalty != 0.0

    @property
    def penalised(self) -> bool:
        return self.counted or self.params.repetition_penalty != 1.0

    @property
    def way(self) -> Way:
        params = self.params
        if params.greedy:
            return Way.GREEDY
        if self.top_k:
            return Way.TOP_K
        return Way.TOP_P if params.top_p < 1.0 else Way.PLAIN

    def young(self, position: int) -> bool:
        """Whether the token at `position` may not end the sequence yet."""
        return position - self.prompt_len < self.params.min_tokens


class SlotTensors:
    """The numbers of all S slots on the device, at addresses that stay: what a step gathers its rows from."""

    def __init__(self, max_num_seqs: int, device: torch.device):
        self.starts = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self.inv_temperature = torch.ones(max_num_seqs, dtype=torch.float32, device=device)
        self.min_p = torch.zeros(max_num_seqs, dtype=torch.float32, device=device)
        self.top_p = torch.ones(max_num_seqs, dtype=torch.float64, device=device)
        self.top_k = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)

    def set(self, index: int, slot: Slot, seed: int) -> None:
        params = slot.params
        self.starts[index] = start_of(seed)
        self.inv_temperature[index] = 1.0 if params.greedy else min(1.0 / params.temperature, _MAX_INVERSE)
        self.min_p[index] = params.min_p
        self.top_p[index] = params.top_p
        self.top_k[index] = slot.top_k


class OutputCounts:
    """How often each token was put out: a row of the vocabulary for those slots only that need one."""

    def __init__(self, vocab_size: int, device: torch.device):
        self.counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)  # [rows, V]
        self._free: list[int] = []

    def take(self, output_ids: Tensor) -> int:
        """A row that holds the counts of `output_ids` [length] int64. Grows by doubling, which copies."""
        if not self._free:
            rows = len(self.counts)
            more = self.counts.new_zeros((max(rows, 4), self.counts.shape[1]))
            self.counts = torch.cat([self.counts, more])
            self._free = list(range(rows, len(self.counts)))
        row = self._free.pop()
        self.counts[row] = 0
        self.counts[row].index_add_(0, output_ids, torch.ones_like(output_ids, dtype=torch.int32))
        return row

    def give(self, row: int) -> None:
        self._free.append(row)
