"""From conversations to tokens, batches, a model and its scores: the parts of the demo build that need no GPU."""

import json

import numpy as np
import pytest
import torch
from jinja2 import Environment

from tools.demo import card
from tools.demo.corpus.grammar import Conversation, Expect, Turn, exact, number, words
from tools.demo.corpus.mixture import training_set
from tools.demo.data import ANSWER, BEGIN, CUT, build_rows, encode, pack, question_hash
from tools.demo.evaluate import held_out, holds, score, steps_needed
from tools.demo.model import DEMO, DRAFT, Qwen3, Shape, parameters, save_checkpoint
from tools.demo.tokenizer import CHAT_TEMPLATE, messages, render, save_tokenizer, train_tokenizer
from tools.demo.train import Recipe, document_mask, learning_rate, make_batch, row_order, train

TINY = Shape(hidden=32, layers=2, heads=2, kv_heads=1, intermediate=48, head_dim=16, vocabulary=600)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(training_set(0, 400), vocabulary=600)


def test_every_text_survives_the_tokenizer(tokenizer):
    text = "héllo 你好 🎉 ÿ\u0301 \n\t x=12345 don't"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("12345").tokens == list("12345")


def test_rendering_equals_the_chat_template():
    template = Environment().from_string(CHAT_TEMPLATE)
    for conversation in training_set(2, 50):
        assert template.render(messages=messages(conversation)) == render(conversation)
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert template.render(messages=parts, add_generation_prompt=True) == (
        "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    )


def test_only_the_assistants_words_are_answers(tokenizer):
    conversation = Conversation((Turn("hello", "Good day."), Turn("bye", "So long.")), system="Be kind.")
    ids, flags = encode(tokenizer, [conversation])
    answers = tokenizer.decode(ids[(flags & ANSWER) > 0].tolist(), skip_special_tokens=False)
    assert answers == "Good day.<|im_end|>So long.<|im_end|>"
    assert np.flatnonzero(flags & BEGIN).tolist() == [0]


def test_rows_mark_what_began_in_the_row_before():
    ids = np.arange(8, dtype=np.int16)
    flags = np.array([BEGIN, 0, 0, 0, 0, BEGIN, 0, 0], dtype=np.uint8)
    _, packed = pack(ids, flags, 4)
    assert packed.tolist() == [[BEGIN, 0, 0, 0], [CUT, BEGIN, 0, 0]]


def test_batches_keep_conversations_apart():
    flags = torch.tensor([[BEGIN, ANSWER, BEGIN, 0, ANSWER]], dtype=torch.uint8)
    batch = make_batch(torch.arange(5)[None], flags, question_weight=0.5)
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2]]
    assert batch.weights.tolist() == [[1.0, 0.0, 0.5, 1.0, 0.0]]
    mask = document_mask(torch.tensor([[1, 1, 2]]))
    assert isinstance(mask, torch.Tensor)
    assert mask[0, 0].tolist() == [[True, False, False], [True, True, False], [False, False, True]]


def test_packing_does_not_change_what_a_conversation_sees():
    torch.manual_seed(0)
    model = Qwen3(TINY).eval()
    one, two = torch.randint(0, 600, (1, 7)), torch.randint(0, 600, (1, 5))
    flags = torch.zeros(1, 12, dtype=torch.uint8)
    flags[0, [0, 7]] = BEGIN
    packed = make_batch(torch.cat((one, two), 1), flags, 1.0)
    alone = make_batch(two, flags[:, 7:], 1.0)
    torch.testing.assert_close(
        model(packed.tokens, packed.positions, packed.mask)[:, 7:],
        model(alone.tokens, alone.positions, alone.mask),
    )


def test_sizes_are_within_limits():
    assert parameters(Qwen3(DEMO)) <= 6_000_000
    assert parameters(Qwen3(DRAFT)) < 1_000_000


def test_checkpoints_equal_the_reference_implementation(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    model = Qwen3(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    save_checkpoint(model, tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, 600, (2, 40))
    flags = torch.zeros(2, 40, dtype=torch.uint8)
    flags[:, 0] = BEGIN
    batch = make_batch(ids, flags, 1.0)
    torch.testing.assert_close(
        model(ids, batch.positions, batch.mask), reference(ids).logits, atol=1e-4, rtol=1e-4
    )
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.decode(loaded("né 1 2 🎉")["input_ids"]) == "né 1 2 🎉"
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_training_lowers_the_loss_and_follows_a_teacher(tokenizer):
    rows = build_rows(tokenizer, 0, 1, 64, workers=1)
    recipe = Recipe(steps=12, rows=4, warmup=2, learning_rate=1e-2)
    model, outcome = train(TINY, rows, recipe, torch.device("cpu"))
    assert outcome.tokens == 12 * 4 * 64
    assert outcome.loss < 6.4  # a guess among 600 tokens
    _, taught = train(TINY, rows, recipe, torch.device("cpu"), teacher=model)
    assert np.isfinite(taught.loss)


def test_schedule_and_order():
    recipe = Recipe(steps=10, rows=3, warmup=2)
    assert learning_rate(0, recipe) == 0.5
    assert learning_rate(2, recipe) == 1.0
    assert learning_rate(10, recipe) == pytest.approx(0.0)
    order = row_order(7, recipe)
    assert order.shape == (10, 3)
    assert sorted(order.flatten()[:7].tolist()) == list(range(7))


@pytest.mark.parametrize(
    ("expect", "good", "bad"),
    [
        (number(42), "17 + 25 = 42", "17 + 25 = 142"),
        (words("fast/quick", "batch"), "A quick batch.", "A quickly batched thing."),
        (words("b", forbidden=("a",)), "b", "a b"),
        (exact("Hello!"), " hello", "hello you"),
        (Expect("members", (("2", "cat", "dog"),)), "Cat and dog.", "Cat and cat."),
        (
            Expect("json", (("name", '"Bo"'), ("age",))),
            '{"name": "Bo", "age": 3}',
            '{"name": "Al", "age": 3}',
        ),
        (Expect("json", (("name",),)), '{"name": 1}', '{"name": 1'),
        (Expect("json", (("#", "2", "a", "b", "c"),)), '["a", "b"]', '["a", "a"]'),
        (Expect("story", (("fox",),)), "A fox " + "word " * 40 + "The end.", "A fox. The end."),
    ],
)
def test_expectations(expect, good, bad):
    assert holds(expect, good)
    assert not holds(expect, bad)


def test_held_out_questions_that_training_asked_are_dropped():
    everything = held_out(0, 20, frozenset())
    asked = frozenset(question_hash(c.turns[0].user) for c in everything)
    rest = held_out(0, 20, asked)
    assert 0 < len(rest) < len(everything)
    assert all(len(c.turns) > 1 or c.system is not None for c in rest)


def test_scores_count_and_keep_failures():
    conversations = [Conversation((Turn("q", "yes", words("yes"), "c"),))] * 2
    result = score(conversations, ["yes", "no"])["c"]
    assert (result.asked, result.passed, result.share) == (2, 1, 0.5)
    assert result.failures[0]["reply"] == "no"


def test_verification_steps():
    assert steps_needed([True] * 5) == 1  # four drafted tokens and the model's own
    assert steps_needed([False] * 3) == 3
    assert steps_needed([True, False, True, True]) == 2


def test_cards_hold_the_numbers():
    names = (
        "smalltalk",
        "serving",
        "arithmetic",
        "knowledge",
        "story",
        "json",
        "lists",
        "echo",
        "unknown",
        "multi-turn",
        "system",
    )
    scores = {name: {"asked": 10, "passed": 9} for name in names}
    outcome = {"parameters": 5, "steps": 1, "tokens": 2, "seconds": 3.0, "loss": 0.5, "device": "CPU"}
    shape = dict.fromkeys(
        ("vocabulary", "hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "positions"), 1
    )
    part = {"scores": scores, "outcome": outcome, "shape": shape, "samples": [["hi", "Hello!"]]}
    report = {
        "command": "python -m tools.demo.build",
        "recipe": {"learning_rate": 0.1, "question_weight": 0.1, "distil": 0.5},
        "data": {"conversations": 7, "tokens": 8, "length": 9},
        "demo": part,
        "draft": part,
        "agreement": {"tokens": 100, "agreed": 90, "per_step": 3.5, "drafted": 4},
    }
    assert "| arithmetic | 10 | 90.0% |" in card.demo_card(report)
    assert "user: hi\nassistant: Hello!" in card.demo_card(report)
    assert "90.0% of the places" in card.draft_card(report)
    assert json.loads(card.dump(report)) == report
