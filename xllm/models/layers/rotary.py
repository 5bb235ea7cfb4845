"""Rotary frequencies and the table of their cosines and sines.

Legend: M positions, R rotated features of a head, r = R / 2 frequencies.
"""

import math

import torch

from xllm.models.rope import Rope


class RotaryTable:
    """Cosines and sines of every position asked for so far; grows by doubling, so memory follows the context used.

    Replaced, never rewritten, when it grows: a step in flight keeps the table it was given.
    """

    def __init__(self, rope: Rope, *, device: torch.device | str = "cpu"):
        self._rope = rope
        self._device = torch.device(device)
        self._cos_sin_MR = cos_sin_table(rope, 0, 2048, self._device)

    def upto(self, length: int) -> torch.Tensor:
        """[M, R] float32 with M >= length: cosines of a position's r angles, then their sines."""
        have = self._cos_sin_MR.shape[0]
        if length > have:
            more = cos_sin_table(self._rope, have, max(length, 2 * have), self._device)
            self._cos_sin_MR = torch.cat((self._cos_sin_MR, more))
        return self._cos_sin_MR


def cos_sin_table(rope: Rope, first: int, last: int, device: torch.device) -> torch.Tensor:
    """[last - first, R] for the positions first .. last - 1."""
    positions_M = torch.arange(first, last, dtype=torch.float32, device=device)
    if rope.type == "dynamic":
        angles_Mr = positions_M[:, None] * dynamic_frequencies(rope, positions_M)
    else:
        angles_Mr = positions_M[:, None] * frequencies(rope).to(device)
    return torch.cat((angles_Mr.cos(), angles_Mr.sin()), dim=1) * attention_factor(rope)


def frequencies(rope: Rope) -> torch.Tensor:
    """[r] float32: radians a position turns each pair of features by."""
    plain_r = _plain(rope)
    if rope.type == "linear":  # kaiokendev 2023: squeeze positions
        return plain_r / rope.factor
    if rope.type == "llama3":
        return _llama3(rope, plain_r)
    if rope.type == "yarn":
        return _yarn(rope)
    return plain_r


def dynamic_frequencies(rope: Rope, positions_M: torch.Tensor) -> torch.Tensor:
    """[M, r]: NTK-aware scaling whose base grows with the length so far (bloc97, emozilla 2023).

    A token beyond the trained context turns by the base of its own length, position + 1, as it does when it is
    generated one step at a time. It is then a function of the position alone, so chunked prefill and prefix caching
    change nothing.
    """
    length_M = torch.clamp(positions_M.double() + 1, min=rope.original_max)
    stretch_M = rope.factor * length_M / rope.original_max - (rope.factor - 1)
    base_M1 = (rope.theta * stretch_M ** (rope.dim / (rope.dim - 2)))[:, None]
    return (1.0 / base_M1 ** _exponents(rope).double().to(positions_M.device)).float()


def attention_factor(rope: Rope) -> float:
    """What yarn multiplies cosines and sines by (Peng et al. 2023, section 3.4)."""
    if rope.type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return float(rope.attention_factor)
    if rope.mscales is not None:
        one, all_dim = rope.mscales
        return _mscale(rope.factor, one) / _mscale(rope.factor, all_dim)
    return _mscale(rope.factor, 1.0)


def _exponents(rope: Rope) -> torch.Tensor:
    return torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim


def _plain(rope: Rope) -> torch.Tensor:
    return 1.0 / rope.theta ** _exponents(rope)


def _llama3(rope: Rope, plain_r: torch.Tensor) -> torch.Tensor:
    """Slow pairs are slowed by `factor`, fast ones kept, those between blended by how often they turn in the
    trained context."""
    turns_r = rope.original_max * plain_r / (2 * math.pi)
    blend_r = ((turns_r - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - blend_r) * plain_r / rope.factor + blend_r * plain_r


def _yarn(rope: Rope) -> torch.Tensor:
    """Pairs that turn more than `beta_fast` times in the trained context are kept, those under `beta_slow` slowed
    by `factor`, with a linear ramp between (Peng et al. 2023, section 3.2)."""
    low, high = _pair_turning(rope, rope.beta_fast), _pair_turning(rope, rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    slowed_r = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    plain_r = _plain(rope)
    return plain_r / rope.factor * slowed_r + plain_r * (1 - slowed_r)


def _pair_turning(rope: Rope, turns: float) -> float:
    """Index (a real number) of the pair that turns `turns` times in the trained context."""
    return rope.dim * math.log(rope.original_max / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def _mscale(scale: float, weight: float) -> float:
    return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0
