"""What to send: prompts made up or read from a file, as `Ask`s in the order they are sent."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from xllm.bench.completion import Ask
from xllm.bench.options import DatasetOptions
from xllm.bench.vocabulary import Vocabulary
from xllm.core.errors import ConfigError

TRACE_BLOCK = 512  # tokens that one hash id of a Mooncake-style trace stands for
# What a request of sharegpt must lie within, in tokens, as everybody prunes it.
SHAREGPT_MIN, SHAREGPT_MAX_PROMPT, SHAREGPT_MAX_TOTAL = 4, 1024, 2048


def load(options: DatasetOptions, vocabulary: Vocabulary, seed: int) -> list[Ask]:
    """Raises `ConfigError` when a file is missing or not what it should be, or an option makes no sense."""
    rng = random.Random(seed)
    asks = list(DATASETS[options.dataset_name](options, vocabulary, rng))
    if not asks:
        raise ConfigError(f"the data set {options.dataset_name} gave no usable request")
    return asks


def _random(o: DatasetOptions, vocabulary: Vocabulary, rng: random.Random) -> Iterator[Ask]:
    if not 0 <= o.random_range_ratio < 1:
        raise ConfigError("--random-range-ratio must be at least 0 and less than 1")
    prefix = vocabulary.tokens(o.random_prefix_len, rng)
    for _ in range(o.num_prompts):
        own = vocabulary.tokens(_around(o.random_input_len, o.random_range_ratio, rng), rng)
        prompt, count = vocabulary.prompt(prefix + own)
        yield Ask(prompt, count, max(1, _around(o.random_output_len, o.random_range_ratio, rng)))


def _around(length: int, ratio: float, rng: random.Random) -> int:
    return rng.randint(int(length * (1 - ratio)), int(length * (1 + ratio)))


def _prefix_repetition(o: DatasetOptions, vocabulary: Vocabulary, rng: random.Random) -> Iterator[Ask]:
    """Each prefix equally often, in mixed order."""
    if o.prefix_repetition_num_prefixes < 1:
        raise ConfigError("--prefix-repetition-num-prefixes must be at least 1")
    prefixes = [
        vocabulary.tokens(o.prefix_repetition_prefix_len, rng)
        for _ in range(o.prefix_repetition_num_prefixes)
    ]
    order = [i % len(prefixes) for i in range(o.num_prompts)]
    rng.shuffle(order)
    for i in order:
        suffix = vocabulary.tokens(o.prefix_repetition_suffix_len, rng)
        prompt, count = vocabulary.prompt(prefixes[i] + suffix)
        yield Ask(prompt, count, o.prefix_repetition_output_len)


def _sharegpt(o: DatasetOptions, vocabulary: Vocabulary, rng: random.Random) -> Iterator[Ask]:
    """First question and length of the first answer of each conversation, shuffled."""
    path = _path(o)
    try:
        conversations = json.loads(path.read_text(encoding="utf-8"))
        turns = [c.get("conversations") or c.get("conversation") or [] for c in conversations]
        pairs = [(t[0]["value"], t[1]["value"]) for t in turns if len(t) >= 2]
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ConfigError(f"{path} is not a ShareGPT file: {e!r}") from e
    rng.shuffle(pairs)
    taken = 0
    for question, answer in pairs:
        if taken == o.num_prompts:
            return
        prompt_tokens = vocabulary.count(question)
        output_tokens = o.sharegpt_output_len or vocabulary.count(answer)
        short = prompt_tokens < SHAREGPT_MIN or output_tokens < SHAREGPT_MIN
        long = prompt_tokens > SHAREGPT_MAX_PROMPT or prompt_tokens + output_tokens > SHAREGPT_MAX_TOTAL
        if not short and not long:
            taken += 1
            yield Ask(question, prompt_tokens, output_tokens)


def _custom(o: DatasetOptions, vocabulary: Vocabulary, rng: random.Random) -> Iterator[Ask]:
    """Lines `{"prompt": str, "output_tokens": int?}` in file order."""
    for where, line in _lines(o):
        prompt = line.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise ConfigError(f"{where} has no text under `prompt`")
        yield Ask(prompt, vocabulary.count(prompt), int(line.get("output_tokens", o.custom_output_len)))


def _timed_trace(o: DatasetOptions, vocabulary: Vocabulary, rng: random.Random) -> Iterator[Ask]:
    """Lines `{"timestamp": ms, "input_length", "output_length", "hash_ids": [..]?}`, as Mooncake publishes them.

    Equal hash ids become equal blocks of tokens, so the trace's prefix sharing is replayed too.
    """
    blocks: dict[int, list[int]] = {}
    begin: float | None = None
    for where, line in _lines(o):
        try:
            at, length, output = (
                float(line["timestamp"]),
                int(line["input_length"]),
                int(line["output_length"]),
            )
        except (KeyError, TypeError, ValueError) as e:
            raise ConfigError(f"{where} needs timestamp, input_length and output_length: {e!r}") from e
        begin = at if begin is None else begin
        tokens: list[int] = []
        for block in line.get("hash_ids") or []:
            if block not in blocks:
                blocks[block] = vocabulary.tokens(TRACE_BLOCK, rng)
            tokens += blocks[block]
        tokens = tokens[:length] + vocabulary.tokens(max(0, length - len(tokens)), rng)
        prompt, count = vocabulary.prompt(tokens)
        yield Ask(prompt, count, max(1, output), at=(at - begin) / 1000)


def _path(o: DatasetOptions) -> Path:
    if o.dataset_path is None:
        raise ConfigError(f"--dataset-name {o.dataset_name} needs --dataset-path")
    path = Path(o.dataset_path)
    if not path.is_file():
        raise ConfigError(f"--dataset-path {path} is not a file")
    return path


def _lines(o: DatasetOptions) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for error messages, object) of the first `num_prompts` non-empty lines."""
    path, taken = _path(o), 0
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if taken == o.num_prompts:
                return
            if not text.strip():
                continue
            taken += 1
            where = f"{path}, line {number}"
            try:
                line = json.loads(text)
            except ValueError as e:
                raise ConfigError(f"{where} is not JSON: {e}") from e
            if not isinstance(line, dict):
                raise ConfigError(f"{where} is not an object")
            yield where, line


DATASETS: dict[str, Callable[[DatasetOptions, Vocabulary, random.Random], Iterator[Ask]]] = {
    "random": _random,
    "sharegpt": _sharegpt,
    "prefix_repetition": _prefix_repetition,
    "custom": _custom,
    "timed_trace": _timed_trace,
}
