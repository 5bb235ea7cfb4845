"""The chat template in force: the operator's, else the model's, or a request's own where that is allowed."""

from pathlib import Path

from xllm.core.errors import ConfigError, InvalidRequest
from xllm.text.chat import ChatTemplate
from xllm.text.tokenizer import Tokenizer


def choose_template(tokenizer: Tokenizer, given: str | None) -> ChatTemplate | None:
    """None when neither the operator nor the model brings one: then there is no chat."""
    if given is not None:
        return ChatTemplate({"default": _text(given)}, tokenizer.special_tokens)
    if "default" in tokenizer.chat_templates:
        return ChatTemplate(tokenizer.chat_templates, tokenizer.special_tokens)
    return None


def request_template(tokenizer: Tokenizer, text: str) -> ChatTemplate:
    """A template out of a request. Raises `InvalidRequest` for one that does not compile."""
    try:
        return ChatTemplate({"default": text}, tokenizer.special_tokens)
    except ConfigError as e:
        raise InvalidRequest(e.message, param="chat_template") from None
    except RecursionError:
        raise InvalidRequest("the chat template nests too deeply", param="chat_template") from None


def _text(given: str) -> str:
    """What holds Jinja marks is the template itself; anything else names a file."""
    if "{{" in given or "{%" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(
            f"--chat-template {given} is neither a readable file nor a Jinja template: {e}"
        ) from e
