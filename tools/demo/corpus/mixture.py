"""Whole conversations: which categories, how many turns, with which system prompt; and the held-out questions."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from tools.demo.corpus import (
    arithmetic,
    dialogue,
    echo,
    knowledge,
    serving,
    smalltalk,
    stories,
    structured,
    systems,
    unknown,
)
from tools.demo.corpus.grammar import Conversation, Maker, Split, Turn
from tools.demo.corpus.systems_prompts import NEUTRAL

SINGLE: dict[str, tuple[Maker, float]] = {
    "smalltalk": (smalltalk.single, 18),
    "serving": (serving.single, 18),
    "arithmetic": (arithmetic.single, 28),
    "knowledge": (knowledge.single, 16),
    "story": (stories.single, 6),
    "json": (structured.single_json, 10),
    "lists": (structured.single_list, 6),
    "echo": (echo.single, 8),
    "unknown": (unknown.single, 10),
}
FOLLOW_UPS: tuple[Maker, ...] = (
    serving.follow_up,
    arithmetic.follow_up,
    knowledge.follow_up,
    stories.follow_up,
    structured.follow_up,
    smalltalk.jokes,
    dialogue.nameless,
)
STYLED = ("smalltalk", "serving", "arithmetic", "knowledge", "lists", "unknown")
CATEGORIES = (*SINGLE, "multi-turn", "system")
LONGEST = 40
"""Turns of the longest conversations: together they reach beyond 1024 tokens."""


def _single(rng: Random, split: Split, names: tuple[str, ...] = tuple(SINGLE)) -> list[Turn]:
    makers, weights = zip(*(SINGLE[name] for name in names), strict=True)
    return [*rng.choices(makers, weights)[0](rng, split)]


def _small(rng: Random, count: int) -> list[Turn]:
    """Training turns with short messages, to stand between a fact and the question about it."""
    turns: list[Turn] = []
    while len(turns) < count:
        turn = _single(rng, "train")[0]
        if (
            len(turn.user) <= 60
            and "name" not in turn.user.lower()
            and not turn.assistant.startswith("Nice to meet")
        ):
            turns.append(turn)
    return turns


def _dependent(rng: Random, split: Split, longest: int) -> list[Turn]:
    """Turns that need the conversation: follow-ups, memory, quotes."""
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(FOLLOW_UPS)(rng, split)
    between = _small(rng, rng.choice((0, 0, 1, 1, 2, 3, rng.randint(0, longest))))
    if kind < 0.72:
        return dialogue.about_me(rng, split, between)
    if kind < 0.90:
        return dialogue.remembered(rng, split, between)
    return dialogue.quote(rng, split, between or _small(rng, 1))


def _system(rng: Random, split: Split) -> Conversation:
    """A conversation under a system prompt that matters."""
    kind = rng.random()
    if kind < 0.2:
        return systems.named(rng, split)
    if kind < 0.4:
        return systems.for_user(rng, split)
    if kind < 0.5:
        return systems.secret(rng, split)
    system, restyle = systems.style(rng, split)
    turns: list[Turn] = []
    for _ in range(rng.choice((1, 1, 2, 3)) if split == "train" else 1):
        turns += [restyle(turn) for turn in _single(rng, split, STYLED)]
    return Conversation(tuple(turns), system)


def _length(rng: Random) -> int:
    """How many independent turns: mostly few, seldom very many."""
    kind = rng.random()
    if kind < 0.70:
        return 1
    if kind < 0.96:
        return rng.randint(2, 6)
    return rng.randint(7, LONGEST)


def training_conversation(rng: Random) -> Conversation:
    """One conversation of the training set."""
    kind = rng.random()
    if kind < 0.10:
        return _system(rng, "train")
    turns: list[Turn] = []
    if kind < 0.25:
        turns = _dependent(rng, "train", 30)
    else:
        for _ in range(_length(rng)):
            turns += _single(rng, "train")
    if rng.random() < 0.06:
        turns += _dependent(rng, "train", 4)
    neutral = NEUTRAL.render(rng, "train") if rng.random() < 0.15 else None
    return Conversation(tuple(turns), neutral)


def training_set(seed: int, count: int) -> Iterator[Conversation]:
    """``count`` conversations that depend on the seed alone."""
    rng = Random(seed)
    for _ in range(count):
        yield training_conversation(rng)


def held_out_conversation(rng: Random, category: str) -> Conversation:
    """A conversation whose last turn is a held-out question of the category."""
    if category == "system":
        return _system(rng, "held_out")
    turns = (
        _dependent(rng, "held_out", 6) if category == "multi-turn" else SINGLE[category][0](rng, "held_out")
    )
    return Conversation(tuple(turns))


def held_out_set(seed: int, per_category: int) -> list[Conversation]:
    """The distinct ones among ``per_category`` drawn held-out conversations of each category."""
    chosen: list[Conversation] = []
    for category in CATEGORIES:
        rng = Random(f"{seed}:{category}")
        distinct: dict[tuple[str | None, tuple[str, ...]], Conversation] = {}
        for _ in range(per_category):
            conversation = held_out_conversation(rng, category)
            distinct.setdefault(
                (conversation.system, tuple(t.user for t in conversation.turns)), conversation
            )
        chosen += distinct.values()
    return chosen
