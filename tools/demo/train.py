"""Training: AdamW on packed rows, attention inside each conversation only, optionally distilled from a larger model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from tools.demo.data import ANSWER, BEGIN, CUT, Rows
from tools.demo.model import Mask, Qwen3, Shape, parameters


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training run."""

    steps: int = 6000
    rows: int = 32
    """Rows of tokens per step."""
    learning_rate: float = 3e-3
    warmup: int = 200
    weight_decay: float = 0.1
    clip: float = 1.0
    question_weight: float = 0.1
    """Weight of the loss on what users and system prompts say; the assistant's words have weight 1."""
    distil: float = 0.5
    """Share of the loss that follows the teacher's distribution, where there is a teacher."""
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a run cost and where it ended, for the model card."""

    parameters: int
    steps: int
    tokens: int
    seconds: float
    loss: float
    device: str


@dataclass(frozen=True)
class Batch:
    """Some rows on the device, with the positions and the attention mask of their conversations."""

    tokens: Tensor
    positions: Tensor
    mask: Mask
    weights: Tensor
    """Of the loss of predicting the *next* token at each position; 0 in the last column."""


def make_batch(tokens: Tensor, flags: Tensor, question_weight: float) -> Batch:
    """Derive positions, mask and loss weights from the flags of packed rows."""
    begins = (flags & BEGIN).bool()
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    positions = places - torch.where(begins, places, 0).cummax(1).values
    documents = begins.int().cumsum(1)
    weights = torch.where((flags & ANSWER).bool(), 1.0, question_weight)
    weights = weights.masked_fill((flags & (CUT | BEGIN)).bool(), 0.0)
    return Batch(tokens.long(), positions, document_mask(documents), F.pad(weights[:, 1:], (0, 1)))


def document_mask(documents: Tensor) -> Mask:
    """Let each token see itself and what came before it in its own conversation."""
    rows, length = documents.shape
    if documents.device.type != "cuda":
        causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
        return (causal & (documents[:, :, None] == documents[:, None, :]))[:, None]

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del head
        return (query >= key) & (documents[row, query] == documents[row, key])

    return create_block_mask(visible, rows, None, length, length, device=documents.device)


def weighted_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross entropy of the next token, weighted."""
    targets = batch.tokens.roll(-1, 1)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return (losses * batch.weights.flatten()).sum() / batch.weights.sum().clamp(min=1)


def teacher_loss(logits: Tensor, taught: Tensor, batch: Batch) -> Tensor:
    """Cross entropy against the teacher's distribution, weighted alike."""
    losses = -(taught.float().softmax(-1) * logits.float().log_softmax(-1)).sum(-1)
    return (losses * batch.weights).sum() / batch.weights.sum().clamp(min=1)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to zero, as a factor."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: Qwen3, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW that decays matrices and leaves the norms alone."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() != 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    on_gpu = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=on_gpu)


def make_objective(model: Qwen3, teacher: Qwen3 | None, recipe: Recipe) -> Callable[[Batch], Tensor]:
    """The loss of a batch; compiled on GPUs."""
    on_gpu = next(model.parameters()).is_cuda
    run = torch.compile(model) if on_gpu else model
    teach = torch.compile(teacher) if on_gpu and teacher is not None else teacher
    add = torch.compile(weighted_loss) if on_gpu else weighted_loss
    follow = torch.compile(teacher_loss) if on_gpu else teacher_loss

    def objective(batch: Batch) -> Tensor:
        logits = run(batch.tokens, batch.positions, batch.mask)
        loss: Tensor = add(logits, batch)
        if teach is None:
            return loss
        with torch.no_grad():
            taught = teach(batch.tokens, batch.positions, batch.mask)
        return (1 - recipe.distil) * loss + recipe.distil * follow(logits, taught, batch)

    return objective


def row_order(count: int, recipe: Recipe) -> Tensor:
    """Which rows each step takes: every row once, in a new order each time around."""
    generator = torch.Generator().manual_seed(recipe.seed)
    needed = recipe.steps * recipe.rows
    orders = [torch.randperm(count, generator=generator) for _ in range(math.ceil(needed / count))]
    return torch.cat(orders)[:needed].view(recipe.steps, recipe.rows)


def train(
    shape: Shape, rows: Rows, recipe: Recipe, device: torch.device, teacher: Qwen3 | None = None
) -> tuple[Qwen3, Outcome]:
    """Train one model from nothing."""
    torch.manual_seed(recipe.seed)
    model = Qwen3(shape).to(device)
    optimizer = make_optimizer(model, recipe)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, recipe))
    objective = make_objective(model, teacher, recipe)
    tokens, flags = torch.from_numpy(rows.tokens).to(device), torch.from_numpy(rows.flags).to(device)
    order = row_order(len(tokens), recipe).to(device)
    begun, shown = time.perf_counter(), 0.0
    recent: list[Tensor] = []
    for step in range(recipe.steps):
        batch = make_batch(tokens[order[step]], flags[order[step]], recipe.question_weight)
        with torch.autocast(device.type, torch.bfloat16):
            loss = objective(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        recent = [*recent[-49:], loss.detach()]
        if time.perf_counter() - shown > 10 or step == recipe.steps - 1:
            shown = time.perf_counter()
            print(
                f"step {step + 1}/{recipe.steps} loss {loss.item():.4f} at {shown - begun:.0f} s", flush=True
            )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    seen = recipe.steps * recipe.rows * tokens.shape[1]
    final = torch.stack(recent).mean().item()
    return model, Outcome(parameters(model), recipe.steps, seen, time.perf_counter() - begun, final, name)
