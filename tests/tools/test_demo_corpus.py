"""The grammars of the demo models: determinism, the held-out split, and replies that meet their own expectations."""

import json
from random import Random

import pytest

from tools.demo.corpus import mixture
from tools.demo.corpus.grammar import Prompts, expand, fill, lower_first, roughen, split_lines
from tools.demo.evaluate import holds


def test_the_training_set_depends_on_the_seed_alone():
    first, again, other = (list(mixture.training_set(seed, 50)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize("category", mixture.CATEGORIES)
def test_gold_replies_meet_their_expectations(category):
    rng = Random(5)
    for _ in range(150):
        turn = mixture.held_out_conversation(rng, category).turns[-1]
        assert holds(turn.expect, turn.assistant), turn


def test_training_replies_meet_their_expectations():
    turns = [turn for c in mixture.training_set(9, 400) for turn in c.turns]
    assert all(holds(turn.expect, turn.assistant) for turn in turns if turn.expect.kind != "free")


def test_no_slot_pin_or_alternative_is_left_in_a_text():
    for conversation in mixture.training_set(1, 1000):
        for turn in conversation.turns:
            for text in (turn.user, turn.assistant):
                assert text
                assert not text.startswith("!")
                assert "|" not in text
                assert "{x}" not in text


def test_split_keeps_templates_apart_and_is_stable():
    lines = [f"Wording number {n} of {{x}}?" for n in range(20)]
    parts = split_lines("key", lines)
    assert not set(parts["train"]) & set(parts["held_out"])
    assert sorted(parts["train"] + parts["held_out"]) == sorted(lines)
    assert len(parts["held_out"]) == 3
    assert split_lines("key", lines[::-1])["held_out"] == parts["held_out"]


def test_synonymous_templates_stay_on_one_side():
    lines = ["What is {x}?", "What's {x}?", *(f"Other {n} {{x}}" for n in range(30))]
    for key in map(str, range(40)):
        parts = split_lines(key, lines)
        assert ("What is {x}?" in parts["train"]) == ("What's {x}?" in parts["train"])


def test_pinned_templates_are_always_trained():
    for key in map(str, range(40)):
        parts = split_lines(key, ["!Hello", "Hi", "Hey", "Good day"])
        assert "Hello" in parts["train"]
        assert "Hello" not in parts["held_out"]


def test_held_out_messages_are_clean_and_training_ones_are_varied():
    prompts = Prompts("test", "[Tell|Show] me {x}, friend.", "Please describe {x}.", "Now {x}, quick.")
    rng = Random(0)
    clean = {prompts.render(rng, "held_out", x="KV") for _ in range(50)}
    varied = {prompts.render(rng, "train", x="KV") for _ in range(200)}
    assert len(clean) <= 2
    assert len(varied) > 20
    assert all("KV" in text for text in clean | varied)


def test_expand_and_fill():
    assert expand(Random(1), "a[[b|b]|b]c") == "abc"
    assert fill('{x} and {"answer": 1} and {y}', {"x": "1"}) == '1 and {"answer": 1} and {y}'
    assert lower_first("Hello there") == "hello there"
    assert lower_first("I am") == "I am"
    assert lower_first("TTFT matters") == "TTFT matters"


def test_roughening_never_touches_slots():
    rng = Random(2)
    assert all("{name}" in roughen(rng, "Please tell me about {name} today.") for _ in range(500))


def test_operand_pairs_are_held_out():
    from tools.demo.corpus.arithmetic import operands

    rng = Random(0)
    trained = {operands(rng, "train", "add") for _ in range(3000)}
    asked = {operands(rng, "held_out", "add") for _ in range(3000)}
    assert not {pair for pair in trained & asked if max(pair) > 9}


def test_json_replies_parse():
    rng = Random(4)
    for _ in range(200):
        (turn,) = mixture.SINGLE["json"][0](rng, "train")
        json.loads(turn.assistant)
