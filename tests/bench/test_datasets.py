import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from xllm.bench.completion import Ask
from xllm.bench.datasets import DATASETS, load
from xllm.bench.options import DatasetOptions
from xllm.bench.vocabulary import IdVocabulary, TokenVocabulary, WordVocabulary, load_vocabulary
from xllm.core.errors import ConfigError

IDS = IdVocabulary(1000)


def make(vocabulary=IDS, seed=0, **options: Any) -> list[Ask]:
    return load(DatasetOptions(**options), vocabulary, seed)


def ids(ask: Ask) -> list[int]:
    assert isinstance(ask.prompt, list)
    return ask.prompt


def write_lines(path: Path, *lines: Any) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_random_has_the_lengths_asked_for():
    asks = make(num_prompts=20, random_input_len=50, random_output_len=7)
    assert len(asks) == 20
    assert all(len(a.prompt) == a.prompt_tokens == 50 and a.max_tokens == 7 for a in asks)
    assert len({tuple(a.prompt) for a in asks}) == 20
    assert all(10 <= t < 1000 for a in asks for t in ids(a))


def test_random_lengths_spread_over_their_range():
    asks = make(num_prompts=400, random_input_len=100, random_output_len=10, random_range_ratio=0.5)
    lengths = [a.prompt_tokens for a in asks]
    assert min(lengths) >= 50 and max(lengths) <= 150
    assert max(lengths) - min(lengths) > 80
    assert {a.max_tokens for a in asks} == set(range(5, 16))


def test_random_may_share_a_prefix():
    asks = make(num_prompts=3, random_input_len=5, random_prefix_len=40)
    assert all(len(a.prompt) == 45 for a in asks)
    assert len({tuple(a.prompt[:40]) for a in asks}) == 1


def test_the_seed_decides():
    assert make(num_prompts=3, seed=1) == make(num_prompts=3, seed=1) != make(num_prompts=3, seed=2)


def test_prefix_repetition_uses_each_prefix_equally_often():
    asks = make(
        dataset_name="prefix_repetition",
        num_prompts=30,
        prefix_repetition_prefix_len=16,
        prefix_repetition_suffix_len=4,
        prefix_repetition_num_prefixes=5,
        prefix_repetition_output_len=3,
    )
    uses = Counter(tuple(a.prompt[:16]) for a in asks)
    assert sorted(uses.values()) == [6] * 5
    assert len({tuple(a.prompt) for a in asks}) == 30
    assert all(a.max_tokens == 3 and a.prompt_tokens == 20 for a in asks)


def test_sharegpt_takes_first_turns_of_sensible_length(tmp_path):
    def talk(question: str, answer: str) -> dict[str, Any]:
        return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}

    good = [talk(f"question number {i} " * 3, "an answer " * 5) for i in range(6)]
    bad = [
        talk("x", "an answer " * 5),
        talk("q " * 5000, "a" * 50),
        talk("q " * 20, "a"),
        {"conversations": []},
    ]
    path = write_lines(tmp_path / "s.json", json.dumps(good + bad))
    asks = make(WordVocabulary(), dataset_name="sharegpt", dataset_path=path)
    assert {a.prompt for a in asks} == {g["conversations"][0]["value"] for g in good}
    assert {a.max_tokens for a in asks} == {12}
    four = make(
        WordVocabulary(), dataset_name="sharegpt", dataset_path=path, num_prompts=4, sharegpt_output_len=9
    )
    assert [a.max_tokens for a in four] == [9] * 4


def test_custom_keeps_the_order_of_the_file(tmp_path):
    path = write_lines(
        tmp_path / "c.jsonl",
        {"prompt": "first"},
        "",
        {"prompt": "second", "output_tokens": 5},
        {"prompt": "3"},
    )
    asks = make(
        WordVocabulary(), dataset_name="custom", dataset_path=path, num_prompts=2, custom_output_len=8
    )
    assert [(a.prompt, a.max_tokens) for a in asks] == [("first", 8), ("second", 5)]


def test_timed_trace_replays_times_lengths_and_sharing(tmp_path):
    path = write_lines(
        tmp_path / "t.jsonl",
        {"timestamp": 1000, "input_length": 600, "output_length": 3, "hash_ids": [1, 2]},
        {"timestamp": 1500, "input_length": 1100, "output_length": 0, "hash_ids": [1, 3, 4]},
        {"timestamp": 3000, "input_length": 20, "output_length": 5},
    )
    first, second, third = make(dataset_name="timed_trace", dataset_path=path)
    assert [a.at for a in (first, second, third)] == [0.0, 0.5, 2.0]
    assert [a.prompt_tokens for a in (first, second, third)] == [600, 1100, 20]
    assert [a.max_tokens for a in (first, second, third)] == [3, 1, 5]
    assert first.prompt[:512] == second.prompt[:512]
    assert first.prompt[512:] != second.prompt[512:600]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sharegpt", "{}", "gave no usable request"),
        ("sharegpt", "[1]", "not a ShareGPT file"),
        ("sharegpt", "nonsense", "not a ShareGPT file"),
        ("custom", '{"text": "x"}', "line 1 has no text under `prompt`"),
        ("custom", "\n{", "line 2 is not JSON"),
        ("custom", "[]", "line 1 is not an object"),
        ("timed_trace", '{"timestamp": 1}', "needs timestamp, input_length and output_length"),
    ],
)
def test_wrong_files_are_refused_with_their_place(tmp_path, name, content, message):
    path = write_lines(tmp_path / "f", content)
    with pytest.raises(ConfigError) as refused:
        make(WordVocabulary(), dataset_name=name, dataset_path=path)
    assert message in refused.value.message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": "custom"}, "needs --dataset-path"),
        ({"dataset_name": "custom", "dataset_path": "/nowhere"}, "is not a file"),
        ({"random_range_ratio": 1.0}, "--random-range-ratio"),
        ({"dataset_name": "prefix_repetition", "prefix_repetition_num_prefixes": 0}, "num-prefixes"),
        ({"num_prompts": 0}, "no usable request"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError) as refused:
        make(**options)
    assert message in refused.value.message


def test_every_data_set_named_on_the_command_line_exists():
    choices = DatasetOptions.__dataclass_fields__["dataset_name"].metadata["choices"]
    assert set(choices) == set(DATASETS)


class TestVocabulary:
    def test_token_ids_as_ids(self, tokenizer_json):
        vocabulary = load_vocabulary(str(tokenizer_json.parent), as_ids=True)
        ids = vocabulary.tokens(500, random.Random(0))
        assert vocabulary.prompt(ids) == (ids, 500)
        assert not {0, 1} & set(ids)  # special tokens

    def test_token_ids_as_text_are_counted_as_the_server_will(self, tokenizer_json):
        vocabulary = TokenVocabulary(tokenizer_json, as_ids=False)
        text, count = vocabulary.prompt(vocabulary.tokens(40, random.Random(0)))
        assert isinstance(text, str)
        assert count == vocabulary.count(text) > 20

    def test_the_first_candidate_on_this_disk_is_taken(self, tokenizer_json):
        found = load_vocabulary(None, None, "/nowhere", str(tokenizer_json), as_ids=True)
        assert isinstance(found, TokenVocabulary)
        assert isinstance(load_vocabulary(None, "org/model", as_ids=True), WordVocabulary)

    def test_one_asked_for_must_exist(self):
        with pytest.raises(ConfigError, match="--tokenizer no/such-model"):
            load_vocabulary("no/such-model", as_ids=True)

    def test_words(self):
        words = WordVocabulary()
        text, count = words.prompt(words.tokens(30, random.Random(0)))
        assert len(str(text).split()) == count == 30
        assert words.count("") == 1

    def test_ids_alone_cannot_count_text(self):
        with pytest.raises(ConfigError):
            IDS.count("text")
