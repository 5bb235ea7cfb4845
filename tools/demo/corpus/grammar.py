"""What every category of the corpus is written with: prompts with a strict held-out split, turns, expectations.

A *prompt set* is a list of paraphrase templates of one intent. ``[a|b|]`` picks an alternative (alternatives may
nest), ``{slot}`` is filled by the caller. Whole templates are held out by a hash of their text, so a held-out
question was never seen in training with any choice of alternatives or slots. The most ordinary wordings begin with
``!``: they are always trained on and never counted as held out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Literal

Split = Literal["train", "held_out"]
ExpectKind = Literal["words", "exact", "number", "members", "json", "story", "free"]

HELD_OUT_SHARE = 0.15

_INNERMOST = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"(\{\w+\})")
_OPENERS = (
    "Hey, ", "Hi, ", "Ok, ", "Okay, ", "So, ", "Well, ", "Um, ", "Quick question: ", "Hello! ", "Hi there. ", "Hello, ",
    "Question: ", "Now, ", "Alright, ", "One more thing: ", "I have a question. ", "Next: ", "And now: ", "Good, ",
)  # fmt: skip
_CLOSERS = (" Thanks!", " Thank you.", " please", " Please.", " :)", " Thanks in advance.", " I am curious.")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"

_SYNONYMS = (
    ("What is", "What's", "Whats"),
    ("How do I", "How can I", "How would I", "How should I", "How could I", "How does one", "How do we", "How to"),
    ("Can you", "Could you", "Would you", "Will you", "Are you able to"),
    ("I want", "I would like", "I'd like", "I wish"),
    ("Tell me", "Let me know", "Say"),
    ("Show me", "Let me see"),
    ("Give me", "Get me", "Provide", "Hand me"),
    ("I am", "I'm", "Im"),
    ("do not", "don't", "dont"),
    ("does not", "doesn't"),
    ("did not", "didn't"),
    ("can not", "cannot", "can't"),
    ("it is", "it's"),
    ("that is", "that's"),
    ("you are", "you're", "youre"),
    ("useful", "helpful", "handy"),
    ("Which", "What"),
    ("the server", "an xLLM server", "the xLLM server", "my server"),
    ("explain", "describe", "clarify"),
    ("maybe", "perhaps"),
)  # fmt: skip
_GROUP_OF = {phrase.lower(): group for group in _SYNONYMS for phrase in group}
_PHRASE = re.compile(
    r"\b(" + "|".join(sorted(map(re.escape, _GROUP_OF), key=len, reverse=True)) + r")\b", re.IGNORECASE
)


@dataclass(frozen=True)
class Expect:
    """What a good reply looks like, checkable by a program.

    ``groups`` holds, for ``words``, sets of alternatives of which one each must occur; for ``exact`` the accepted
    replies; for ``number`` the last integer of the reply; for ``members`` a count and the group to list from; for ``json`` ``(key,)`` or ``(key, value)`` pairs; for
    ``story`` the words of the topic. ``forbidden`` must not occur.
    """

    kind: ExpectKind = "free"
    groups: tuple[tuple[str, ...], ...] = ()
    forbidden: tuple[str, ...] = ()


@dataclass(frozen=True)
class Turn:
    """One exchange: what the user says, what a good assistant answers, and how to recognise a good answer."""

    user: str
    assistant: str
    expect: Expect = Expect()
    category: str = ""


@dataclass(frozen=True)
class Conversation:
    """A system prompt (or none) and the turns that follow it; its category is that of the last turn."""

    turns: tuple[Turn, ...]
    system: str | None = None


Maker = Callable[[Random, Split], list[Turn]]


def words(*groups: str | tuple[str, ...], forbidden: tuple[str, ...] = ()) -> Expect:
    """Expect that each group occurs; a plain string with ``/`` lists alternatives: ``"fast/quick"``."""
    return Expect("words", tuple(tuple(g.split("/")) if isinstance(g, str) else g for g in groups), forbidden)


def exact(*accepted: str) -> Expect:
    """Expect one of these replies, up to case, outer spaces and final punctuation."""
    return Expect("exact", (accepted,))


def number(value: int) -> Expect:
    """Expect ``value`` to be the last integer of the reply."""
    return Expect("number", ((str(value),),))


def stable_fraction(text: str) -> float:
    """A number in [0, 1) that depends on nothing but ``text``: the same on every machine and in every run."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def canonical(template: str) -> str:
    """The template with every phrase replaced by the first of its synonyms, in lower case."""
    return _PHRASE.sub(lambda match: _GROUP_OF[match[0].lower()][0], template).lower()


def split_lines(key: str, lines: Sequence[str]) -> dict[Split, tuple[str, ...]]:
    """Divide templates into train and held-out ones; at least one of each when there are three or more.

    Templates that differ in synonyms alone stay on the same side.
    """
    families: dict[str, list[str]] = {}
    for line in dict.fromkeys(lines):
        families.setdefault(canonical(line.removeprefix("!")), []).append(line)
    free = [
        family
        for family, members in families.items()
        if not any(member.startswith("!") for member in members)
    ]
    ranked = sorted(free, key=lambda family: stable_fraction(key + "\n" + family))
    count = min(len(ranked), max(1, round(HELD_OUT_SHARE * len(families)))) if len(families) >= 3 else 0
    apart = set(ranked[:count])
    train = tuple(
        line.removeprefix("!") for name, members in families.items() if name not in apart for line in members
    )
    held_out = tuple(line for name in ranked[:count] for line in families[name])
    return {"train": train, "held_out": held_out or train}


def of_split(key: str, item: str, split: Split, share: float = HELD_OUT_SHARE) -> bool:
    """Whether an item (an operand pair, a topic, a name) belongs to ``split``."""
    return (stable_fraction(key + "\n" + item) < share) == (split == "held_out")


@cache
def pool(key: str, items: tuple[str, ...], split: Split) -> tuple[str, ...]:
    """The items of a word list that belong to ``split``."""
    return tuple(item for item in items if of_split(key, item, split))


def expand(rng: Random, text: str) -> str:
    """Choose among the ``[a|b]`` alternatives of a template, innermost first."""
    while "[" in text:
        text = _INNERMOST.sub(lambda match: rng.choice(match[1].split("|")), text)
    return text


def fill(text: str, slots: dict[str, str]) -> str:
    """Put the slot values into a template; text in braces that names no slot stays."""
    return _SLOT.sub(lambda match: slots.get(match[1][1:-1], match[1]), text)


def lower_first(text: str) -> str:
    """Lower-case the first letter unless the text starts with "I", an abbreviation, a name slot or a quote."""
    first = text.split(" ", 1)[0]
    keep = (
        first in ("I", "I'm", "I'd", "I've")
        or (len(first) > 1 and first[1:2].isupper())
        or not text[:1].isalpha()
    )
    return text if keep else text[:1].lower() + text[1:]


def upper_first(text: str) -> str:
    """Capitalise a sentence without touching the rest of it."""
    return text[:1].upper() + text[1:]


def _typo(rng: Random, literal: str) -> str:
    """Damage one letter of a literal: drop, double, swap or replace it."""
    spots = [i for i in range(1, len(literal) - 1) if literal[i].isalpha() and literal[i + 1].isalpha()]
    if not spots:
        return literal
    i = rng.choice(spots)
    damaged = rng.choice(
        ("", literal[i] * 2, literal[i + 1] + literal[i], rng.choice(_LETTERS)),
    )
    return literal[:i] + damaged + literal[i + (2 if damaged == literal[i + 1] + literal[i] else 1) :]


def _reword(rng: Random, template: str) -> str:
    """Replace one phrase by a synonym."""
    found = list(_PHRASE.finditer(template))
    if not found:
        return template
    match = rng.choice(found)
    phrase = rng.choice(_GROUP_OF[match[0].lower()])
    phrase = upper_first(phrase) if match[0][0].isupper() or phrase.startswith("I") else lower_first(phrase)
    return template[: match.start()] + phrase + template[match.end() :]


def roughen(rng: Random, template: str) -> str:
    """Write a template the way people type: other words, openers, closers, no capitals, no final mark, a typo."""
    if rng.random() < 0.30:
        template = _reword(rng, template)
    if rng.random() < 0.12:
        template = rng.choice(_OPENERS) + lower_first(template)
    if rng.random() < 0.08 and template[-1:] in ".?!":
        template += rng.choice(_CLOSERS)
    if rng.random() < 0.25 and template[-1:] in ".?!":
        template = template[:-1]
    parts = _SLOT.split(template)
    if rng.random() < 0.25:
        parts = [part if _SLOT.fullmatch(part) else part.lower() for part in parts]
    if rng.random() < 0.10:
        index = rng.choice(range(0, len(parts), 2))
        parts[index] = _typo(rng, parts[index])
    return "".join(parts)


class Prompts:
    """The paraphrases of one intent, split into train and held-out templates."""

    def __init__(self, key: str, *lines: str) -> None:
        self.key = key
        self.lines = split_lines(key, lines)

    def render(self, rng: Random, split: Split, **slots: str) -> str:
        """One user message; training messages are roughened, held-out ones are clean."""
        template = expand(rng, rng.choice(self.lines[split]))
        if split == "train":
            template = roughen(rng, template)
        return fill(template, slots)


def casual(rng: Random, text: str, split: Split) -> str:
    """A slot value as people type it: sometimes in lower case (training only)."""
    return text.lower() if split == "train" and rng.random() < 0.15 else text


def coin_word(rng: Random) -> str:
    """A made-up word, so that copying is learnt as copying and not as recall."""
    onsets = (
        "b",
        "d",
        "f",
        "g",
        "k",
        "l",
        "m",
        "n",
        "p",
        "r",
        "s",
        "t",
        "v",
        "z",
        "br",
        "dr",
        "kl",
        "pl",
        "tr",
        "sh",
    )
    syllables = (rng.choice(onsets) + rng.choice("aeiou") for _ in range(rng.choice((2, 2, 3))))
    return "".join(syllables) + rng.choice(("", "", "n", "r", "x", "l", "t", "s"))


def join_and(items: Sequence[str], word: str = "and") -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {word} {items[-1]}"


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return ("an " if noun[:1].lower() in "aeiou" else "a ") + noun
