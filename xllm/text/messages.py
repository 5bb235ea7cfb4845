"""OpenAI chat messages, checked and brought into the one form that templates read."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from xllm.core.errors import InvalidRequest

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
REASONING_FIELDS = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # one thing under three names; the first is read most
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def normalise(
    messages: Sequence[Mapping[str, Any]], *, as_parts: bool, template_source: str
) -> list[dict[str, Any]]:
    """Fresh messages for a template; `as_parts` says whether it reads content as a list of parts.

    * fields that are null are left out, as templates would print "None";
    * a list of text parts becomes one string, one part per line, unless the template wants parts;
    * arguments of tool calls become objects where they are JSON in a string;
    * reasoning is under every name it goes by;
    * `developer` becomes `system` where the template does not know it.

    Roles beyond OpenAI's are passed on if the template speaks of them. Raises `InvalidRequest` saying which
    message is wrong.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequest("messages must be a list of at least one message", param="messages")
    chat = []
    for i, given in enumerate(messages):
        if not isinstance(given, Mapping):
            raise _wrong(i, "must be an object")
        message = {key: value for key, value in given.items() if value is not None}
        message["role"] = _role(i, message.get("role"), template_source)
        if "content" in message:
            message["content"] = _content(i, message["content"], as_parts)
        if "tool_calls" in message:
            message["tool_calls"] = [
                _tool_call(i, call) for call in _list(i, "tool_calls", message["tool_calls"])
            ]
        if not message.keys() & {"content", "tool_calls", "function_call", *REASONING_FIELDS}:
            raise _wrong(i, "has no content")
        chat.append(_with_reasoning(message))
    return chat


def _role(i: int, role: Any, source: str) -> str:
    if not isinstance(role, str) or not role:
        raise _wrong(i, "has no role")
    known = any(f"{quote}{role}{quote}" in source for quote in "'\"")
    if not known and role not in ROLES:
        raise _wrong(i, f"has the unknown role {role[:40]!r}; known are {', '.join(ROLES)}")
    return "system" if role == "developer" and not known else role


def _content(i: int, content: Any, as_parts: bool) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    texts = [_part_text(i, j, part) for j, part in enumerate(_list(i, "content", content))]
    return [{"type": "text", "text": text} for text in texts] if as_parts else "\n".join(texts)


def _part_text(i: int, j: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    field = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if field is None:
        raise _wrong(i, f"has content[{j}] of type {str(kind)[:40]!r}; this model takes text only")
    if not isinstance(part.get(field), str):
        raise _wrong(i, f"has content[{j}] without {field}")
    return str(part[field])


def _tool_call(i: int, call: Any) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise _wrong(i, "has a tool call that is not an object")
    call = dict(call)
    function = call.get("function")
    if isinstance(function, Mapping):
        call["function"] = dict(function) | {"arguments": _arguments(function.get("arguments"))}
    return call


def _arguments(arguments: Any) -> Any:
    """Clients send JSON in a string, templates print objects. What is no JSON object stays as it is."""
    if not arguments:
        return {}
    if not isinstance(arguments, str):
        return arguments
    try:
        value: Any = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[name] for name in REASONING_FIELDS if name in message), None)
    return (
        message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
    )


def _list(i: int, field: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong(
            i,
            f"has {field} that is neither text nor a list"
            if field == "content"
            else f"has no list of {field}",
        )
    return value


def _wrong(i: int, what: str) -> InvalidRequest:
    return InvalidRequest(f"messages[{i}] {what}", param="messages")
