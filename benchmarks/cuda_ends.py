"""What of the operators for cards is timed before and behind the layers: inputs of a step, embedding, sampling.

Legend: as in `xllm.ops`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.cuda_products import BLOCK, LONGEST, Case, Scope, Way, constants, draw, without_pdl
from xllm.ops import inputs, linear, sampling
from xllm.ops.cuda import sampling as sampling_kernels

SAMPLINGS = {  # inverse temperature, top-k, top-p
    "greedy": (0.0, 0, 1.0),
    "temperature": (1.25, 0, 1.0),
    "top-k 20, top-p 0.95": (1.25, 20, 0.95),
    "top-p 0.9": (1.25, 0, 0.9),
}


def embedding_cases(scope: Scope) -> Iterator[Case]:
    """Random rows of the vocabulary's."""
    weight = draw(scope.model.vocab, scope.model.hidden)
    for tokens in scope.tokens(1, 16, 256, 8192):
        count = scope.sets(tokens * scope.model.hidden * 2, most=8)
        yield _embedding(scope, weight, torch.randint(scope.model.vocab, (count, tokens)))


def _embedding(scope: Scope, weight: torch.Tensor, ids: torch.Tensor) -> Case:
    count, tokens = ids.shape
    way = Way("", lambda i: scope.ops.embedding(ids[i % count], weight, weight.dtype))
    by_torch = Way("torch", lambda i: linear.embedding(ids[i % count], weight, weight.dtype))
    return Case(
        "embedding", f"{tokens} tokens", [way, by_torch, *scope.vary(way, without_pdl())],
        lambda: linear.embedding(ids[0], weight, torch.float32), moved=4 * tokens * weight.shape[1], sets=count, limit=0.0,
    )  # fmt: skip


def sampling_cases(scope: Scope) -> Iterator[Case]:
    """Of flat logits, as of a model without training, and of peaked ones."""
    vocab = scope.model.vocab
    for rows in scope.tokens(1, 16, 256, 512):
        for form, peak in (("flat", 0.0), ("peaked", 20.0)):
            logits = draw(scope.sets(rows * vocab * 2, most=4), rows, vocab, scale=3.0)
            logits[:, :, torch.randperm(vocab)[:30]] += peak
            for kind in SAMPLINGS:
                yield _sampling(scope, logits, form, kind)


def _sampling(scope: Scope, logits: torch.Tensor, form: str, kind: str) -> Case:
    count, rows, vocab = logits.shape
    inv_temperature, top_k, top_p = SAMPLINGS[kind]
    numbers = sampling.SlotNumbers(
        starts=torch.randint(1 << 62, (rows,)), inv_temperature=torch.full((rows,), inv_temperature),
        min_p=torch.zeros(rows), top_p=torch.full((rows,), top_p, dtype=torch.float64),
        top_k=torch.full((rows,), top_k),
    )  # fmt: skip
    slots, positions = torch.randperm(rows), torch.randint(8, (rows,))
    feed, checked, sample = torch.zeros(rows, 8, dtype=torch.int64), min(rows, 8), scope.ops.sample
    assert sample is not None
    way = Way(
        "", lambda i: sample(logits[i % count], slots, positions, numbers, feed), read=lambda out: out[0][:checked]
    )  # fmt: skip
    found = constants(
        sampling_kernels, CHOOSE_WARPS=(4, 16), CHOOSE_REGISTERS=(128,), SURVEYED=(8, 32), SURVEY_WARPS=(8,)
    )
    return Case(
        "sample", f"{rows} {form}, {kind}", [way, *scope.vary(way, found)],
        lambda: sampling.sample(logits[0, :checked], slots[:checked], positions[:checked], numbers)[0],
        moved=2 * rows * vocab, sets=count, limit=0.3,  # where a border is close, the neighbour is right
    )  # fmt: skip


def input_cases(scope: Scope) -> Iterator[Case]:
    slots, longest = 512, 100 if scope.dry else LONGEST
    tokens = torch.randint(1000, (slots, longest + 1))
    table = torch.randint(1 << 20, (slots, LONGEST // BLOCK), dtype=torch.int32)
    for count in scope.tokens(1, 16, 256, 512):
        given = torch.randperm(slots)[:count], torch.randint(min(1200, longest), (count,)), tokens, table
        yield _inputs(scope, *given)


def _inputs(scope: Scope, slots: torch.Tensor, *given: torch.Tensor) -> Case:
    def run(operator: Callable[..., Any]) -> Any:
        return operator(slots, *given, BLOCK)

    way = Way("", lambda _: run(scope.ops.decode_inputs), read=lambda out: torch.cat(out[:3]))
    return Case(
        "decode_inputs", f"{len(slots)} sequences", [way],
        lambda: torch.cat(run(inputs.decode_inputs)[:3]), moved=len(slots) * 200, limit=0.0,
    )  # fmt: skip
