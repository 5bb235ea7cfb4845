import pytest

from tests import checkpoints
from xllm.core.errors import InvalidRequest
from xllm.engine.prompts import LONG_TEXT, PromptReader, as_list
from xllm.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    checkpoints.save_tokenizer(directory)
    return load_tokenizer(directory)


@pytest.fixture
def reader(tokenizer):
    return PromptReader(tokenizer, max_tokens=50_000)


def test_every_form_of_prompt(reader, tokenizer):
    ids = tokenizer.encode("the cat")
    assert reader.read("the cat") == ("the cat", ids)
    assert reader.read({"prompt": "the cat"}) == ("the cat", ids)
    assert reader.read([5, 6]) == (None, [5, 6])
    assert reader.read({"prompt_token_ids": (5, 6)}) == (None, [5, 6])
    assert reader.read(range(5, 7)) == (None, [5, 6])
    assert reader.read([-1, 2**70]) == (None, [-1, 2**70])  # whether there are such tokens is not asked here
    assert reader.read({"prompt_token_ids": [5, 6], "prompt": "shown"}) == ("shown", [5, 6])


def test_ids_are_copied(reader):
    mine = [5, 6]
    (_, read) = reader.read(mine)
    mine.append(7)
    assert read == [5, 6]


@pytest.mark.parametrize(
    "prompt",
    [
        {},
        {"prompt": 3},
        {"text": "x"},
        {"prompt_token_ids": "abc"},
        [1, "2"],
        [True],
        [1.0],
        [None],
        {1, 2},
        {"prompt_token_ids": {1, 2}},
        {"prompt_token_ids": iter([1])},
        {"prompt_token_ids": [1], "prompt": 4},
        7,
        None,
    ],
)
def test_anything_else_is_refused(reader, prompt):
    with pytest.raises(InvalidRequest):
        reader.read(prompt)


def test_a_text_that_cannot_fit_is_not_tokenised(tokenizer, monkeypatch):
    reader = PromptReader(tokenizer, max_tokens=10)
    monkeypatch.setattr(tokenizer, "encode", lambda text: pytest.fail("tokenised"))
    with pytest.raises(InvalidRequest, match="context"):
        reader.read("x" * 100_000)


async def test_long_texts_are_tokenised_beside_the_event_loop(reader, tokenizer):
    text = "the cat and the hat " * (LONG_TEXT // 10)
    assert await reader.read_async(text) == (text, tokenizer.encode(text))


@pytest.mark.parametrize(
    ("given", "listed"),
    [
        ("a", ["a"]),
        ([1, 2], [[1, 2]]),
        ([[1], "a"], [[1], "a"]),
        ({"prompt": "a"}, [{"prompt": "a"}]),
        ([], []),
        (["a", "b"], ["a", "b"]),
    ],
)
def test_one_prompt_or_many(given, listed):
    assert as_list(given) == listed
