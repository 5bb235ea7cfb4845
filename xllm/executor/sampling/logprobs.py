"""Log-probabilities of the model's own distribution: the raw logits, before any parameter acts on them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from xllm.core.plan import TokenLogprobs
from xllm.device.table import Device

_CHUNK = 128


@dataclass(frozen=True, slots=True)
class Scores:
    """Of A rows, still on the device."""

    token_ids: Tensor  # [A] int64
    logprobs: Tensor  # [A] float64
    ranks: Tensor  # [A] int64, 1 = no other token was likelier
    top_ids: Tensor  # [A, k] int64, likeliest first, of equally likely ones the lower id first
    top_logprobs: Tensor  # [A, k] float64

    def fetch(self, device: Device) -> "FetchedScores":
        """Starts the way to the host."""
        integers = torch.cat([self.ranks[:, None], self.token_ids[:, None], self.top_ids], 1)
        logprobs = torch.cat([self.logprobs[:, None], self.top_logprobs], 1)
        return FetchedScores(device.download(integers), device.download(logprobs))


@dataclass(frozen=True, slots=True)
class FetchedScores:
    """On the host, once a mark of the device made after `Scores.fetch` has been waited for."""

    integers: Tensor  # [A, 2 + k] int64: rank, token, the likeliest
    logprobs: Tensor  # [A, 1 + k] float64: of the token, of the likeliest

    def entries(self) -> list[TokenLogprobs]:
        """One per row: the token, then the k likeliest."""
        rows = zip(self.integers.tolist(), self.logprobs.tolist(), strict=True)
        return [TokenLogprobs(ids, logprobs, rank) for (rank, *ids), logprobs in rows]


def score(logits_AV: Tensor, token_ids_A: Tensor, k: int) -> Scores:
    """Score one token per row and find the k likeliest (at most V). Never waits for the device."""
    logits_AV = logits_AV.float()
    best = logits_AV.amax(-1, keepdim=True)
    log_sum = _row_sums((logits_AV - best).exp_()).log_()[:, None]
    chosen = logits_AV.gather(1, token_ids_A[:, None])
    ranks = (logits_AV > chosen).sum(-1) + 1
    values, ids = logits_AV.topk(min(k, logits_AV.shape[1]))
    ids, order = ids.sort(-1)
    values, order = values.gather(1, order).sort(stable=True, dim=-1, descending=True)
    return Scores(
        token_ids=token_ids_A,
        logprobs=((chosen - best).double() - log_sum).squeeze(1),
        ranks=ranks,
        top_ids=ids.gather(1, order),
        top_logprobs=(values - best).double() - log_sum,
    )


def _row_sums(values_AV: Tensor) -> Tensor:
    """[A] float64. By chunks: a reduction to a single number may be split between threads, and would then round
    otherwise for a row alone than in a batch.
    """
    whole = values_AV.shape[1] // _CHUNK * _CHUNK
    sums = values_AV[:, :whole].unflatten(1, (-1, _CHUNK)).sum(-1, dtype=torch.float64)
    rest = values_AV[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)
    return torch.cat([sums, rest], 1).cumsum(-1)[:, -1]
