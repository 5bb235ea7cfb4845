"""Chat messages to the text a model was trained on, through the model's own template."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError

from xllm.core.errors import ConfigError, InvalidRequest
from xllm.text.messages import normalise
from xllm.text.sandbox import MAX_LENGTH, ChatEnvironment, budget
from xllm.text.tokenizer import Tokenizer, check_text

# stands where a continued message ends, in characters nobody writes; the space shows whether it was trimmed
_TAG = "\ue0f1CONTINUES\ue0f1 "
_RESERVED = {"messages", "tools", "documents", "add_generation_prompt"}


class ChatTemplate:
    """A model's templates, compiled once; renders what `transformers` renders. Safe to share between threads.

    `templates` has `default` and perhaps `tool_use`, which is taken when tools are offered. `special_tokens`
    are variables in the template. Raises `ConfigError` if there is no default or a template has a syntax
    error.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str] | None = None):
        if "default" not in templates:
            raise ConfigError("the model has no chat template; give one with --chat-template")
        environment = ChatEnvironment()
        self._templates: dict[str, _Compiled] = {}
        for name in templates.keys() & {"default", "tool_use"}:
            try:
                self._templates[name] = _Compiled(environment, templates[name])
            except TemplateError as error:
                raise ConfigError(f"the chat template {name!r} has an error: {error}") from None
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def of(cls, tokenizer: Tokenizer, override: str | None = None) -> "ChatTemplate":
        """The model's own templates, or the one given instead."""
        templates = tokenizer.chat_templates if override is None else {"default": override}
        return cls(templates, tokenizer.special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, to be encoded without further special tokens.

        `continue_final_message` leaves the last message open for the model to go on with. `kwargs` are the
        request's own variables for the template. Raises `InvalidRequest` naming the field, also for whatever
        the template itself objects to or cannot cope with.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message goes on with the last message, add_generation_prompt begins a new one: "
                "set one of them only",
                param="continue_final_message",
            )
        if clash := _RESERVED & (kwargs or {}).keys():
            raise InvalidRequest(
                f"chat_template_kwargs cannot set {sorted(clash)[0]}", param="chat_template_kwargs"
            )
        template = self._templates.get(
            "tool_use" if tools is not None else "default", self._templates["default"]
        )
        chat = normalise(messages, as_parts=template.wants_parts, template_source=template.source)
        end = _mark_end(chat, template.source) if continue_final_message else None
        text = template.run(
            messages=chat,
            tools=_dicts("tools", tools),
            documents=_dicts("documents", documents),
            add_generation_prompt=add_generation_prompt,
            **{**self._special_tokens, **(kwargs or {})},
        )
        check_text(text, "messages")
        return text if end is None else _cut_at_mark(text, end)


class _Compiled:
    """One template with what must be known about it."""

    def __init__(self, environment: ChatEnvironment, source: str):
        self.source = source
        self.wants_parts = _loops_over_content(environment.parse(source))
        self._template: Template = environment.from_string(source)

    def run(self, **variables: Any) -> str:
        parts: list[str] = []
        length = 0
        try:
            with budget():
                for part in self._template.generate(**variables):
                    parts.append(part)
                    length += len(part)
                    if length > MAX_LENGTH:
                        raise InvalidRequest("the chat is too long once rendered", param="messages")
        except InvalidRequest:
            raise
        except TemplateError as error:
            raise InvalidRequest(
                f"the model's chat template refuses this chat: {error}", param="messages"
            ) from None
        except Exception as error:  # templates are code: any exception may come out of one
            reason = f"{type(error).__name__}: {error}"
            raise InvalidRequest(
                f"the chat template cannot render this chat ({reason})", param="messages"
            ) from None
        return "".join(parts)


def _dicts(name: str, values: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    if values is None:
        return None
    if isinstance(values, str) or not all(isinstance(value, Mapping) for value in values):
        raise InvalidRequest(f"{name} must be a list of objects", param=name)
    return [dict(value) for value in values]


def _mark_end(chat: list[dict[str, Any]], source: str) -> str:
    """Put the tag behind the last message's text, which is returned."""
    content = chat[-1].get("content")
    part: dict[str, Any] = chat[-1]
    key = "content"
    if isinstance(content, list):
        part = next((part for part in reversed(content) if "text" in part), {})
        key = "text"
    text = part.get(key)
    if not isinstance(text, str) or "content" not in source:
        raise InvalidRequest("the final message has no text to continue", param="continue_final_message")
    part[key] = text + _TAG
    return text


def _cut_at_mark(text: str, end: str) -> str:
    mark = text.rfind(_TAG.strip())
    if mark < 0 or end.strip() not in text:
        raise InvalidRequest(
            "the chat template does not show the final message as it is, so it cannot be continued",
            param="continue_final_message",
        )
    kept = text[mark:].startswith(_TAG)
    # a template that trims messages has taken the tag's space too, and then the message's own must go with it
    return text[:mark] if kept else text[:mark].rstrip()


def _loops_over_content(tree: nodes.Template) -> bool:
    """Whether the template takes a message's content as a list of parts: it has a loop over it somewhere."""
    names = {"content"}
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
            names.add(assign.target.name)
    return any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    if isinstance(node, nodes.Filter):
        return _is_content(node.node, names)
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name in names
