"""What the sampler chose, on the device and on its way to the host."""

from dataclasses import dataclass

from torch import Tensor

from xllm.core.plan import TokenLogprobs
from xllm.device.cpu import CpuDevice
from xllm.device.table import Device
from xllm.executor.packing import download_all
from xllm.executor.sampling.logprobs import FetchedScores, Scores

_UNUSABLE = "the logits of this sequence are not finite, or its parameters leave no token to choose"


@dataclass(frozen=True, slots=True)
class Fetched:
    """What `Sampled.fetch` fetches; to be read once a mark of the device made afterwards has been waited for."""

    token_ids: Tensor  # [R] int64
    usable: Tensor  # [R] bool
    scores: list[tuple[list[int], FetchedScores]]

    def tokens(self) -> list[int]:
        """0 for rows in `errors`."""
        ids: list[int] = self.token_ids.tolist()
        return ids

    def errors(self) -> dict[int, str]:
        """Row -> why it alone has no token."""
        if bool(self.usable.all()):
            return {}
        return {row: _UNUSABLE for row, usable in enumerate(self.usable.tolist()) if not usable}

    def logprobs(self) -> dict[int, TokenLogprobs]:
        """Row -> log-probabilities, for the usable rows that asked."""
        if not self.scores:
            return {}
        usable = self.usable.tolist()
        return {
            row: entry
            for rows, scores in self.scores
            for row, entry in zip(rows, scores.entries(), strict=True)
            if usable[row]
        }


@dataclass(frozen=True, slots=True)
class Sampled:
    """What `Sampler.sample` chose, on the device."""

    token_ids: Tensor  # [R] int64; 0 in rows without a usable distribution
    usable: Tensor  # [R] bool
    scores: list[tuple[list[int], Scores]]  # of rows that asked for logprobs, by how many they asked for

    def fetch(self, device: Device) -> Fetched:
        """Starts the way to the host."""
        token_ids, usable = download_all(device, self.token_ids, self.usable)
        return Fetched(
            token_ids=token_ids,
            usable=usable,
            scores=[(rows, scores.fetch(device)) for rows, scores in self.scores],
        )

    @property
    def errors(self) -> dict[int, str]:
        """As `Fetched.errors`, at once, where the device is the CPU."""
        return self.fetch(CpuDevice()).errors()

    def host_logprobs(self) -> dict[int, TokenLogprobs]:
        """As `Fetched.logprobs`, at once, where the device is the CPU."""
        return self.fetch(CpuDevice()).logprobs()
