"""Greetings, questions about the model itself, feelings, thanks, jokes, and the user's name."""

from __future__ import annotations

from random import Random

from tools.demo.corpus.grammar import Expect, Prompts, Split, Turn, casual, coin_word, pool, words
from tools.demo.corpus.smalltalk_intents import INTENTS, JOKES
from tools.demo.corpus.words import CITIES, HOBBIES, NAMES

CATEGORY = "smalltalk"

SAYS = {intent.key: Prompts("smalltalk." + intent.key, *intent.says) for intent in INTENTS}

NAME = Prompts(
    "smalltalk.name",
    "!My name is {x}.",
    "!I am {x}.",
    "!I'm {x}.",
    "[Hello|Hi|Hey], I am {x}.",
    "[Hello|Hi|Hey], my name is {x}.",
    "[Hello|Hi]! I'm {x}.",
    "You can call me {x}.",
    "Call me {x}.",
    "My friends call me {x}.",
    "People call me {x}.",
    "This is {x}.",
    "{x} is my name.",
    "The name is {x}.",
    "[Hi|Hello], {x} here.",
    "Let me introduce myself: I am {x}.",
    "You may call me {x}.",
    "Just call me {x}.",
    "Please call me {x}.",
    "Everybody calls me {x}.",
    "I am called {x}.",
    "My name's {x}.",
    "I go by {x}.",
    "I am {x}, [nice to meet you|pleased to meet you|good to see you].",
    "My name is {x}, [nice to meet you|and yours|what is yours].",
    "It is me, {x}.",
    "I go by the name {x}.",
    "I am known as {x}.",
    "They call me {x}.",
    "I am named {x}.",
    "People know me as {x}.",
    "My first name is {x}.",
)

FROM = Prompts(
    "smalltalk.from",
    "!I live in {x}.",
    "!I am from {x}.",
    "I come from {x}.",
    "My home is in {x}.",
    "I was born in {x}.",
    "I grew up in {x}.",
    "I was raised in {x}.",
    "My birthplace is {x}.",
    "I was born and live in {x}.",
    "I stay in {x}.",
    "My family lives in {x}.",
    "I moved to {x}.",
    "My home town is {x}.",
    "I work in {x}.",
    "My city is {x}.",
    "I am writing from {x}.",
)

LIKES = Prompts(
    "smalltalk.likes",
    "!I [like|love|enjoy] {x}.",
    "My hobby is {x}.",
    "I am fond of {x}.",
    "In my free time I do a lot of {x}.",
    "My favourite hobby is {x}.",
    "{x} is my hobby.",
    "I spend my weekends with {x}.",
    "What I like most is {x}.",
)

NAME_AND_CITY = Prompts(
    "smalltalk.name_and_city",
    "!My name is {x} and I live in {y}.",
    "I am {x} from {y}.",
    "I am {x} and I am from {y}.",
    "Hello, I am {x} and my home is {y}.",
    "I live in {y} and my name is {x}.",
    "This is {x} from {y}.",
    "My name is {x}. I live in {y}.",
    "{x} is my name and {y} is my city.",
    "I'm {x}, I come from {y}.",
    "I live in {y}, and I am {x}.",
    "I live in {y}. My name is {x}.",
    "I come from {y} and I am called {x}.",
    "My home is {y} and I am {x}.",
    "I am from {y}, my name is {x}.",
    "From {y}, I am {x}.",
    "My city is {y} and my name is {x}.",
    "Hi, {x} from {y} here.",
)

AGAIN = Prompts(
    "smalltalk.again",
    "Another one[!|, please.]",
    "One more[!|, please.]",
    "Tell me another[ one| joke].",
    "Again!",
    "Do you know another one?",
)


def person(rng: Random, split: Split) -> str:
    """A first name; now and then a made-up one, so that the model copies names it never saw."""
    return coin_word(rng).capitalize() if rng.random() < 0.2 else rng.choice(pool("name", NAMES, split))


def introduce(rng: Random, split: Split, name: str) -> Turn:
    """The user tells a name; the reply greets by that name."""
    return Turn(NAME.render(rng, split, x=name), f"Nice to meet you, {name}!", words(name), CATEGORY)


def introduce_with_city(rng: Random, split: Split, name: str, city: str) -> Turn:
    """The user tells a name and a city at once."""
    reply = f"Nice to meet you, {name}! {city} sounds like a nice place."
    return Turn(NAME_AND_CITY.render(rng, split, x=name, y=city), reply, words(name, city), CATEGORY)


def hometown(rng: Random, split: Split, city: str) -> Turn:
    """The user tells where they live."""
    return Turn(FROM.render(rng, split, x=city), f"{city} sounds like a nice place.", words(city), CATEGORY)


def hobby(rng: Random, split: Split, name: str) -> Turn:
    """The user tells a hobby."""
    user = LIKES.render(rng, split, x=name)
    return Turn(user[:1].upper() + user[1:], f"That is great! I hear {name} is fun.", words(name), CATEGORY)


def single(rng: Random, split: Split) -> list[Turn]:
    """One exchange of small talk."""
    if rng.random() < 0.15:
        return [introduce(rng, split, person(rng, split))]
    if rng.random() < 0.04:
        return [introduce_with_city(rng, split, person(rng, split), rng.choice(CITIES))]
    if rng.random() < 0.06:
        return [hometown(rng, split, rng.choice(CITIES))]
    if rng.random() < 0.06:
        return [hobby(rng, split, rng.choice(HOBBIES))]
    intent = rng.choice(INTENTS)
    user = casual(rng, SAYS[intent.key].render(rng, split), split)
    if intent.key == "joke":
        return [Turn(user, rng.choice(JOKES), Expect("exact", (JOKES,)), CATEGORY)]
    return [Turn(user, rng.choice(intent.replies), words(*intent.keys.split()), CATEGORY)]


def jokes(rng: Random, split: Split) -> list[Turn]:
    """Two different jokes in a row."""
    first, second = rng.sample(JOKES, 2)
    return [
        Turn(SAYS["joke"].render(rng, "train"), first, Expect("exact", (JOKES,)), CATEGORY),
        Turn(
            AGAIN.render(rng, split),
            second,
            Expect("exact", (tuple(j for j in JOKES if j != first),)),
            "multi-turn",
        ),
    ]
