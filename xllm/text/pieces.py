"""What each token adds to a text, as bytes: the one definition that whole and incremental decoding share.

Two families cover the tokenizers we serve:

* byte-level BPE (GPT-2, Llama 3, Qwen, Mistral's Tekken): every character of a token's string stands for one
  byte;
* the rest (metaspace BPE with byte fallback as in Llama 2, Unigram, WordPiece): a token's text depends only
  on whether it opens the text, so it is read off by decoding the token alone and behind another one. Tokens
  like `<0xE4>` are single bytes where the decoder has byte fallback.

A text is the UTF-8 reading of the joined bytes, where what is not UTF-8 becomes U+FFFD, one per maximal
invalid part (the Unicode recommendation). For byte-level tokenizers that is exactly what `tokenizers`
decodes. For byte fallback it is so for valid text; a run of byte tokens that is *not* valid UTF-8 differs on
purpose: `tokenizers` then turns each byte of the run into U+FFFD, even those of characters that were
complete, and with that takes back characters a stream has already shown.
"""

import json
import re
from typing import Any

from tokenizers import Tokenizer as Backend

from xllm.core.errors import ConfigError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PLAIN_DECODERS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece"}


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins: printable Latin-1 stands for itself, the other bytes for 256, 257, ..."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of_character()


class Pieces:
    """The bytes of every token id, computed when first asked for. Ids that no token has are empty."""

    def __init__(self, backend: Backend):
        """Raises `ConfigError` where text cannot be decoded token by token with this tokenizer's decoder."""
        self._backend = backend
        steps = _decoder_steps(backend)
        kinds = {step["type"] for step in steps}
        self.byte_level = "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}
        strips_end = any(step["type"] == "Strip" and step["stop"] for step in steps)
        if not self.byte_level and (strips_end or not kinds <= _PLAIN_DECODERS):
            raise ConfigError(
                f"the tokenizer's decoder ({', '.join(sorted(kinds))}) cannot be followed as a stream; "
                f"xLLM knows ByteLevel and combinations of {', '.join(sorted(_PLAIN_DECODERS))}"
            )
        self._byte_fallback = "ByteFallback" in kinds
        self._anchor = -1 if self.byte_level else _anchor(backend)
        self._later: dict[int, bytes] = {}
        self._first: dict[int, bytes] = {}

    @property
    def covers_all_bytes(self) -> bool:
        """Whether every text can be written in tokens, nothing dropped and nothing unknown."""
        if self.byte_level:
            return all(self._backend.token_to_id(character) is not None for character in _BYTE_OF)
        return self._byte_fallback and all(
            self._backend.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256)
        )

    def later(self, token_id: int) -> bytes:
        """What the token adds behind other text."""
        piece = self._later.get(token_id)
        if piece is None:
            piece = self._later[token_id] = self._make(token_id)
        return piece

    def first(self, token_id: int) -> bytes:
        """What the token adds when nothing stands before it (metaspace tokenizers drop a leading space)."""
        if self.byte_level:
            return self.later(token_id)
        piece = self._first.get(token_id)
        if piece is None:
            piece = self._first[token_id] = self._make_first(token_id)
        return piece

    def _make(self, token_id: int) -> bytes:
        token = self._token(token_id)
        if token is None:
            return b""
        if self.byte_level:
            try:
                return bytes([_BYTE_OF[character] for character in token])
            except KeyError:  # an added token, which is its own text
                return token.encode()
        if self._is_byte(token):
            return bytes([int(token[3:5], 16)])
        before = self._decode([self._anchor])
        return self._decode([self._anchor, token_id])[len(before) :].encode()

    def _make_first(self, token_id: int) -> bytes:
        token = self._token(token_id)
        if token is None:
            return b""
        alone = self._decode([token_id])
        # the byte of a space may be dropped at the start like a space; any other byte stays what it is
        return self.later(token_id) if self._is_byte(token) and alone else alone.encode()

    def _token(self, token_id: int) -> str | None:
        return self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    def _is_byte(self, token: str) -> bool:
        return self._byte_fallback and _BYTE_TOKEN.fullmatch(token) is not None

    def _decode(self, token_ids: list[int]) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=False)


def _decoder_steps(backend: Backend) -> list[dict[str, Any]]:
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def _anchor(backend: Backend) -> int:
    """An ordinary token with its own text, to stand before others. Raises `ConfigError` if there is none."""
    for token_id in range(backend.get_vocab_size()):
        token = backend.id_to_token(token_id)
        if token and token.isalnum() and backend.decode([token_id], skip_special_tokens=False) == token:
            return token_id
    raise ConfigError("the tokenizer has no token of plain letters or digits")
