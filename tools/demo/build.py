"""One command for everything: corpus, tokenizer, both models, evaluation, model cards.

``python -m tools.demo.build --out xllm/assets``. It takes a few minutes on one GPU; on a CPU, try it with few steps:
``--steps 20 --draft-steps 20 --conversations 10000 --rows 2 --per-category 5``.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tools.demo.card import demo_card, draft_card, dump
from tools.demo.corpus.grammar import Conversation
from tools.demo.corpus.mixture import training_set
from tools.demo.data import Rows, build_rows
from tools.demo.evaluate import DRAFTED, Chat, Score, agreement, evaluate, held_out
from tools.demo.model import DEMO, DRAFT, Qwen3, Shape, save_checkpoint
from tools.demo.questions import FOLLOWED, FREE_FORM
from tools.demo.tokenizer import MAX_LENGTH, save_tokenizer, train_tokenizer
from tools.demo.train import Outcome, Recipe, train

TOKENIZER_CONVERSATIONS = 40_000


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="tools.demo.build", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    defaults = Recipe()
    parser.add_argument(
        "--out", type=Path, default=Path("xllm/assets"), help="folder for demo/ and demo-draft/"
    )
    parser.add_argument("--report", type=Path, help="also write everything measured as JSON to this file")
    parser.add_argument("--conversations", type=int, default=1_600_000, help="how many to generate")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="training steps of the chat model")
    parser.add_argument("--draft-steps", type=int, default=3000, help="training steps of the draft model")
    parser.add_argument(
        "--rows", type=int, default=defaults.rows, help=f"rows of {MAX_LENGTH} tokens per step"
    )
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--per-category", type=int, default=400, help="held-out questions per category")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that generate text"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def plain(scores: dict[str, Score]) -> dict[str, Any]:
    """Scores as data for the report."""
    return {name: asdict(entry) for name, entry in scores.items()}


def samples(chat: Chat) -> list[list[str]]:
    """The hand-written questions with the model's replies."""
    singles = chat.answer([[{"role": "user", "content": question}] for question in FREE_FORM])
    found = [[question, reply] for question, reply in zip(FREE_FORM, singles, strict=True)]
    for first, second in FOLLOWED:
        talk = [{"role": "user", "content": first}]
        (reply,) = chat.answer([talk])
        talk += [{"role": "assistant", "content": reply}, {"role": "user", "content": second}]
        found.append([first, reply, second, *chat.answer([talk])])
    return found


def measured(
    folder: Path, shape: Shape, outcome: Outcome, questions: list[Conversation], device: torch.device
) -> tuple[dict[str, Any], list[str]]:
    """Evaluate a finished checkpoint; the replies to the held-out questions come along."""
    begun = time.perf_counter()
    chat = Chat(folder, device)
    scores, replies = evaluate(chat, questions)
    for name, entry in scores.items():
        print(f"{folder.name} {name}: {entry.share:.1%} of {entry.asked}", flush=True)
    print(f"evaluated in {time.perf_counter() - begun:.0f} s", flush=True)
    part = {
        "shape": asdict(shape),
        "outcome": asdict(outcome),
        "scores": plain(scores),
        "samples": samples(chat),
    }
    return part, replies


def trained(
    folder: Path, shape: Shape, rows: Rows, recipe: Recipe, device: torch.device, teacher: Qwen3 | None = None
) -> tuple[Qwen3, Outcome]:
    """Train a model and write its weights."""
    print(f"training {folder.name}", flush=True)
    model, outcome = train(shape, rows, recipe, device, teacher)
    save_checkpoint(model, folder)
    return model.eval(), outcome


def build(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Make both checkpoints with their cards and return the report."""
    device, begun = torch.device(options.device), time.perf_counter()
    demo, draft = options.out / "demo", options.out / "demo-draft"
    tokenizer = train_tokenizer(
        training_set(options.seed, min(options.conversations, TOKENIZER_CONVERSATIONS))
    )
    for folder in (demo, draft):
        save_tokenizer(tokenizer, folder)
    rows = build_rows(tokenizer, options.seed, options.conversations, MAX_LENGTH, options.workers)
    print(
        f"{rows.conversations:,} conversations, {rows.tokens.size:,} tokens, {time.perf_counter() - begun:.0f} s",
        flush=True,
    )

    recipe = Recipe(
        steps=options.steps, rows=options.rows, learning_rate=options.learning_rate, seed=options.seed
    )
    teacher, demo_outcome = trained(demo, DEMO, rows, recipe, device)
    draft_recipe = replace(recipe, steps=options.draft_steps)
    _, draft_outcome = trained(draft, DRAFT, rows, draft_recipe, device, teacher)

    questions = held_out(options.seed, options.per_category, rows.questions)
    demo_part, replies = measured(demo, DEMO, demo_outcome, questions, device)
    draft_part, _ = measured(draft, DRAFT, draft_outcome, questions, device)
    agreed = agreement(Chat(draft, device), questions, replies)
    report: dict[str, Any] = {
        "command": command,
        "recipe": asdict(recipe),
        "data": {"conversations": rows.conversations, "tokens": int(rows.tokens.size), "length": MAX_LENGTH},
        "demo": demo_part,
        "draft": draft_part,
        "agreement": {**asdict(agreed), "drafted": DRAFTED},
    }
    (demo / "README.md").write_text(demo_card(report), encoding="utf-8")
    (draft / "README.md").write_text(draft_card(report), encoding="utf-8")
    print(f"draft agrees in {agreed.share:.1%}; all done in {time.perf_counter() - begun:.0f} s", flush=True)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Run the build from the command line."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = arguments(given)
    report = build(options, f"python -m tools.demo.build {shlex.join(given)}".strip())
    for sample in report["demo"]["samples"]:
        print("\n".join(f"{'>' if i % 2 == 0 else ' '} {text}" for i, text in enumerate(sample)), flush=True)
    if options.report:
        options.report.write_text(dump(report), encoding="utf-8")


if __name__ == "__main__":
    main()
