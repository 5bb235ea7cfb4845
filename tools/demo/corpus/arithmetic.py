"""Small sums: addition and subtraction up to three digits, times tables, comparisons and word problems.

Operand pairs of sums and differences are held out, not only the wording. The 144 products of the times tables are
facts to remember, so there only the wording is held out.
"""

from __future__ import annotations

from random import Random

from tools.demo.corpus.arithmetic_prompts import (
    ADD,
    CHAIN,
    DIVIDE,
    DOUBLE,
    EVEN,
    GAIN,
    GROUPS,
    HALF,
    IS_MORE,
    LARGER,
    LOSE,
    MULTIPLY,
    NEXT,
    SMALLER,
    SUBTRACT,
)
from tools.demo.corpus.grammar import Expect, Split, Turn, number, of_split, words
from tools.demo.corpus.words import DAYS, FRUITS, NAMES, NUMBER_WORDS

CATEGORY = "arithmetic"
TABLE = 12


def operands(rng: Random, split: Split, key: str, difference: bool = False) -> tuple[int, int]:
    """A pair of numbers of up to three digits whose pair belongs to ``split``."""
    while True:
        top_a, top_b = (rng.choice((10, 20, 100, 100, 1000, 1000)) for _ in range(2))
        a, b = rng.randrange(top_a), rng.randrange(top_b)
        if difference and a < b and (rng.random() < 0.85 or b > 99):
            a, b = b, a
        if max(a, b) < 10 or of_split(key, f"{a},{b}", split):
            return a, b


def _sum(rng: Random, split: Split) -> Turn:
    a, b = operands(rng, split, "add")
    return _equation(ADD.render(rng, split, a=str(a), b=str(b)), f"{a} + {b}", a + b)


def _difference(rng: Random, split: Split) -> Turn:
    a, b = operands(rng, split, "subtract", difference=True)
    return _equation(SUBTRACT.render(rng, split, a=str(a), b=str(b)), f"{a} - {b}", a - b)


def _product(rng: Random, split: Split) -> Turn:
    a, b = rng.randint(0, TABLE), rng.randint(0, TABLE)
    return _equation(MULTIPLY.render(rng, split, a=str(a), b=str(b)), f"{a} * {b}", a * b)


def _quotient(rng: Random, split: Split) -> Turn:
    b, result = rng.randint(1, TABLE), rng.randint(1, TABLE)
    return _equation(DIVIDE.render(rng, split, a=str(b * result), b=str(b)), f"{b * result} / {b}", result)


def _equation(user: str, expression: str, result: int) -> Turn:
    return Turn(user, f"{expression} = {result}", number(result), CATEGORY)


def _too_large(rng: Random, split: Split) -> Turn:
    """Be honest about what was never learnt."""
    if rng.random() < 0.5:
        a, b = rng.randint(13, 999), rng.randint(13, 99)
        user = MULTIPLY.render(rng, split, a=str(a), b=str(b))
        reply = "That is too hard for me: I only know the times tables up to 12."
    else:
        a, b = rng.randint(1000, 99999), rng.randint(1000, 99999)
        user = rng.choice((ADD, SUBTRACT)).render(rng, split, a=str(a), b=str(b))
        reply = "That is too large for me: I add and subtract numbers below 1000."
    return Turn(user, reply, words("too"), CATEGORY)


def _different(rng: Random, split: Split) -> tuple[int, int]:
    """Two numbers to compare, often with the same digits or the same length."""
    while True:
        a, b = operands(rng, split, "compare")
        if rng.random() < 0.4:
            b = int("".join(rng.sample(str(a), len(str(a)))))
        elif rng.random() < 0.3:
            b = max(0, a + rng.randint(-20, 20))
        if a != b and (max(a, b) < 10 or of_split("compare", f"{a},{b}", split)):
            return a, b


def _comparison(rng: Random, split: Split) -> Turn:
    a, b = _different(rng, split)
    if rng.random() < 0.8:
        larger = rng.random() < 0.5
        result = max(a, b) if larger else min(a, b)
        user = (LARGER if larger else SMALLER).render(rng, split, a=str(a), b=str(b))
        return Turn(user, f"{result} is {'larger' if larger else 'smaller'}.", number(result), CATEGORY)
    user = IS_MORE.render(rng, split, a=str(a), b=str(b))
    reply = f"Yes, {a} is larger than {b}." if a > b else f"No, {a} is smaller than {b}."
    return Turn(user, reply, words("yes" if a > b else "no"), CATEGORY)


def _property(rng: Random, split: Split) -> Turn:
    """Even or odd, double, half, the next number."""
    kind = rng.randrange(4)
    a = rng.randrange(rng.choice((10, 100, 500)))
    if kind == 0:
        word = "odd" if a % 2 else "even"
        return Turn(EVEN.render(rng, split, a=str(a)), f"{a} is {word}.", words(word), CATEGORY)
    if kind == 1:
        return _equation(DOUBLE.render(rng, split, a=str(a)), f"2 * {a}", 2 * a)
    if kind == 2:
        return Turn(HALF.render(rng, split, a=str(2 * a)), f"Half of {2 * a} is {a}.", number(a), CATEGORY)
    return Turn(NEXT.render(rng, split, a=str(a)), f"After {a} comes {a + 1}.", number(a + 1), CATEGORY)


def _words(rng: Random, split: Split) -> Turn:
    """A sum of small numbers written in words; the reply is in words too."""
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    first, second, result = (NUMBER_WORDS[n] for n in (a, b, a + b))
    user = (
        ADD.render(rng, split, a=first, b=second).replace("+", " plus ").replace("=", "").replace("  ", " ")
    )
    reply = f"{first.capitalize()} plus {second} is {result}."
    return Turn(user, reply, words(result), CATEGORY)


def _problem(rng: Random, split: Split) -> Turn:
    """A word problem with one step; the reply shows the step."""
    n, x, d = (
        rng.choice(NAMES),
        rng.choice([f for f in FRUITS if f[-1] not in "yh"] + ["coin", "book"]),
        rng.choice(DAYS),
    )
    kind = rng.randrange(3)
    if kind == 2:
        a, b = rng.randint(2, TABLE), rng.randint(2, TABLE)
        sign, result, prompts = "*", a * b, GROUPS
    else:
        a, b = rng.randint(1, 60), rng.randint(1, 40)
        a, b = (a, b) if kind == 0 else (max(a, b), min(a, b))
        sign, result, prompts = ("+", a + b, GAIN) if kind == 0 else ("-", a - b, LOSE)
    noun = x if result == 1 else x + "s"
    user = prompts.render(rng, split, n=n, x=x, d=d, a=str(a), b=str(b))
    expect = Expect("words", ((str(result),),))
    return Turn(user, f"{a} {sign} {b} = {result}, so the answer is {result} {noun}.", expect, CATEGORY)


def single(rng: Random, split: Split) -> list[Turn]:
    """One small calculation."""
    makers = (_sum, _difference, _product, _comparison, _quotient, _property, _problem, _words, _too_large)
    weights = (34, 28, 10, 9, 4, 6, 11, 3, 3)
    return [rng.choices(makers, weights)[0](rng, split)]


def follow_up(rng: Random, split: Split) -> list[Turn]:
    """A sum, then something added to or taken from its result."""
    a, b, c = rng.randint(1, 60), rng.randint(1, 60), rng.randint(1, 30)
    first = _equation(ADD.render(rng, "train", a=str(a), b=str(b)), f"{a} + {b}", a + b)
    sign = "+" if rng.random() < 0.5 or c > a + b else "-"
    result = a + b + c if sign == "+" else a + b - c
    second = _equation(CHAIN[sign].render(rng, split, b=str(c)), f"{a + b} {sign} {c}", result)
    return [first, Turn(second.user, second.assistant, second.expect, "multi-turn")]
