"""Conversations that need their own past: names, places and numbers told earlier, and what was said first."""

from __future__ import annotations

from random import Random

from tools.demo.corpus import smalltalk
from tools.demo.corpus.grammar import Expect, Prompts, Split, Turn, coin_word, pool
from tools.demo.corpus.words import ANIMALS, CITIES, COLOURS, HOBBIES, NAMES

CATEGORY = "multi-turn"

MY_NAME = Prompts(
    "dialogue.name",
    "!What is my name?",
    "What's my name?",
    "!Do you [remember|know] my name?",
    "!Who am I?",
    "Can you tell me my name?",
    "What did I say my name was?",
    "Tell me my name.",
    "How am I called?",
    "What am I called?",
    "How do you call me?",
    "What do you call me?",
    "What do people call me?",
    "Have you forgotten my name?",
    "Say my name.",
    "What name did I give you?",
    "Do you still know who I am?",
    "And what is my name?",
    "What was my name[ again|]?",
    "Did I tell you my name?",
    "Could you say my name?",
    "Which name did I tell you?",
)

MY_CITY = Prompts(
    "dialogue.city",
    "!Where do I live?",
    "Where am I from?",
    "Which city do I live in?",
    "Do you [remember|know] where I live?",
    "Where did I say that I live?",
    "What is my city?",
    "Tell me where I live.",
    "What is the city I live in?",
    "What city am I from?",
    "Where is my home?",
    "Which city is mine?",
    "In what city do I live?",
    "And where do I live?",
)

MY_HOBBY = Prompts(
    "dialogue.hobby",
    "!What is my hobby?",
    "!What do I like?",
    "Do you remember my hobby?",
    "What do I like to do?",
    "What did I say that I like?",
    "Tell me my hobby.",
    "What do I enjoy?",
    "What do I love to do?",
    "Which hobby do I have?",
    "What is it that I like?",
    "What do I do in my free time?",
    "And what is my hobby?",
)

TELL = Prompts(
    "dialogue.tell",
    "!My favourite {k} is {x}.",
    "Remember that my favourite {k} is {x}.",
    "My favorite {k} is {x}.",
    "The {k} that I like best is {x}.",
    "I want you to remember my favourite {k}: {x}.",
)

ASK = Prompts(
    "dialogue.ask",
    "!What is my favourite {k}?",
    "What's my favorite {k}?",
    "Which {k} do I like best?",
    "Do you remember my favourite {k}?",
    "Tell me my favourite {k}.",
    "What did I say my favourite {k} is?",
    "Which {k} is my favourite?",
    "Which {k} do I like [most|the most]?",
    "What {k} do I like best?",
    "What is the {k} that I like best?",
    "Name my favourite {k}.",
    "And my favourite {k}?",
)

PET = Prompts(
    "dialogue.pet",
    "!I have a {k} called {x}.",
    "My {k} is called {x}.",
    "My {k}'s name is {x}.",
    "I have a {k} named {x}.",
    "We have a {k} and its name is {x}.",
)

ASK_PET = Prompts(
    "dialogue.ask_pet",
    "!What is my {k} called?",
    "What is the name of my {k}?",
    "What's my {k}'s name?",
    "Do you remember my {k}'s name?",
    "How is my {k} called?",
    "Tell me the name of my {k}.",
)

SECRET = Prompts(
    "dialogue.secret",
    "Remember the {k} {x}.",
    "Please remember this {k}: {x}.",
    "The secret {k} is {x}.",
    "Keep in mind the {k} {x}.",
    "Do not forget the {k} {x}.",
    "Memorise the {k} {x}.",
)

ASK_SECRET = Prompts(
    "dialogue.ask_secret",
    "What was the {k}?",
    "!What is the [secret |]{k}?",
    "Which {k} did I tell you?",
    "Do you remember the {k}?",
    "Tell me the {k}[ again|].",
    "What {k} should you remember?",
    "What {k} did I give you?",
    "Which {k} was it?",
    "Say the {k} that I told you.",
    "I forgot the {k}. What was it?",
    "What was the {k} again?",
)

FIRST = Prompts(
    "dialogue.first",
    "What did I say first?",
    "What was my first message?",
    "What was the first thing I said?",
    "Repeat my first message.",
    "Tell me what I said first.",
    "How did our chat begin? I mean my first message.",
)

LAST = Prompts(
    "dialogue.last",
    "!What did I just say?",
    "Repeat my last message.",
    "What was my last message?",
    "What did I say before this?",
    "Say again what I said.",
    "What did I say last?",
    "Can you repeat what I said?",
    "Say my last message again.",
    "What were my last words?",
)

UNKNOWN_NAME = "I do not know your name yet. What is your name?"


def _recall(user: str, reply: str, wanted: str) -> Turn:
    return Turn(user, reply, Expect("words", ((wanted,),)), CATEGORY)


def about_me(rng: Random, split: Split, between: list[Turn]) -> list[Turn]:
    """The user tells a name, a city or a hobby; after other turns the model is asked for it."""
    kind = rng.random()
    if kind < 0.15:
        name, city = smalltalk.person(rng, split), rng.choice(CITIES)
        told = smalltalk.introduce_with_city(rng, "train", name, city)
        if rng.random() < 0.6:
            return [told, *between, _recall(MY_NAME.render(rng, split), f"Your name is {name}.", name)]
        return [told, *between, _recall(MY_CITY.render(rng, split), f"You live in {city}.", city)]
    if kind < 0.6:
        name = coin_word(rng).capitalize() if rng.random() < 0.3 else rng.choice(pool("name", NAMES, split))
        question = _recall(MY_NAME.render(rng, split), f"Your name is {name}.", name)
        return [smalltalk.introduce(rng, "train", name), *between, question]
    if kind < 0.8:
        city = coin_word(rng).capitalize() if rng.random() < 0.2 else rng.choice(CITIES)
        question = _recall(MY_CITY.render(rng, split), f"You live in {city}.", city)
        return [smalltalk.hometown(rng, "train", city), *between, question]
    hobby = rng.choice(HOBBIES)
    return [
        smalltalk.hobby(rng, "train", hobby),
        *between,
        _recall(MY_HOBBY.render(rng, split), f"You like {hobby}.", hobby),
    ]


def remembered(rng: Random, split: Split, between: list[Turn]) -> list[Turn]:
    """The user tells a favourite, a pet's name or a secret, and asks for it later."""
    kind = rng.randrange(3)
    if kind == 0:
        what = rng.choice(("colour", "animal", "number", "city", "word"))
        values = {
            "colour": COLOURS,
            "animal": ANIMALS,
            "number": [str(rng.randrange(100))],
            "city": CITIES,
            "word": [coin_word(rng)],
        }
        value = rng.choice(values[what])
        told = _recall(TELL.render(rng, "train", k=what, x=value), f"I will remember that: {value}.", value)
        question = _recall(ASK.render(rng, split, k=what), f"Your favourite {what} is {value}.", value)
    elif kind == 1:
        what, value = (
            rng.choice(("cat", "dog", "rabbit", "horse", "parrot")),
            rng.choice((coin_word(rng).capitalize(), rng.choice(NAMES))),
        )
        told = _recall(
            PET.render(rng, "train", k=what, x=value), f"{value} is a nice name for a {what}.", value
        )
        question = _recall(ASK_PET.render(rng, split, k=what), f"Your {what} is called {value}.", value)
    else:
        what = rng.choice(("number", "word", "code"))
        value = (
            str(rng.randrange(10, 10000))
            if what != "word"
            else rng.choice((coin_word(rng), rng.choice(ANIMALS)))
        )
        told = _recall(SECRET.render(rng, "train", k=what, x=value), f"I will remember that: {value}.", value)
        question = _recall(ASK_SECRET.render(rng, split, k=what), f"The {what} is {value}.", value)
    return [told, *between, question]


def quote(rng: Random, split: Split, between: list[Turn]) -> list[Turn]:
    """Say again the first or the last message of the user."""
    if len(between) < 2 or rng.random() < 0.5:
        said = between[-1].user
        return [
            *between,
            Turn(LAST.render(rng, split), f'You said: "{said}"', Expect("words", ((said,),)), CATEGORY),
        ]
    said = between[0].user
    return [
        *between,
        Turn(FIRST.render(rng, split), f'You said: "{said}"', Expect("words", ((said,),)), CATEGORY),
    ]


def nameless(rng: Random, split: Split) -> list[Turn]:
    """Asked for a name that was never told."""
    return [Turn(MY_NAME.render(rng, split), UNKNOWN_NAME, Expect("words", (("not know",),)), CATEGORY)]
