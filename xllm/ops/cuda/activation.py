"""Gated activations. Contract in `xllm.ops.activation`. Legend: T tokens, I intermediate features, C of a program."""

import torch
import triton
from triton import language as tl

from xllm.ops.cuda.launch import Kernel, trigger, uses_pdl, wait
from xllm.ops.cuda.tiling import programs_for

TILE = 1024  # features of a program: 8 per thread


def silu_and_mul(gate_up_T2I: torch.Tensor) -> torch.Tensor:
    gate_up_T2I = gate_up_T2I.contiguous()
    tokens, width = gate_up_T2I.shape[0], gate_up_T2I.shape[1] // 2
    y_TI = gate_up_T2I.new_empty((tokens, width))
    programs = tokens * programs_for(width, TILE)
    _kernel(programs, gate_up_T2I, y_TI, pdl=uses_pdl(), WIDTH=width, TILE=TILE)
    return y_TI


@triton.jit
def silu(x):
    """x / (1 + exp(-x)), with an exponential that cannot overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, x * small, x) / (1.0 + small)


@triton.jit
def _silu_and_mul(x_ptr, y_ptr, WIDTH: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr):
    PROGRAMS: tl.constexpr = (WIDTH + TILE - 1) // TILE  # of a token
    token = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    i_C = tl.program_id(0) % PROGRAMS * TILE + tl.arange(0, TILE)
    wait(PDL)
    trigger(PDL)
    at_C = x_ptr + token * (2 * WIDTH) + i_C
    gate_C = tl.load(at_C, mask=i_C < WIDTH, other=0.0).to(tl.float32)
    up_C = tl.load(at_C + WIDTH, mask=i_C < WIDTH, other=0.0).to(tl.float32)
    y_C = silu(gate_C) * up_C
    tl.store(y_ptr + token * WIDTH + i_C, y_C.to(y_ptr.dtype.element_ty), mask=i_C < WIDTH)


_kernel = Kernel(_silu_and_mul)
