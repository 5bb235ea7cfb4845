"""Choosing one token per row from its logits: the contract and the plain PyTorch reference.

Legend: R rows, V tokens of the vocabulary, S slots, L tokens of the longest sequence, D distinct logits of a row.

A row's weights are exp((logit - best) / temperature). Every filter is a threshold on them: min-p, then top-k, then top-p
over what is left; tokens that tie with the last one kept are all kept. The running sum goes in the order of token ids.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


@dataclass(frozen=True, slots=True)
class SlotNumbers:
    """How each slot's sequence is sampled. Memory that stays where it is; owned by the executor."""

    starts: Tensor  # [S] int64: where the random numbers of its seed begin
    inv_temperature: Tensor  # [S] float32, finite; 0: greedy, and the other numbers do not matter
    min_p: Tensor  # [S] float32, 0 to 1; 0: no filter
    top_p: Tensor  # [S] float64, above 0; 1: no filter
    top_k: Tensor  # [S] int64; 0: no filter


def sample(
    logits_RV: Tensor,
    slots_R: Tensor,
    positions_R: Tensor,
    numbers: SlotNumbers,
    feed_SL: Tensor | None = None,
    advance: bool = False,
) -> tuple[Tensor, Tensor]:
    """-> token ids [R] int64 and whether each row had a usable distribution [R] bool.

    Row r belongs to slot slots_R[r] and its token will stand at positions_R[r], both int64. logits_RV is float32 or
    bfloat16 with contiguous rows, and is kept. A row is not usable that holds NaN or +inf, or nothing but -inf: it gets
    token 0. Where `feed_SL` is given, feed_SL[slot, position] becomes the token. With `advance` positions_R are those of
    the rows' own inputs, one less, and are counted up **in place**.

    Greedy takes the lowest of the best ids. Otherwise a token is the first whose running sum of weights exceeds the
    total times `uniforms(start, position)`. Top-p without top-k works by rejection: that token, drawn among what min-p
    leaves, is taken if its strict betters have less than `top_p` of the mass, else the next attempt draws from them
    alone. With top-k there is one draw, among what all filters leave.

    A row's token depends on nothing but the row, its slot's numbers and its position. Fast versions add up in float32
    within pieces of a row and may choose the neighbour where a border is closer than that; what they choose has passed
    its filters up to that error. No host synchronisation, nothing of a size that depends on the data: a graph may
    capture it, once it has run for real.
    """
    if advance:
        positions_R += 1
    tokens, usable = [], []
    for logits, slot, position in zip(logits_RV.double(), slots_R.tolist(), positions_R, strict=True):
        usable.append(bool(logits.max().isfinite()))  # the maximum of a row with NaN is NaN
        tokens.append(_choose(logits, numbers, slot, position) if usable[-1] else 0)
    token_ids_R = torch.tensor(tokens, dtype=torch.int64, device=logits_RV.device)
    if feed_SL is not None:
        feed_SL[slots_R, positions_R] = token_ids_R.to(feed_SL.dtype)
    return token_ids_R, torch.tensor(usable, device=logits_RV.device)


def _choose(logits_V: Tensor, numbers: SlotNumbers, slot: int, position: Tensor) -> int:
    inv_temperature, min_p = float(numbers.inv_temperature[slot]), float(numbers.min_p[slot])
    top_p, top_k = float(numbers.top_p[slot]), int(numbers.top_k[slot])
    best = logits_V.max()
    if inv_temperature == 0:
        return int((logits_V == best).nonzero()[0])
    weights_V = ((logits_V - best) * inv_temperature).exp()
    weights_V[weights_V < min_p] = 0
    if top_k:
        weights_V[logits_V < logits_V.sort(descending=True).values[min(top_k, len(logits_V)) - 1]] = 0
    allowed = top_p * weights_V.sum()
    better_V = mass_above(logits_V, weights_V)
    if top_k and top_p < 1:
        weights_V[better_V >= allowed] = 0
    attempt = 0
    while True:
        u = uniforms(numbers.starts[slot], position, attempt)
        token = int(invert(weights_V, u))
        if top_k or top_p >= 1 or better_V[token] < allowed:
            return token
        weights_V[logits_V <= logits_V[token]] = 0
        attempt += 1


def mass_above(logits_V: Tensor, weights_V: Tensor) -> Tensor:
    """[V]: what the tokens of higher logits weigh together, the same for equal logits."""
    values_D, place_V = logits_V.unique(return_inverse=True)  # rising
    masses_D = torch.zeros_like(values_D).index_add_(0, place_V, weights_V)
    from_top_D = masses_D.flip(0).cumsum(0).flip(0)
    return torch.cat([from_top_D[1:], from_top_D.new_zeros(1)])[place_V]


def invert(weights_V: Tensor, u: Tensor) -> Tensor:
    """The first token with weight whose running sum exceeds u x total."""
    running_V = weights_V.cumsum(0)
    found = torch.searchsorted(running_V, u * running_V[-1], right=True)
    return torch.minimum(found, weights_V.nonzero()[-1, 0])  # the product may round up to the total


def uniforms(starts_R: Tensor, positions_R: Tensor, attempt: int = 0) -> Tensor:
    """[R] int64 starts and token positions -> [R] float64, uniform in [0, 1) on multiples of 2**-53.

    For one seed and successive positions this is the stream of splitmix64 (Steele, Lea and Flood, "Fast
    splittable pseudorandom number generators", 2014) from a start that is itself a mixed seed. Further draws
    at one position, by `attempt`, mix the first one again.
    """
    x = _mix(starts_R + (positions_R + 1) * _signed(_GOLDEN))
    if attempt:
        x = _mix(x + attempt)
    return _shift(x, 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """To the right, filling with zeros: int64 has only the shift that repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """The int64 with the same 64 bits."""
    return x - (1 << 64) if x >= 1 << 63 else x
