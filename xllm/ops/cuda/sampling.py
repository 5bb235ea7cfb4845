"""Choosing tokens on a card: one pass over the logits, then one program per row that reads only what it needs.

The first kernel notes of each chunk of 256 tokens its largest logit and what its tokens weigh. From that the second
kernel knows which chunk holds the token drawn, or which few can hold the k likeliest. Nothing is sorted, no row is read
as a whole again but for flat distributions, and one random number per draw is enough.

Legend: R rows, V tokens of the vocabulary, S slots, L tokens of the longest sequence, N chunks of a row (a power of
two, some empty), C tokens of a chunk, M chunks of a tile, K candidates, J candidates compared at once.
"""

import threading
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from xllm.ops.cuda.drawing import draw_inside, first_best, is_kept, list_chunks, masses_of, pick, uniform
from xllm.ops.cuda.launch import launch, trigger, uses_pdl, wait
from xllm.ops.cuda.tiling import padded, programs_for
from xllm.ops.cuda.top_k import among_candidates, collect, lower_bound, threshold
from xllm.ops.sampling import SlotNumbers

LOG2_E = tl.constexpr(1.4426950408889634)
# Each refusal leaves half of what was there, on the average; should rounding ever stand still, a card must not hang.
MOST_REFUSALS = tl.constexpr(500)
CHUNK = 256  # one warp's load of 16 bytes a lane in bfloat16
SURVEYED = 16  # chunks of a program of the first kernel
TILE = 16  # chunks read at once by the second
BROAD = 32  # where no more than a maximum is taken of them
CANDIDATES = 512
GROUPS = 128
COMPARED = 16
SURVEY_WARPS = 4
CHOOSE_WARPS = 8
CHOOSE_REGISTERS = 64  # a thread; four programs then share a multiprocessor


@dataclass(frozen=True, slots=True)
class Scratch:
    """What a launch of a number of rows leaves between and inside its kernels."""

    maxima_RN: Tensor  # float32
    masses_RN: Tensor  # float32
    list_RN: Tensor  # int32
    groups_RK: Tensor  # int32
    values_RK: Tensor  # float32
    ids_RK: Tensor  # int32


_scratch: dict[tuple[torch.device, int], Scratch] = {}  # by device and N; everything runs on one stream
_launching = (
    threading.Lock()
)  # engines of one process launch from threads of their own: a pair must stay together
_outgrown: list[Scratch] = []  # graphs that were captured with them may still run


def scratch(device: torch.device, rows: int, chunks: int) -> Scratch:
    """Room for so many rows at least; it grows outside of graph captures only."""
    held = _scratch.get((device, chunks))
    if held is not None and len(held.maxima_RN) >= rows:
        return held
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("sampling must have run once before a CUDA graph of it is captured")
    if held is not None:
        _outgrown.append(held)
    made = Scratch(
        maxima_RN=torch.empty((rows, chunks), dtype=torch.float32, device=device),
        masses_RN=torch.empty((rows, chunks), dtype=torch.float32, device=device),
        list_RN=torch.empty((rows, chunks), dtype=torch.int32, device=device),
        groups_RK=torch.empty((rows, CANDIDATES), dtype=torch.int32, device=device),
        values_RK=torch.empty((rows, CANDIDATES), dtype=torch.float32, device=device),
        ids_RK=torch.empty((rows, CANDIDATES), dtype=torch.int32, device=device),
    )
    _scratch[device, chunks] = made
    return made


def _results(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and whether they are usable, in one piece of memory: one copy brings both to the host."""
    ids = 8 * rows
    flags = programs_for(ids, 16) * 16  # kernels are compiled for aligned pointers
    piece = torch.empty(flags + rows, dtype=torch.uint8, device=device)
    return piece[:ids].view(torch.int64), piece[flags:].view(torch.bool)


@triton.jit
def _survey(
    logits_ptr, logits_stride, vocab, slots_ptr, inv_temperature_ptr, top_k_ptr, maxima_ptr, masses_ptr,
    N: tl.constexpr, M: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of M chunks of a row: the largest logit, +inf if there is NaN; and, where it will be needed, what the tokens weigh
    in units of the chunk's likeliest."""
    wait(PDL)
    trigger(PDL)
    row = tl.program_id(1)
    chunk_M = tl.program_id(0) * M + tl.arange(0, M)
    ids_MC = chunk_M[:, None] * C + tl.arange(0, C)[None, :]
    row_ptr = logits_ptr + row.to(tl.int64) * logits_stride
    logits_MC = tl.load(row_ptr + ids_MC, mask=ids_MC < vocab, other=float("-inf")).to(tl.float32)
    slot = tl.load(slots_ptr + row)
    inv_temperature = tl.load(inv_temperature_ptr + slot)
    top_k = tl.load(top_k_ptr + slot)
    logits_MC = tl.where(logits_MC == logits_MC, logits_MC, float("inf"))
    top_M = tl.max(logits_MC, 1)
    at = row.to(tl.int64) * N
    tl.store(maxima_ptr + at + chunk_M, top_M, mask=chunk_M < N)
    if (inv_temperature > 0) & (top_k == 0):
        top_M = tl.where(tl.abs(top_M) < float("inf"), top_M, 0.0)  # no infinity minus infinity
        weights_MC = tl.exp2((logits_MC - top_M[:, None]) * (inv_temperature * LOG2_E))
        tl.store(masses_ptr + at + chunk_M, tl.sum(weights_MC, 1), mask=chunk_M < N)


@triton.jit
def _draw(
    row_ptr, list_ptr, masses_ptr, maxima_N, masses_N, known, vocab, best, scale, floor, least, top_p, start, position,
    N: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The token drawn from what is kept; under top-p again from its betters, while they have too much of the mass. The
    first time what is kept of each chunk may be `known`."""
    bar = best - float("inf")
    token = 0
    attempt = tl.zeros([], tl.int32)
    allowed = tl.zeros([], tl.float64)
    drawing = True
    while drawing:
        if not known:
            listed_N = is_kept(maxima_N, best, scale, floor, bar, least)
            masses_N = masses_of(
                row_ptr, list_ptr, masses_ptr, listed_N, vocab, best, scale, floor, bar, least, N, M, C
            )
        above = tl.sum(masses_N, 0)
        drawing = (attempt == 0) | ((above > 0) & (above >= allowed))
        if drawing:
            chunk, share, total = pick(masses_N, uniform(start, position, attempt), N)
            token, bar = draw_inside(row_ptr, chunk, share, vocab, best, scale, floor, bar, least, C)
            allowed = tl.where(attempt == 0, top_p * total, allowed)
            drawing = (top_p < 1) & (attempt < MOST_REFUSALS)
        known = False
        attempt += 1
    return token


@triton.jit
def _surveyed(masses_ptr, maxima_N, best, scale, N: tl.constexpr):
    """[N] float64: what each chunk weighs, of all its tokens."""
    masses_N = tl.load(masses_ptr + tl.arange(0, N), mask=maxima_N > float("-inf"), other=0.0)
    return (masses_N * tl.exp2((maxima_N - best) * scale)).to(tl.float64)


@triton.jit(do_not_specialize=["feed_stride", "ahead"])
def _choose(
    logits_ptr, logits_stride, vocab, slots_ptr, positions_ptr,
    starts_ptr, inv_temperature_ptr, min_p_ptr, top_p_ptr, top_k_ptr,
    maxima_ptr, masses_ptr, list_ptr, groups_ptr, values_ptr, ids_ptr, tokens_ptr, usable_ptr,
    feed_ptr, feed_stride, ahead,
    SHIFT: tl.constexpr,
    N: tl.constexpr, B: tl.constexpr, M: tl.constexpr, C: tl.constexpr, K: tl.constexpr, G: tl.constexpr,
    J: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait(PDL)
    trigger(PDL)
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    maxima_ptr, masses_ptr, list_ptr = maxima_ptr + row * N, masses_ptr + row * N, list_ptr + row * N
    groups_ptr, values_ptr, ids_ptr = groups_ptr + row * K, values_ptr + row * K, ids_ptr + row * K
    at_N = tl.arange(0, N)
    maxima_N = tl.load(maxima_ptr + at_N, mask=at_N < tl.cdiv(vocab, C), other=float("-inf"))
    slot = tl.load(slots_ptr + row)
    position = tl.load(positions_ptr + row) + ahead
    start = tl.load(starts_ptr + slot)
    inv_temperature = tl.load(inv_temperature_ptr + slot)
    min_p = tl.load(min_p_ptr + slot)
    top_p = tl.load(top_p_ptr + slot)
    top_k = tl.load(top_k_ptr + slot)
    best = tl.max(maxima_N, 0)
    usable = tl.abs(best) < float("inf")
    token = 0
    if usable & (inv_temperature == 0):
        token = first_best(row_ptr, maxima_N, best, vocab, N, C)
    elif usable:
        scale = inv_temperature * LOG2_E
        least = tl.log2(tl.maximum(min_p, 1e-37))
        least = tl.where(min_p > 0, tl.minimum(least, 0.0), float("-inf"))
        floor = best - float("inf")
        masses_N = tl.zeros([N], tl.float64)
        filled = K + 1
        if top_k > 0:
            bound = lower_bound(maxima_N, best, top_k, tl.maximum(B, top_k + (top_k >> 2)), SHIFT)
            count = list_chunks(is_kept(maxima_N, best, scale, bound, floor, least), list_ptr, N)
            if top_k <= K:
                filled = collect(
                    row_ptr, list_ptr, count, vocab, bound, groups_ptr, values_ptr, ids_ptr, B, C, K, G
                )
            if filled <= K:
                u = uniform(start, position, tl.zeros([], tl.int32))
                token = among_candidates(
                    values_ptr, ids_ptr, filled, best, scale, least, top_k, top_p, u, K, J
                )
            else:
                floor, masses_N = threshold(
                    row_ptr, list_ptr, masses_ptr, maxima_N, count, vocab, bound, best, scale, least, top_k, top_p,
                    SHIFT, N, M, C,
                )  # fmt: skip
                top_p = tl.maximum(top_p, 1.0)  # is in the floor
        elif min_p == 0:
            masses_N = _surveyed(masses_ptr, maxima_N, best, scale, N)
        if filled > K:
            known = (top_k > 0) | (min_p == 0)
            token = _draw(
                row_ptr, list_ptr, masses_ptr, maxima_N, masses_N, known, vocab, best, scale, floor, least, top_p,
                start, position, N, M, C,
            )  # fmt: skip
    tl.store(tokens_ptr + row, token)
    tl.store(usable_ptr + row, usable)
    # branches and no constants: with several kernels the first step of another kind would wait for a compiler
    if feed_stride > 0:
        tl.store(feed_ptr + slot * feed_stride + position, token)
    if ahead > 0:
        tl.store(positions_ptr + row, position)


def sample(
    logits_RV: Tensor,
    slots_R: Tensor,
    positions_R: Tensor,
    numbers: SlotNumbers,
    feed_SL: Tensor | None = None,
    advance: bool = False,
) -> tuple[Tensor, Tensor]:
    rows, vocab = logits_RV.shape
    chunks = programs_for(vocab, CHUNK)
    N = max(padded(chunks), SURVEYED)
    token_ids_R, usable_R = _results(rows, logits_RV.device)
    pdl = uses_pdl()
    stride = logits_RV.stride(0)
    with _launching:
        room = scratch(logits_RV.device, max(rows, len(numbers.starts)), N)
        launch(
            _survey, (programs_for(chunks, SURVEYED), rows),
            logits_RV, stride, vocab, slots_R, numbers.inv_temperature, numbers.top_k, room.maxima_RN, room.masses_RN,
            N=N, M=SURVEYED, C=CHUNK, PDL=pdl, num_warps=SURVEY_WARPS, launch_pdl=pdl,
        )  # fmt: skip
        launch(
            _choose, (rows,),
            logits_RV, stride, vocab, slots_R, positions_R,
            numbers.starts, numbers.inv_temperature, numbers.min_p, numbers.top_p, numbers.top_k,
            room.maxima_RN, room.masses_RN, room.list_RN, room.groups_RK, room.values_RK, room.ids_RK, token_ids_R, usable_R,
            token_ids_R if feed_SL is None else feed_SL, 0 if feed_SL is None else feed_SL.stride(0),
            int(advance),
            SHIFT=16 if logits_RV.dtype == torch.bfloat16 else 0,
            N=N, B=BROAD, M=TILE, C=CHUNK, K=CANDIDATES, G=GROUPS, J=COMPARED, PDL=pdl,
            num_warps=CHOOSE_WARPS, maxnreg=CHOOSE_REGISTERS, launch_pdl=pdl,
        )  # fmt: skip
    return token_ids_R, usable_R
