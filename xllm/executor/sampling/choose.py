"""One token per row from logits, temperature and filters: inverse transform sampling in exact arithmetic.

A token's probability relative to its row's most likely one, exp((l - max) / T), is rounded down to a multiple
of 2**-34. Sums of at most 2**19 such numbers are exact in float64, so they come out the same in whatever
order a device adds them up, alone or in a batch, over the vocabulary or over a few candidates. That makes the
choice a function of the row and its uniform numbers alone. Tokens less likely than 6e-11 of the best are
never chosen.

Every filter is a threshold: min-p, then top-k, then top-p over what is left, as in vLLM; tokens that tie with
the last one kept are all kept. The cumulative distribution runs in the order of token ids. No way sorts a
vocabulary but top-k with a large k.
"""

import torch
from torch import Tensor

from xllm.executor.sampling.random import uniforms

SCALE = 2.0**34
MAX_VOCAB = 2**19
_CHUNK = 128
_FEWEST_CANDIDATES = 128


def weights(logits_AV: Tensor, best_A: Tensor, inv_temperature_A: Tensor, min_p_A: Tensor | None) -> Tensor:
    """[A, V] float32, whole numbers up to 2**34 (for the row's `best`), 0 where min-p cuts."""
    weights_AV = (logits_AV - best_A[:, None]).mul_(inv_temperature_A[:, None]).exp_().mul_(SCALE).floor_()
    return weights_AV if min_p_A is None else weights_AV.mul_(weights_AV >= min_p_A[:, None] * SCALE)


def draw(weights_AV: Tensor, uniforms_A: Tensor) -> tuple[Tensor, Tensor]:
    """[A] int64: the first token at which the running sum of weights exceeds uniform x total; and the totals.

    Two levels, so that only one chunk of each row needs its running sum. Where a row is not finite, any
    token.
    """
    vocab = weights_AV.shape[1]
    whole = vocab // _CHUNK * _CHUNK
    sums = weights_AV[:, :whole].unflatten(1, (-1, _CHUNK)).sum(-1, dtype=torch.float64)
    if whole < vocab:
        rest = weights_AV[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)
        sums = torch.cat([sums, rest], 1)
    running = sums.cumsum(-1)
    target = _target(running, uniforms_A)
    chunk = torch.searchsorted(running, target, right=True).clamp_(max=running.shape[1] - 1)
    target -= running.gather(1, chunk) - sums.gather(1, chunk)
    ids = chunk * _CHUNK + torch.arange(_CHUNK, device=weights_AV.device)
    if whole < vocab:  # a weight read twice beyond the end comes after every token that is there
        ids.clamp_(max=vocab - 1)
    inside = weights_AV.gather(1, ids).cumsum(-1, dtype=torch.float64)
    offset = torch.searchsorted(inside, target, right=True).clamp_(max=_CHUNK - 1)
    return ids.gather(1, offset).squeeze(1), running[:, -1]


def draw_top_p(weights_AV: Tensor, top_p_A: Tensor, starts_A: Tensor, positions_A: Tensor) -> Tensor:
    """[A] int64: as `draw`, among tokens whose strict betters have less than `top_p` of the mass.

    By rejection, so nothing is sorted: a token drawn from all is right if it passes that test, which is one
    sum. If it does not, nothing as unlikely passes either, and the next draw is from what is likelier.
    Accepted is at least the share `top_p` of first draws, and each refusal leaves half the rest on average
    (after FlashInfer, "Sorting-free GPU kernels for LLM sampling", 2025). Overwrites the weights.
    """
    tokens, total_A = draw(weights_AV, uniforms(starts_A, positions_A))
    allowed_A = top_p_A * total_A
    drawn, left, attempt = tokens, torch.arange(len(tokens), device=tokens.device), 0
    while True:
        weights_AV *= weights_AV > weights_AV.gather(1, drawn[:, None])
        refused = weights_AV.sum(-1, dtype=torch.float64) >= allowed_A[left]  # never true of a row with NaN
        if not bool(refused.any()):
            return tokens
        left, weights_AV, attempt = left[refused], weights_AV[refused], attempt + 1
        drawn, _ = draw(weights_AV, uniforms(starts_A[left], positions_A[left], attempt))
        tokens[left] = drawn


def draw_top_k(
    logits_AV: Tensor,
    best_A: Tensor,
    inv_temperature_A: Tensor,
    min_p_A: Tensor | None,
    top_k_A: Tensor,
    top_p_A: Tensor,
    uniforms_A: Tensor,
    largest_k: int,
) -> Tensor:
    """[A] int64: as `draw`, among the tokens that min-p, top-k (1 to `largest_k`, below V) and top-p leave.

    Looks at the best few of each row; where so many tie with the k-th that there may be more of them, at all.
    """
    vocab = logits_AV.shape[1]
    candidates = min(vocab, max(_FEWEST_CANDIDATES, 2 * largest_k))
    values_AK, ids_AK = logits_AV.topk(candidates)
    kth_A1 = values_AK.gather(1, top_k_A[:, None] - 1)
    weights_AK = weights(values_AK, best_A, inv_temperature_A, min_p_A).mul_(values_AK >= kth_A1)
    weights_AK *= _best_mass(weights_AK, top_p_A)
    ids_AK, order = ids_AK.sort(-1)
    running = weights_AK.gather(1, order).cumsum(-1, dtype=torch.float64)
    place = torch.searchsorted(running, _target(running, uniforms_A), right=True).clamp_(max=candidates - 1)
    tokens = ids_AK.gather(1, place).squeeze(1)
    if candidates < vocab:
        tied = (values_AK[:, -1:] == kth_A1).squeeze(1)
        if bool(tied.any()):
            again = tied.nonzero().squeeze(1)
            tokens[again] = draw_top_k(
                logits_AV[again],
                best_A[again],
                inv_temperature_A[again],
                None if min_p_A is None else min_p_A[again],
                top_k_A[again],
                top_p_A[again],
                uniforms_A[again],
                largest_k=vocab,
            )
    return tokens


def _best_mass(weights_AK: Tensor, top_p_A: Tensor) -> Tensor:
    """[A, K] bool: what strictly outweighs a token has less than `top_p` of the row's mass. Rows fall."""
    total = weights_AK.sum(-1, keepdim=True, dtype=torch.float64)
    before = weights_AK.cumsum(-1, dtype=torch.float64) - weights_AK
    first = torch.ones_like(weights_AK, dtype=torch.bool)
    first[:, 1:] = weights_AK[:, 1:] != weights_AK[:, :-1]
    before_ties = (before * first).cummax(-1).values  # what stands before the first of equal weights
    return before_ties < top_p_A[:, None] * total


def _target(running: Tensor, uniforms_A: Tensor) -> Tensor:
    """[A, 1] float64: a whole number below the total, which the product alone could round up to."""
    total = running[:, -1:]
    return torch.minimum((uniforms_A[:, None] * total).floor_(), total - 1)
