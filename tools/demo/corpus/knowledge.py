"""Small general knowledge: capitals, opposites, animals, colours, days and single facts."""

from __future__ import annotations

from random import Random

from tools.demo.corpus.grammar import Prompts, Split, Turn, article, casual, join_and, upper_first, words
from tools.demo.corpus.knowledge_facts import (
    CAPITALS,
    FACTS,
    GROUPS,
    HABITATS,
    LEGS,
    MIXES,
    OPPOSITES,
    PLURALS,
    SOUNDS,
    THING_COLOURS,
)
from tools.demo.corpus.knowledge_prompts import (
    AFTER,
    AND,
    BEFORE,
    CAPITAL,
    COLOUR,
    COUNTRY,
    HABITAT,
    IS_A,
    KIND,
    LEG,
    MIX,
    OPPOSITE,
    SOUND,
)
from tools.demo.corpus.words import DAYS, MONTHS, NUMBER_WORDS

CATEGORY = "knowledge"

FACT = [Prompts("knowledge.fact." + answer, *questions) for answer, _, questions in FACTS]


def _capital(rng: Random, split: Split) -> Turn:
    country, city = rng.choice(list(CAPITALS.items()))
    user = CAPITAL.render(rng, split, x=casual(rng, country, split))
    return Turn(user, f"The capital of {country} is {city}.", words(city), CATEGORY)


def _country(rng: Random, split: Split) -> Turn:
    country, city = rng.choice(list(CAPITALS.items()))
    user = COUNTRY.render(rng, split, x=casual(rng, city, split))
    return Turn(user, f"{city} is the capital of {country}.", words((country,)), CATEGORY)


def _opposite(rng: Random, split: Split) -> Turn:
    word = rng.choice(list(OPPOSITES))
    user = OPPOSITE.render(rng, split, x=word)
    return Turn(user, f"The opposite of {word} is {OPPOSITES[word]}.", words(OPPOSITES[word]), CATEGORY)


def _animal(rng: Random, split: Split) -> Turn:
    kind = rng.randrange(3)
    if kind == 0:
        animal, sound = rng.choice(list(SOUNDS.items()))
        user = SOUND.render(rng, split, x=article(animal))
        return Turn(user, f"{upper_first(article(animal))} says {sound}.", words(sound), CATEGORY)
    if kind == 1:
        legs = rng.choice(list(LEGS))
        animal = rng.choice(LEGS[legs])
        count, noun = NUMBER_WORDS[legs] if legs else "no", "arms" if animal == "octopus" else "legs"
        user = LEG.render(rng, split, x=article(animal))
        return Turn(user, f"{upper_first(article(animal))} has {count} {noun}.", words(count), CATEGORY)
    place = rng.choice(list(HABITATS))
    animal = rng.choice(HABITATS[place])
    user = HABITAT.render(rng, split, x=article(animal))
    return Turn(user, f"{upper_first(article(animal))} lives {place}.", words(place.split()[-1]), CATEGORY)


def _colour(rng: Random, split: Split) -> Turn:
    if rng.random() < 0.3:
        (first, second), result = rng.choice(list(MIXES.items()))
        a, b = rng.sample((first, second), 2)
        user = MIX.render(rng, split, a=a, b=b)
        return Turn(user, f"{upper_first(a)} and {b} make {result}.", words(result), CATEGORY)
    thing, colour = rng.choice(list(THING_COLOURS.items()))
    verb = "looks" if thing == "the night sky" else "is"
    return Turn(
        COLOUR.render(rng, split, x=thing), f"{upper_first(thing)} {verb} {colour}.", words(colour), CATEGORY
    )


_MEMBERS = (
    "animal",
    "fruit",
    "vegetable",
    "colour",
    "tool",
    "instrument",
    "sport",
    "vehicle",
    "drink",
    "job",
    "flower",
)
_MASS = ("colour", "sport", "drink")


def _noun(kind: str, member: str) -> str:
    return member if kind in _MASS else article(member)


def _kind(rng: Random, split: Split) -> Turn:
    kind = rng.choice(_MEMBERS)
    member = rng.choice([m for m in GROUPS[kind] if m not in ("orange", "violet", "rose")])
    subject = _noun(kind, member)
    if rng.random() < 0.5:
        user = KIND.render(rng, split, x=subject)
        return Turn(user, f"{upper_first(subject)} is {article(kind)}.", words(kind), CATEGORY)
    asked = kind if rng.random() < 0.5 else rng.choice([k for k in _MEMBERS if k != kind])
    user = IS_A.render(rng, split, x=subject, y=article(asked))
    yes = asked == kind
    reply = (
        f"Yes, {subject} is {article(kind)}."
        if yes
        else f"No, {subject} is {article(kind)}, not {article(asked)}."
    )
    return Turn(user, reply, words("yes" if yes else "no", kind), CATEGORY)


def _calendar(rng: Random, split: Split) -> Turn:
    names, kind = (DAYS, "day") if rng.random() < 0.5 else (MONTHS, "month")
    index = rng.randrange(len(names))
    step = rng.choice((1, -1))
    asked, result = names[index], names[(index + step) % len(names)]
    user = (AFTER if step == 1 else BEFORE).render(rng, split, k=kind, x=casual(rng, asked, split))
    return Turn(
        user, f"{'After' if step == 1 else 'Before'} {asked} comes {result}.", words(result), CATEGORY
    )


def _fact(rng: Random, split: Split) -> Turn:
    index = rng.randrange(len(FACTS))
    answer, keys, _ = FACTS[index]
    return Turn(FACT[index].render(rng, split), answer, words(*keys.split()), CATEGORY)


def single(rng: Random, split: Split) -> list[Turn]:
    """One question of general knowledge."""
    makers = (_capital, _country, _opposite, _animal, _colour, _kind, _calendar, _fact)
    return [rng.choices(makers, (18, 7, 16, 12, 8, 12, 8, 22))[0](rng, split)]


def follow_up(rng: Random, split: Split) -> list[Turn]:
    """A capital or an opposite, then the same about something else."""
    if rng.random() < 0.6:
        first = _capital(rng, "train")
        country, city = rng.choice(list(CAPITALS.items()))
        reply, expect = f"The capital of {country} is {city}.", words(city)
        return [first, Turn(AND.render(rng, split, x=country), reply, expect, "multi-turn")]
    word = rng.choice(list(OPPOSITES))
    reply = f"The opposite of {word} is {OPPOSITES[word]}."
    expect = words(OPPOSITES[word])
    return [_opposite(rng, "train"), Turn(AND.render(rng, split, x=word), reply, expect, "multi-turn")]


def members(rng: Random, kind: str, count: int) -> list[str]:
    """``count`` different members of a group."""
    return rng.sample(GROUPS[kind], count)


def plural(kind: str) -> str:
    """The plural of a group's name."""
    return PLURALS.get(kind, kind + "s")


def listed(items: list[str]) -> str:
    """A sentence that names the items."""
    return upper_first(join_and(items)) + "."
