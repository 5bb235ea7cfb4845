"""What the sampler knows of the sequence in a slot, on the host and on the device."""

import enum
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from xllm.core.plan import NewSequence
from xllm.core.sampling import SamplingParams
from xllm.device.table import Device
from xllm.executor.sampling.random import start_of
from xllm.ops.sampling import SlotNumbers

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

    @property
    def plain_from(self) -> int | None:
        """The first position whose token takes no more than the numbers of `SlotTensors`; None where none does."""
        if self.bias or self.allowed is not None or self.bad_words or self.penalised:
            return None
        if self.params.logprobs is not None:
            return None
        return self.prompt_len + self.params.min_tokens if self.stop_ids else 0


class SlotTensors:
    """The numbers of all S slots: what a step reads for its rows. They are changed on the host, and come to the device
    together, at addresses that stay, when `upload` is called."""

    def __init__(self, max_num_seqs: int, device: torch.device):
        s = (
            -(-max_num_seqs // 4) * 4
        )  # all addresses are multiples of 16 bytes, so kernels are the same for any S
        # a row each for the numbers of 8 bytes, and one for both of 4
        self._host = np.zeros((4, s), dtype=np.int64)
        self._starts, self._top_k = self._host[0], self._host[1]
        self._top_p = self._host[2].view(np.float64)
        self._inv_temperature, self._min_p = self._host[3].view(np.float32).reshape(2, s)
        self._top_p[:] = 1.0
        self._changed = True
        self._packed = torch.zeros((4, s), dtype=torch.int64, device=device)
        halves = self._packed[3].view(torch.float32)
        self.numbers = SlotNumbers(
            starts=self._packed[0],
            inv_temperature=halves[:s],
            min_p=halves[s:],
            top_p=self._packed[2].view(torch.float64),
            top_k=self._packed[1],
        )

    @property
    def device(self) -> torch.device:
        return self._packed.device

    def set(self, index: int, slot: Slot, seed: int) -> None:
        params = slot.params
        self._starts[index] = start_of(seed)
        self._inv_temperature[index] = 0.0 if params.greedy else min(1.0 / params.temperature, _MAX_INVERSE)
        self._min_p[index] = params.min_p
        self._top_p[index] = params.top_p
        self._top_k[index] = slot.top_k
        self._changed = True

    def upload(self, device: Device) -> None:
        if self._changed:
            device.upload_into(self._packed, self._host)
            self._changed = False


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
        self.counts[row].zero_()
        self.counts[row].index_add_(0, output_ids, torch.ones_like(output_ids, dtype=torch.int32))
        return row

    def give(self, row: int) -> None:
        self._free.append(row)
