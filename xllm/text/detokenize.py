"""Token ids to text as they come, never half a character and never a piece of the prompt."""

import codecs
from collections.abc import Iterable, Sequence

from xllm.text.tokenizer import Tokenizer

_UTF8 = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer:
    """Decodes one sequence's output. Cost per token is constant; at most three bytes are held back.

    What all pushes and the finish return together is the same for every way of chunking the ids, and equals
    `decode(prompt + output)` without its beginning `decode(prompt)`, with `Tokenizer.decode`. Where the
    prompt ends inside a character, that character is shown if the output completes it (it is then new: the
    prompt could not show it); if the output does not, the prompt's loose bytes show nowhere.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ):
        self._pieces = tokenizer.pieces
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = _UTF8("replace")
        tail = self._tail_bytes(prompt_token_ids)
        self._at_start = not tail
        self._decoder.decode(tail)
        self._prompt_bytes = self._decoder.getstate()[0]  # of an unfinished character, not yet used by output

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these next tokens complete, possibly none."""
        data = b""
        for token_id in token_ids:
            if token_id in self._skip:
                continue
            later = self._pieces.later(token_id)
            if self._at_start:
                data += self._pieces.first(token_id)
                self._at_start = not later
            else:
                data += later
        return self._feed(data) if data else ""

    def finish(self) -> str:
        """What is left of a character that never became whole: U+FFFD, or nothing."""
        if self._prompt_bytes:
            return ""
        return self._decoder.decode(b"", final=True)

    def _feed(self, data: bytes) -> str:
        if self._prompt_bytes:
            if not _continues(self._prompt_bytes, data[:1]):
                self._decoder.reset()
            self._prompt_bytes = b""
        return self._decoder.decode(data)

    def _tail_bytes(self, token_ids: Sequence[int]) -> bytes:
        """The prompt's last bytes, enough of them to hold any unfinished character (that is three)."""
        tail = b""
        for token_id in reversed(token_ids):
            if token_id not in self._skip:
                tail = self._pieces.later(token_id) + tail
            if len(tail) >= 3:
                break
        return tail


def _continues(head: bytes, byte: bytes) -> bool:
    """Whether `byte` may follow `head`, the beginning of a character, in UTF-8."""
    decoder = _UTF8("strict")
    try:
        decoder.decode(head + byte)
    except UnicodeDecodeError:
        return False
    return True
