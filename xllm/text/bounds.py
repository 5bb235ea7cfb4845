"""How few tokens a text can have, known without tokenising it: hopeless prompts are refused for free."""

import json
from typing import Any

from tokenizers import Tokenizer as Backend

# Normalizers that give at least one byte for every four they take (NFKC turns four-byte letters into ASCII)
_BOUNDED_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Prepend", "Lowercase"}
_MOST_SHRINKING = 4


class LengthBound:
    """A lower bound on token counts for one tokenizer, 0 where nothing can be promised.

    A token covers at most as many bytes of text as the longest token has, unless the tokenizer drops or
    merges what it does not know (`covers_all_bytes` false) or normalizes text away.
    """

    def __init__(self, backend: Backend, covers_all_bytes: bool):
        added = backend.get_added_tokens_decoder().values()
        self._eats_spaces = any(token.lstrip or token.rstrip for token in added)
        self._bytes_per_token = 0  # no bound
        if covers_all_bytes and (shrinking := _shrinking(backend)):
            self._bytes_per_token = shrinking * max(len(token.encode()) for token in backend.get_vocab())

    def min_tokens(self, text: str) -> int:
        if not self._bytes_per_token:
            return 0
        words = text.split() if self._eats_spaces else [text]
        size = sum(len(word.encode("utf-8", "replace")) for word in words)
        return -(-size // self._bytes_per_token)


def _shrinking(backend: Backend) -> int:
    """By what factor at most the normalizer makes a text shorter, in bytes; 0 if that has no limit."""
    if backend.normalizer is None:
        return 1
    state = json.loads(backend.normalizer.__getstate__())
    steps: list[dict[str, Any]] = state["normalizers"] if state["type"] == "Sequence" else [state]
    if all(_grows(step) for step in steps):
        return 1
    return (
        _MOST_SHRINKING if all(_grows(step) or step["type"] in _BOUNDED_NORMALIZERS for step in steps) else 0
    )


def _grows(step: dict[str, Any]) -> bool:
    if step["type"] == "Prepend":
        return True
    pattern = step.get("pattern", {}).get("String")
    return (
        step["type"] == "Replace"
        and pattern is not None
        and len(step["content"].encode()) >= len(pattern.encode())
    )
