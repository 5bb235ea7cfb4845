"""What else belongs to a checkpoint besides its weights: the tokenizer and the sampling defaults."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xllm.config.decided import EngineConfig
from xllm.config.options import EngineOptions
from xllm.models.source import locate
from xllm.text.tokenizer import Tokenizer, load_tokenizer

# generation_config.json's name -> ours
_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def open_tokenizer(options: EngineOptions, config: EngineConfig) -> Tokenizer:
    directory = Path(config.model.directory) if options.tokenizer is None else locate(options.tokenizer, None)
    return load_tokenizer(directory)


def sampling_defaults(options: EngineOptions, config: EngineConfig) -> dict[str, Any]:
    """Out of the checkpoint's generation_config.json, under our names; {} with `--generation-config none`."""
    path = Path(config.model.directory) / "generation_config.json"
    if options.generation_config == "none" or not path.exists():
        return {}
    return defaults_from(json.loads(path.read_text(encoding="utf-8")))


def defaults_from(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's generation_config.json says about sampling, under our names."""
    found = {
        ours: generation_config[theirs]
        for theirs, ours in _DEFAULTS.items()
        if generation_config.get(theirs) is not None
    }
    if generation_config.get("do_sample") is False:
        found["temperature"] = 0.0
    return found
