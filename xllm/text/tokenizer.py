"""Text to token ids and back, over the `tokenizers` library alone: ready in milliseconds, without torch."""

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from xllm.core.errors import ConfigError, InvalidRequest
from xllm.text.bounds import LengthBound
from xllm.text.pieces import Pieces

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """One model's tokenizer. Safe to share between threads; long encodings let other threads run.

    `special_tokens` are the named ones (`bos_token`, `eos_token`, ...) as templates see them;
    `chat_templates` the model's templates by name, mostly just `default`.
    """

    def __init__(
        self,
        backend: Backend,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ):
        """Takes the backend over: stored truncation and padding go, for a prompt must stay whole."""
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        self.pieces = Pieces(backend)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size = (
            max(backend.get_vocab_size() - 1, *added, 0) + 1
        )  # ids are below this; some may be unused

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id_of("eos_token")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; with `add_special_tokens` also what the model wants around a text, such as BOS.

        Raises `InvalidRequest` for text that has no UTF-8 form (half of a surrogate pair).
        """
        check_text(text)
        # the batch form lets go of the interpreter lock, the single one does not
        return list(self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence. Ids that no token has add nothing; invalid UTF-8 becomes U+FFFD.

        Differs from `tokenizers` only as `xllm.text.pieces` says.
        """
        skip = self.special_ids if skip_special_tokens else frozenset()
        out, at_start = [], True
        for token_id in token_ids:
            if token_id in skip:
                continue
            later = self.pieces.later(token_id)
            out.append(self.pieces.first(token_id) if at_start else later)
            at_start = at_start and not later
        return b"".join(out).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds behind other text; special tokens are their own name."""
        return self.pieces.later(token_id)

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, with U+FFFD where it is only part of a character."""
        return self.pieces.later(token_id).decode("utf-8", "replace")

    def min_tokens(self, text: str) -> int:
        """At least so many tokens does `text` have: cheap, and 0 where nothing can be said."""
        return self._bound.min_tokens(text)

    def check_length(self, text: str, max_tokens: int) -> None:
        """Refuse a text that cannot fit before any work: raises `InvalidRequest`. Passing proves nothing."""
        if len(text) > max_tokens and (least := self.min_tokens(text)) > max_tokens:
            raise InvalidRequest(
                f"the prompt has {len(text)} characters, which is at least {least} tokens; "
                f"at most {max_tokens} fit the model's context",
                param="prompt",
                code="context_length_exceeded",
            )

    @cached_property
    def _bound(self) -> LengthBound:
        return LengthBound(self.backend, self.pieces.covers_all_bytes)

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)


def check_text(text: str, param: str = "prompt") -> None:
    """Raises `InvalidRequest` naming `param` if the text cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{param} holds half of a surrogate pair (at character {error.start}): that is not Unicode",
            param=param,
        ) from None


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a model directory in Hugging Face format, as `transformers` would set it up.

    Reads `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` (of older models) and the chat
    templates. What stands around a text (BOS) is what `tokenizer.json` says; `add_bos_token` in the config is
    history. Where only an older format is there, `transformers` converts it, which takes seconds. Raises
    `ConfigError` saying what is missing.
    """
    directory = Path(directory)
    config = _read_config(directory)
    file = directory / "tokenizer.json"
    backend = _read(file) if file.is_file() else _convert(directory)
    special_tokens = {name: _content(config[name]) for name in _NAMED if config.get(name)}
    _add_missing_tokens(backend, config, special_tokens)
    return Tokenizer(backend, special_tokens, _chat_templates(directory, config))


def _read(file: Path) -> Backend:
    try:
        return Backend.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(
            f"{file} is not a tokenizer this version of `tokenizers` can read: {error}"
        ) from None


def _read_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = directory / name
        if file.is_file():
            try:
                config |= json.loads(file.read_text("utf-8"))
            except ValueError as error:
                raise ConfigError(f"{file} is not valid JSON: {error}") from None
    return config


def _convert(directory: Path) -> Backend:
    """What `transformers` makes of an older tokenizer format."""
    if not directory.is_dir():
        raise ConfigError(f"there is no model directory {directory}")
    sources = ("tokenizer.model", "vocab.json", "tekken.json", "vocab.txt", "spiece.model")
    if not any((directory / source).is_file() for source in sources):
        raise ConfigError(f"{directory} has no tokenizer.json, nor an older tokenizer ({', '.join(sources)})")
    from transformers import AutoTokenizer

    try:
        backend = getattr(AutoTokenizer.from_pretrained(str(directory)), "backend_tokenizer", None)
    except Exception as error:
        raise ConfigError(
            f"{directory} has no tokenizer.json, and converting its tokenizer failed: {error}"
        ) from error
    if not isinstance(backend, Backend):
        raise ConfigError(f"{directory} has no tokenizer.json, and its tokenizer cannot be converted to one")
    return backend


def _content(token: Any) -> str:
    """A special token's text: configs write it as a string or as the fields of an `AddedToken`."""
    return str(token["content"] if isinstance(token, dict) else token)


def _add_missing_tokens(backend: Backend, config: dict[str, Any], special_tokens: dict[str, str]) -> None:
    """Tokens that only the config knows, in the order of their ids, then named ones, all special."""
    fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    listed = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    tokens = [AddedToken(**{key: token[key] for key in fields if key in token}) for _, token in listed]
    tokens += [AddedToken(content, special=True, normalized=False) for content in special_tokens.values()]
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in tokens:
        if token.content not in known:
            known.add(token.content)
            backend.add_tokens([token])


def _chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """By name. Files beat the config, as in `transformers`."""
    templates = {
        file.stem: file.read_text("utf-8") for file in directory.glob("additional_chat_templates/*.jinja")
    }
    default = directory / "chat_template.jinja"
    if default.is_file():
        templates["default"] = default.read_text("utf-8")
    if templates:
        return templates
    listed = config.get("chat_template") or {}
    if isinstance(listed, str):
        return {"default": listed}
    if isinstance(listed, list):
        return {entry["name"]: entry["template"] for entry in listed}
    return dict(listed)
