"""Short stories about a topic that the user gives."""

from __future__ import annotations

from random import Random

from tools.demo.corpus.grammar import Expect, Prompts, Split, Turn, article, coin_word, pool, upper_first
from tools.demo.corpus.words import ADJECTIVES, ANIMALS, NAMES, THINGS

CATEGORY = "story"
END = "The end."
TOPICS = (*ANIMALS, *THINGS)

ASK = Prompts(
    "story.ask",
    "!Tell me a [short |little |]story about {x}.",
    "![Write|Make up|Invent] a [short |]story about {x}.",
    "!Can you [tell|write] [me |]a [short |]story about {x}?",
    "I [want|would like] [to hear |]a story about {x}.",
    "Please tell me [a story|something] about {x}, as a fairy tale.",
    "!A [short |]story about {x}, please.",
    "Story about {x}?",
    "Give me a [short |]story about {x}.",
    "Do you know a story about {x}?",
    "Could you make up a [tale|story] about {x}?",
    "Tell me a tale about {x}.",
    "Once upon a time there was {x}. Go on.",
    "I need a bedtime story about {x}.",
    "Let me hear a story about {x}.",
    "Write a [tale|fairy tale] about {x}.",
    "Tell my child a story about {x}.",
    "Narrate a [short |]story about {x}.",
    "How about a story about {x}?",
    "Compose a [short |]story about {x}.",
    "Tell me a story. It should be about {x}.",
    "Tell a story with {x} in it.",
    "Tell me a fairy tale about {x}.",
    "Please tell me a fairy tale with {x}.",
    "I would love a story about {x}.",
    "[Write|Tell me] something about {x}, as a story.",
    "As a fairy tale, please: {x}.",
    "Let us have a story about {x}.",
    "Come up with a story about {x}.",
    "My topic is {x}. Tell a story.",
    "Make {x} the hero of a story.",
)

NAMED = Prompts(
    "story.named",
    "Tell me a [short |]story about {x} called {n}.",
    "Write a [short |]story about {x} named {n}.",
    "Can you tell me a story about {x} with the name {n}?",
    "I want a story about {x} called {n}.",
    "Make up a story about {n}, {x}.",
    "A story about {n} the {y}, please.",
    "Tell me about the adventures of {n} the {y}.",
)

ANY = Prompts(
    "story.any",
    "!Tell me a [short |]story.",
    "[Can|Could] you tell [me |]a story?",
    "I want to hear a story.",
    "A story, please.",
    "Write a [short |]story.",
    "Do you know a story?",
    "Story time!",
    "Tell me any story.",
    "Make up a story.",
    "It is story time.",
    "I am ready for a story.",
    "Time for a story!",
    "Tell us a story.",
    "Let me hear a story.",
)

_OPENINGS = (
    "Once upon a time there was {x} called {n}.",
    "There once was {x} whose name was {n}.",
    "Long ago, {p}, there lived {x} named {n}.",
)
_PLACES = (
    "near a quiet river",
    "at the edge of a deep forest",
    "in a small village",
    "on top of a green hill",
    "in an old garden",
    "by the sea",
    "behind a tall mountain",
    "in the middle of a busy town",
)
_HOMES = (
    "{n} lived {p} and liked to look at the stars.",
    "Every day {n} went for a walk {p}.",
    "{n} had few friends {p}.",
)
_PROBLEMS = (
    ("One day a great storm came and the bridge fell into the water.", "built a new bridge from strong wood"),
    ("One morning all the lights went out and everyone was afraid.", "found a lamp that never goes out"),
    ("One day a little bird lost its way home.", "followed the wind and found the nest"),
    ("One evening the well was dry and nobody had water.", "dug deep and found a clear spring"),
    ("One day a golden key was missing.", "looked under every stone until the key shone in the grass"),
    ("One winter the snow was so deep that no door would open.", "cleared a path from house to house"),
    ("One night the moon did not rise.", "climbed the highest hill and called until the moon woke up"),
    ("One day the village forgot how to laugh.", "told the funniest joke in the world"),
    ("One day a letter came that nobody could read.", "held it up to a mirror and read every word"),
    ("One spring the flowers did not open.", "sang to them until they opened one by one"),
)
_TRIES = (
    "{n} was afraid at first, but wanted to help.",
    '"I will try," said {n}.',
    "{n} thought about it for a long time.",
    "Nobody knew what to do, but {n} had an idea.",
)
_HELP = (
    "A wise {h} showed the way.",
    'A friendly {h} came along and said: "Two are better than one."',
    "On the way {n} met {ah}, and they became friends.",
)
_ENDS = (
    "From that day on {n} was never alone again.",
    "Everyone thanked {n}, and there was a great feast.",
    "And {n} learnt that even the small can do great things.",
    "That night {n} slept better than ever before.",
    "And if you go there today, you can still hear people talk about {n}.",
)


def topic(rng: Random, split: Split) -> str:
    """Something to tell about; now and then a word that does not exist."""
    if rng.random() < 0.08:
        noun = coin_word(rng)
    else:
        noun = rng.choice(pool("story", TOPICS, split))
    return f"{rng.choice(ADJECTIVES)} {noun}" if rng.random() < 0.4 else noun


def write(rng: Random, subject: str, name: str) -> str:
    """A story of about eight sentences with a problem, a try, help and an end."""
    helper = rng.choice([animal for animal in ANIMALS if animal not in subject])
    problem, deed = rng.choice(_PROBLEMS)
    slots = {
        "x": article(subject),
        "n": name,
        "p": rng.choice(_PLACES),
        "h": helper,
        "ah": article(helper),
    }
    opening = rng.choice(_OPENINGS)
    parts = [opening]
    if "{p}" not in opening:
        parts.append(rng.choice(_HOMES))
    parts += [
        problem,
        rng.choice(_TRIES),
        rng.choice(_HELP),
        f"Together they {deed}.",
        rng.choice(_ENDS),
        END,
    ]
    return " ".join(upper_first(part.format(**slots)) for part in parts)


def expectation(subject: str, *more: str) -> Expect:
    """A story names its topic (and hero), is long enough and ends."""
    return Expect("story", tuple((word,) for word in (*subject.split(), *more)))


def single(rng: Random, split: Split) -> list[Turn]:
    """A story about the topic asked for."""
    subject = topic(rng, split)
    name = rng.choice(NAMES)
    if rng.random() < 0.12:
        reply = write(rng, rng.choice(ANIMALS), name)
        return [Turn(ANY.render(rng, split), reply, Expect("story"), CATEGORY)]
    if rng.random() < 0.25:
        name = coin_word(rng).capitalize() if rng.random() < 0.3 else rng.choice(pool("name", NAMES, split))
        user = NAMED.render(rng, split, x=article(subject), y=subject, n=name)
        return [Turn(user, write(rng, subject, name), expectation(subject, name), CATEGORY)]
    asked = (
        subject if rng.random() < 0.1 else rng.choice((article(subject), article(subject), "the " + subject))
    )
    user = ASK.render(rng, split, x=asked)
    return [Turn(user, write(rng, subject, name), expectation(subject), CATEGORY)]


HERO = Prompts(
    "story.hero", "What was the name of the {y}?", "What is the {y} called?", "Who is the story about?", "What was the hero called?",
    "What is the hero's name?", "What was the main character called?",
)  # fmt: skip


def follow_up(rng: Random, split: Split) -> list[Turn]:
    """A story, then a question about its hero."""
    subject, name = topic(rng, "train"), rng.choice(NAMES)
    first = Turn(
        ASK.render(rng, "train", x=article(subject)),
        write(rng, subject, name),
        expectation(subject),
        CATEGORY,
    )
    user = HERO.render(rng, split, y=subject)
    expect = Expect("words", ((name,),))
    return [first, Turn(user, f"The {subject} was called {name}.", expect, "multi-turn")]
