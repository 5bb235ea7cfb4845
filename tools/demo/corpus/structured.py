"""Replies with a form: JSON objects and arrays, lists of things, counting."""

from __future__ import annotations

import json
from random import Random

from tools.demo.corpus.grammar import (
    Expect,
    Split,
    Turn,
    coin_word,
    join_and,
    pool,
    upper_first,
    words,
)
from tools.demo.corpus.knowledge import listed, members, plural
from tools.demo.corpus.knowledge_facts import GROUPS
from tools.demo.corpus.structured_prompts import (
    COUNT,
    COUNT_DOWN,
    COUNT_TO,
    JSON_ARRAY,
    JSON_FOR,
    JSON_GIVEN,
    JSON_KEYS,
    LIST,
    MORE,
    NUMBERED,
    ONE,
)
from tools.demo.corpus.words import (
    ANIMALS,
    CITIES,
    COLOURS,
    FOODS,
    FRUITS,
    HOBBIES,
    JOBS,
    NAMES,
    NUMBER_WORDS,
)

JSON_CATEGORY = "json"
LIST_CATEGORY = "lists"

Value = str | int | bool

_VALUES: dict[str, tuple[Value, ...]] = {
    "name": NAMES, "age": tuple(range(8, 80)), "city": tuple(CITIES), "colour": tuple(COLOURS), "color": tuple(COLOURS),
    "job": tuple(JOBS), "email": tuple(name.lower() + "@example.com" for name in NAMES), "id": tuple(range(1, 1000)),
    "active": (True, False), "price": tuple(range(1, 100)), "quantity": tuple(range(1, 20)), "food": tuple(FOODS),
    "hobby": tuple(HOBBIES), "country": tuple(GROUPS["country"]), "animal": ANIMALS, "fruit": tuple(FRUITS),
    "score": tuple(range(101)), "year": tuple(range(1950, 2030)), "height": tuple(range(120, 200)),
    "language": tuple(GROUPS["language"]), "married": (True, False), "count": tuple(range(1, 50)),
    "size": ("small", "medium", "large"), "pet": ("cat", "dog", "rabbit", "horse", "parrot"),
    "title": ("My story", "A new day", "The river", "Good morning"), "status": ("ok", "open", "done", "new"),
    "message": ("hello", "good morning", "it works", "thank you"), "weight": tuple(range(40, 100)),
    "sport": tuple(GROUPS["sport"]), "month": tuple(GROUPS["month"]), "enabled": (True, False),
    "temperature": tuple(range(-5, 35)), "level": tuple(range(1, 11)), "number": tuple(range(1, 100)),
}  # fmt: skip
KEYS = tuple(_VALUES)


_PERSONAL = tuple(
    "age city job email id active food hobby country height language married pet weight sport colour score".split()
)


def _phrase(rng: Random, keys: list[str]) -> str:
    quoted = ['"' + key + '"' for key in keys] if rng.random() < 0.15 else keys
    return ", ".join(quoted) if rng.random() < 0.15 else join_and(quoted)


def expectation(required: dict[str, Value | None]) -> Expect:
    """The reply parses as one object with exactly these keys, and with these values where they are given."""
    return Expect("json", tuple((k,) if v is None else (k, json.dumps(v)) for k, v in required.items()))


def _person(rng: Random, split: Split) -> Turn:
    name = coin_word(rng).capitalize() if rng.random() < 0.2 else rng.choice(pool("name", NAMES, split))
    keys = rng.sample(_PERSONAL, rng.choice((1, 1, 1, 2, 2, 3)))
    keys.insert(0 if rng.random() < 0.8 else rng.randrange(len(keys) + 1), "name")
    record: dict[str, Value] = {key: name if key == "name" else rng.choice(_VALUES[key]) for key in keys}
    if "email" in record:
        record["email"] = name.lower() + "@example.com"
    required: dict[str, Value | None] = {key: name if key == "name" else None for key in keys}
    user = JSON_FOR.render(rng, split, k=_phrase(rng, keys), n=name)
    return Turn(user, json.dumps(record), expectation(required), JSON_CATEGORY)


def _keys(rng: Random, split: Split) -> Turn:
    keys = rng.sample(KEYS, rng.choice((1, 2, 2, 3, 3, 4)))
    if rng.random() < 0.15:
        keys[-1] = coin_word(rng)
    record = {key: rng.choice(_VALUES[key]) if key in KEYS else rng.choice(FOODS) for key in keys}
    user = JSON_KEYS.render(rng, split, k=_phrase(rng, keys))
    return Turn(user, json.dumps(record), expectation(dict.fromkeys(keys)), JSON_CATEGORY)


def _given(rng: Random, split: Split) -> Turn:
    keys = rng.sample(KEYS, rng.choice((1, 2, 2, 3, 4)))
    record = {key: rng.choice(_VALUES[key]) for key in keys}
    if "name" in record:
        record["name"] = (
            coin_word(rng).capitalize() if rng.random() < 0.3 else rng.choice(pool("name", NAMES, split))
        )
    link = rng.choice((" is ", " is ", " = ", ": ", " "))
    shown = [k + link + (json.dumps(v) if isinstance(v, bool) else str(v)) for k, v in record.items()]
    user = JSON_GIVEN.render(rng, split, g=join_and(shown) if rng.random() < 0.6 else ", ".join(shown))
    return Turn(user, json.dumps(record), expectation({**record}), JSON_CATEGORY)


def _counted(rng: Random, low: int, high: int) -> tuple[str, int]:
    count = rng.randint(low, high)
    return (NUMBER_WORDS[count] if rng.random() < 0.7 else str(count)), count


def _some(rng: Random, kind: str, count: int) -> list[str]:
    """Members of a group: half of the time the best known ones in order, so that greedy decoding names no item twice."""
    return GROUPS[kind][:count] if rng.random() < 0.5 else members(rng, kind, count)


def _array(rng: Random, split: Split) -> Turn:
    kind = rng.choice([kind for kind in GROUPS if kind not in ("season",)])
    shown, count = _counted(rng, 2, 5)
    items = _some(rng, kind, count)
    user = JSON_ARRAY.render(rng, split, c=shown, g=plural(kind))
    return Turn(user, json.dumps(items), Expect("json", (("#", str(count), *GROUPS[kind]),)), JSON_CATEGORY)


def single_json(rng: Random, split: Split) -> list[Turn]:
    """One request for JSON."""
    return [rng.choices((_person, _keys, _given, _array), (35, 25, 25, 15))[0](rng, split)]


def _list(rng: Random, split: Split) -> Turn:
    kind = rng.choice([kind for kind in GROUPS if kind != "season"])
    shown, count = _counted(rng, 2, 5)
    items = _some(rng, kind, count)
    expect = Expect("members", ((str(count), *GROUPS[kind]),))
    if rng.random() < 0.25:
        user = NUMBERED.render(rng, split, c=shown, g=plural(kind))
        reply = "\n".join(f"{index}. {upper_first(item)}" for index, item in enumerate(items, 1))
        return Turn(user, reply, expect, LIST_CATEGORY)
    user = LIST.render(rng, split, c=shown, g=plural(kind))
    return Turn(upper_first(user), listed(items), expect, LIST_CATEGORY)


def _one(rng: Random, split: Split) -> Turn:
    kind = rng.choice([kind for kind in GROUPS if kind[0] not in "aio" or kind == "animal"])
    user = ONE.render(rng, split, g=kind).replace(" a animal", " an animal")
    return Turn(
        user,
        upper_first(rng.choice(GROUPS[kind])) + ".",
        Expect("words", (tuple(GROUPS[kind]),)),
        LIST_CATEGORY,
    )


def _count(rng: Random, split: Split) -> Turn:
    kind = rng.randrange(3)
    if kind == 0:
        first = rng.randint(0, 90)
        numbers = list(range(first, first + rng.randint(3, 10)))
        user = COUNT.render(rng, split, a=str(first), b=str(numbers[-1]))
    elif kind == 1:
        numbers = list(range(1, rng.randint(3, 20) + 1))
        shown = NUMBER_WORDS[len(numbers)] if rng.random() < 0.4 else str(len(numbers))
        user = COUNT_TO.render(rng, split, b=shown)
    else:
        numbers = list(range(rng.randint(3, 15), 0, -1))
        shown = NUMBER_WORDS[numbers[0]] if rng.random() < 0.4 else str(numbers[0])
        user = COUNT_DOWN.render(rng, split, a=shown)
    reply = ", ".join(map(str, numbers))
    return Turn(user, reply, Expect("exact", ((reply,),)), LIST_CATEGORY)


def single_list(rng: Random, split: Split) -> list[Turn]:
    """One request for a list or for counting."""
    return [rng.choices((_list, _one, _count), (55, 15, 30))[0](rng, split)]


def follow_up(rng: Random, split: Split) -> list[Turn]:
    """A list, then one more of the same kind that was not named yet."""
    kind = rng.choice([kind for kind in GROUPS if len(GROUPS[kind]) >= 7])
    items = _some(rng, kind, 3)
    rest = [item for item in GROUPS[kind] if item not in items]
    another = rest[0] if rng.random() < 0.5 else rng.choice(rest)
    first = Turn(
        LIST.render(rng, "train", c="three", g=plural(kind)), listed(items), words(*items), LIST_CATEGORY
    )
    expect = Expect("words", (tuple(GROUPS[kind]),), tuple(items))
    return [first, Turn(MORE.render(rng, split), upper_first(another) + ".", expect, "multi-turn")]
