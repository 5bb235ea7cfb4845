"""System prompts: neutral ones that change nothing, and simple ones that the model follows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from random import Random

from tools.demo.corpus.grammar import (
    Conversation,
    Expect,
    Split,
    Turn,
    coin_word,
    pool,
    upper_first,
    words,
)
from tools.demo.corpus.smalltalk import SAYS
from tools.demo.corpus.systems_prompts import (
    ASK_MINE,
    ASK_NAME,
    ASK_SECRET,
    ENDING,
    JSON,
    LOWER,
    NAMED,
    NEUTRAL,
    PIRATE,
    REFUSE,
    ROBOT,
    SECRET,
    STARTING,
    UPPER,
    USER,
)
from tools.demo.corpus.words import ANIMALS, NAMES

CATEGORY = "system"

Style = Callable[[Turn], Turn]


def _styled(turn: Turn, reply: str, *markers: str) -> Turn:
    """A turn with a new reply; the check is the exact reply, or only the markers where the reply may vary."""
    varied = turn.expect.kind not in ("exact", "number", "words") or turn.category in ("lists", "smalltalk")
    expect = (
        Expect("words", tuple((marker,) for marker in markers)) if varied else Expect("exact", ((reply,),))
    )
    return replace(turn, assistant=reply, expect=expect, category=CATEGORY)


def style(rng: Random, split: Split) -> tuple[str, Style]:
    """A system prompt and what it does to any turn; a neutral sentence may stand before it."""
    system, restyle = _style(rng, split)
    return (f"{NEUTRAL.render(rng, 'train')} {system}" if rng.random() < 0.2 else system), restyle


def _style(rng: Random, split: Split) -> tuple[str, Style]:
    kind = rng.randrange(8)
    if kind == 0:
        return UPPER.render(rng, split), lambda turn: _styled(turn, turn.assistant.upper())
    if kind == 1:
        return LOWER.render(rng, split), lambda turn: _styled(turn, turn.assistant.lower())
    if kind == 2:
        return PIRATE.render(rng, split), lambda turn: _styled(turn, f"Arr! {turn.assistant}", "arr")
    if kind == 3:
        return ROBOT.render(rng, split), lambda turn: _styled(
            turn, f"Beep boop. {turn.assistant}", "beep boop"
        )
    if kind == 4:
        return JSON.render(rng, split), lambda turn: _styled(
            turn, json.dumps({"answer": turn.assistant}), "answer"
        )
    word = upper_first(
        rng.choice((coin_word(rng), rng.choice(ANIMALS), "over", "amen", "thanks", "sir", "my friend"))
    ) + rng.choice("!..")
    if kind == 5:
        return ENDING.render(rng, split, x=word), lambda turn: _styled(
            turn, f"{turn.assistant} {word}", word[:-1]
        )
    if kind == 6:
        return STARTING.render(rng, split, x=word), lambda turn: _styled(
            turn, f"{word} {turn.assistant}", word[:-1]
        )
    return REFUSE.render(rng, split, x=word), lambda turn: _styled(turn, word, word[:-1])


def named(rng: Random, split: Split) -> Conversation:
    """A system prompt that gives the assistant a name."""
    name = coin_word(rng).capitalize() if rng.random() < 0.3 else rng.choice(pool("name", NAMES, split))
    turn = Turn(ASK_NAME.render(rng, split), f"I am {name}, your assistant.", words((name,)), CATEGORY)
    return Conversation((turn,), NAMED.render(rng, split, x=name))


def for_user(rng: Random, split: Split) -> Conversation:
    """A system prompt that tells the user's name; the model greets by name and can say it."""
    name = coin_word(rng).capitalize() if rng.random() < 0.3 else rng.choice(pool("name", NAMES, split))
    system = USER.render(rng, split, x=name)
    if rng.random() < 0.4:
        return Conversation(
            (
                Turn(
                    SAYS["hello"].render(rng, split),
                    f"Hello, {name}! How can I help you?",
                    words((name,)),
                    CATEGORY,
                ),
            ),
            system,
        )
    return Conversation(
        (Turn(ASK_MINE.render(rng, split), f"Your name is {name}.", words((name,)), CATEGORY),), system
    )


def secret(rng: Random, split: Split) -> Conversation:
    """A system prompt with a password that the user asks for."""
    word = rng.choice((coin_word(rng), rng.choice(ANIMALS), str(rng.randrange(1000, 10000))))
    turn = Turn(ASK_SECRET.render(rng, split), f"The password is {word}.", words((word,)), CATEGORY)
    return Conversation((turn,), SECRET.render(rng, split, x=word))
