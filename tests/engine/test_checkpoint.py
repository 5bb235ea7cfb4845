import dataclasses
import json

import pytest

from tests import checkpoints
from xllm.config.options import EngineOptions
from xllm.engine.build import decide
from xllm.engine.checkpoint import defaults_from, open_tokenizer, sampling_defaults


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"eos_token_id": 2, "transformers_version": "5"}, {}),
        ({"temperature": 0.3, "top_p": 0.9, "top_k": 20}, {"temperature": 0.3, "top_p": 0.9, "top_k": 20}),
        ({"max_new_tokens": 7, "repetition_penalty": 1.1}, {"max_tokens": 7, "repetition_penalty": 1.1}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"do_sample": True, "min_p": None}, {}),
    ],
)
def test_sampling_defaults_under_our_names(theirs, ours):
    assert defaults_from(theirs) == ours


def test_defaults_are_read_unless_switched_off(tmp_path):
    checkpoints.save_qwen3(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"temperature": 0.25, "eos_token_id": [2, 5]})
    )
    options = EngineOptions(model=str(tmp_path))
    config = decide(options)
    assert config.model.eos_ids == (2, 5)
    assert sampling_defaults(options, config) == {"temperature": 0.25}
    assert sampling_defaults(dataclasses.replace(options, generation_config="none"), config) == {}
    (tmp_path / "generation_config.json").unlink()
    assert sampling_defaults(options, decide(options)) == {}


def test_a_tokenizer_of_its_own_place(tmp_path):
    checkpoints.save_qwen3(tmp_path / "model")
    (tmp_path / "other").mkdir()
    checkpoints.save_tokenizer(tmp_path / "other")
    options = EngineOptions(model=str(tmp_path / "model"))
    config = decide(options)
    (tmp_path / "model" / "tokenizer.json").unlink()
    elsewhere = open_tokenizer(dataclasses.replace(options, tokenizer=str(tmp_path / "other")), config)
    assert elsewhere.decode(elsewhere.encode("the cat")) == "the cat"
