"""Prompts of a wanted length in tokens, with the model's tokenizer if we have it and without it if not."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from xllm.core.errors import ConfigError

# Everyday words: most tokenizers have a token for each with its leading space.
_WORDS = (
    "the of and to in is that it was for on are as with his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so "
    "these would other into has more her two like him see time could no make than first been its who now people my "
    "made over did down only way find use may water long little very after words called just where most know"
).split()


class Vocabulary(Protocol):
    def tokens(self, count: int, rng: random.Random) -> list[int]:
        """Random tokens to build a prompt from; ids mean something only to this vocabulary."""
        ...

    def prompt(self, tokens: Sequence[int]) -> tuple[str | list[int], int]:
        """What to send for these tokens, and how many tokens that should be on the server."""
        ...

    def count(self, text: str) -> int: ...


class WordVocabulary:
    """Without a tokenizer: one common word for one token. The server's own count ends up in the results."""

    def tokens(self, count: int, rng: random.Random) -> list[int]:
        return rng.choices(range(len(_WORDS)), k=count)

    def prompt(self, tokens: Sequence[int]) -> tuple[str | list[int], int]:
        return " ".join(_WORDS[t] for t in tokens), len(tokens)

    def count(self, text: str) -> int:
        return max(1, len(text) // 4)


class IdVocabulary:
    """Ids alone, for an engine that is handed ids. The first few, often special, are left out."""

    def __init__(self, vocab_size: int):
        self._ids = range(min(10, vocab_size - 1), vocab_size)

    def tokens(self, count: int, rng: random.Random) -> list[int]:
        return rng.choices(self._ids, k=count)

    def prompt(self, tokens: Sequence[int]) -> tuple[str | list[int], int]:
        return list(tokens), len(tokens)

    def count(self, text: str) -> int:
        raise ConfigError("a data set of texts needs --tokenizer to count their tokens")


class TokenVocabulary:
    """With the model's tokenizer. `as_ids` sends token ids (completions take them), else text decoded from them."""

    def __init__(self, path: Path | str, *, as_ids: bool):
        from tokenizers import Tokenizer

        self._as_ids = as_ids
        self._tokenizer = Tokenizer.from_file(str(path))
        special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self._ids = [i for i in range(self._tokenizer.get_vocab_size()) if i not in special]

    def tokens(self, count: int, rng: random.Random) -> list[int]:
        return rng.choices(self._ids, k=count)

    def prompt(self, tokens: Sequence[int]) -> tuple[str | list[int], int]:
        if self._as_ids:
            return list(tokens), len(tokens)
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text, self.count(text)  # random pieces may join into fewer tokens, or split into more

    def count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)


def load_vocabulary(tokenizer: str | None, *candidates: str | None, as_ids: bool) -> Vocabulary:
    """`tokenizer` as asked for (a directory, a tokenizer.json, a hub id), else the first candidate on this disk.

    Raises `ConfigError` when the one asked for cannot be had.
    """
    if tokenizer is not None:
        return TokenVocabulary(_on_disk(tokenizer) or _from_hub(tokenizer), as_ids=as_ids)
    for candidate in candidates:
        if candidate and (path := _on_disk(candidate)):
            return TokenVocabulary(path, as_ids=as_ids)
    return WordVocabulary()


def _on_disk(name: str) -> Path | None:
    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    return file if file.is_file() and file.name.endswith(".json") else None


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "tokenizer.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        raise ConfigError(f"--tokenizer {name}: no tokenizer.json there: {e}") from e
