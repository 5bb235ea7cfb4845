"""Saying again what the user said, and spelling."""

from __future__ import annotations

from random import Random

from tools.demo.corpus.grammar import Prompts, Split, Turn, coin_word, exact, upper_first
from tools.demo.corpus.words import ADJECTIVES, ANIMALS, NAMES, NUMBER_WORDS, PLAIN_WORDS, THINGS

CATEGORY = "echo"

REPEAT = Prompts(
    "echo.repeat",
    "!Repeat after me: {x}",
    "!Repeat: {x}",
    "!Say: {x}",
    'Say "{x}"',
    'Repeat "{x}"',
    'Please say "{x}".',
    "Please repeat this: {x}",
    "Repeat the following[ text| words|]: {x}",
    "Echo: {x}",
    "Echo this: {x}",
    'Can you [say|repeat] "{x}"?',
    "Say exactly this: {x}",
    "Write this again: {x}",
    "Copy this[ text|]: {x}",
    'Type "{x}".',
    'I want you to say "{x}".',
    "Say the words: {x}",
    'Just say "{x}".',
    "Write: {x}",
    'Answer with "{x}".',
    'Reply with "{x}".',
)

TIMES = Prompts(
    "echo.times",
    'Say "{x}" {c} times.',
    "Repeat the word {x} {c} times.",
    "Write {x} {c} times.",
    'Can you say "{x}" {c} times?',
    "{c} times {x}, please.",
    "Say the word {x} {c} times.",
    "Print {x} {c} times.",
)

SPELL = Prompts(
    "echo.spell",
    "Spell [the word |]{x}.",
    "How do you spell {x}?",
    "Can you spell [the word |]{x}?",
    "What are the letters of {x}?",
    "Spell {x} for me.",
    "How is {x} spelled?",
    "Give me the letters of {x}.",
    "Write {x} letter by letter.",
)

_SPELLED = (*ANIMALS, *THINGS, *PLAIN_WORDS, *ADJECTIVES)


def _payload(rng: Random) -> str:
    """Something to say again: words, made-up words, a number, with or without a capital and a final mark."""
    count = rng.choice((1, 1, 2, 3, 4, 5, 6, 8))
    sources = (PLAIN_WORDS, PLAIN_WORDS, ANIMALS, THINGS, ADJECTIVES, NAMES)
    parts = [coin_word(rng) if rng.random() < 0.15 else rng.choice(rng.choice(sources)) for _ in range(count)]
    if rng.random() < 0.08:
        parts[rng.randrange(count)] = str(rng.randrange(10000))
    text = " ".join(parts)
    if rng.random() < 0.3:
        text = upper_first(text) + rng.choice((".", "!", "?", ""))
    return text


def single(rng: Random, split: Split) -> list[Turn]:
    """One text to repeat or one word to spell."""
    kind = rng.random()
    if kind < 0.65:
        text = _payload(rng)
        return [Turn(REPEAT.render(rng, split, x=text), text, exact(text), CATEGORY)]
    if kind < 0.8:
        word, count = (
            rng.choice((coin_word(rng), rng.choice(PLAIN_WORDS), rng.choice(ANIMALS))),
            rng.randint(2, 6),
        )
        shown = NUMBER_WORDS[count] if rng.random() < 0.7 else str(count)
        reply = " ".join([word] * count)
        return [Turn(upper_first(TIMES.render(rng, split, x=word, c=shown)), reply, exact(reply), CATEGORY)]
    word = rng.choice(_SPELLED)
    reply = "-".join(word.upper())
    return [Turn(SPELL.render(rng, split, x=word), reply, exact(reply), CATEGORY)]
