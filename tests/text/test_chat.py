"""Chat templates against `transformers`' own rendering, and what the sandbox refuses."""

import time
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.text import trained
from xllm.core.errors import ConfigError, InvalidRequest
from xllm.text.chat import ChatTemplate
from xllm.text.tokenizer import Tokenizer

FILES = sorted((Path(__file__).parent / "templates").glob("*.jinja"))
TEMPLATES = {file.stem: file.read_text() for file in FILES}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'What\'s the weather <here> & "now"? ü',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
USER = {"role": "user", "content": "Hi there! <b>&amp; 你好 "}
ANSWER = {"role": "assistant", "content": "  Hello.\n"}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [{"role": "system", "content": "Be brief. "}, USER],
    "turns": [USER, ANSWER, {"role": "user", "content": ""}],
    "open": [USER, ANSWER],
    "thinking": [USER, {"role": "assistant", "content": "4", "reasoning_content": "2+2\n"}],
    "inline thinking": [USER, {"role": "assistant", "content": "<think>\nso\n</think>\n\n4"}, USER],
    "tool": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "20 degrees", "tool_call_id": "c1"},
        ANSWER,
        USER,
    ],
    "nulls": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None}],
    "bad order": [ANSWER, USER],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"add_generation_prompt": False},
    "generate": {"add_generation_prompt": True},
    "continue": {"add_generation_prompt": False, "continue_final_message": True},
    "tools": {"tools": [TOOL], "add_generation_prompt": True},
    "documents": {"documents": [{"title": "T", "text": "body"}], "add_generation_prompt": True},
    "kwargs": {
        "add_generation_prompt": True,
        "kwargs": {"enable_thinking": False, "date_string": "1 May 2020"},
    },
    "special": {"add_generation_prompt": True, "kwargs": {"bos_token": "[BOS]"}},
}


def theirs(template: str, chat: list[dict[str, Any]], options: dict[str, Any]) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained.backend("metaspace"), **SPECIAL)
    options = dict(options)
    text = tokenizer.apply_chat_template(
        chat, chat_template=template, tokenize=False, **options.pop("kwargs", {}), **options
    )
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("chat", CHATS)
def test_renders_what_transformers_renders(name: str, option: str, chat: str):
    template = ChatTemplate({"default": TEMPLATES[name]}, SPECIAL)
    try:
        expected = theirs(TEMPLATES[name], CHATS[chat], OPTIONS[option])
    except Exception:
        with pytest.raises(InvalidRequest):
            template.render(CHATS[chat], **OPTIONS[option])
    else:
        assert template.render(CHATS[chat], **OPTIONS[option]) == expected


def test_most_of_the_comparison_is_of_texts():
    """So that the test above cannot pass by both failing."""
    rendered = 0
    for template in TEMPLATES.values():
        for chat in ("one", "system", "turns", "open"):
            theirs(template, CHATS[chat], OPTIONS["generate"])
            rendered += 1
    assert rendered == 4 * len(TEMPLATES)


def test_arguments_of_tool_calls_in_a_string_become_an_object():
    as_text = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}
    template = ChatTemplate({"default": TEMPLATES["tools_and_thinking"]})

    def chat(call: dict[str, Any]) -> list[dict[str, Any]]:
        return [USER, {"role": "assistant", "tool_calls": [call]}]

    assert template.render(chat(as_text)) == template.render(chat(CALL))
    for odd in ("not json", "[1]", ""):
        call = {"function": {"name": "f", "arguments": odd}}
        assert (odd or "{}") in template.render(chat(call))
    assert "f" in template.render(chat({"name": "f", "arguments": {}}))


def test_text_parts_become_one_string_where_the_template_wants_strings():
    parts = [{"type": "text", "text": "one"}, "two", {"type": "refusal", "refusal": "no"}]
    chat = [{"role": "user", "content": parts}]
    flat = [{"role": "user", "content": "one\ntwo\nno"}]
    template = ChatTemplate({"default": TEMPLATES["chatml"]})
    assert template.render(chat) == template.render(flat)
    as_parts = ChatTemplate({"default": TEMPLATES["parts"]})
    assert "onetwono" in as_parts.render(chat)


@pytest.mark.parametrize(
    ("source", "wants"),
    [
        ("{% for p in messages[0]['content'] %}{{ p.text }}{% endfor %}", True),
        ("{% for p in messages[0].content | list %}{{ p.text }}{% endfor %}", True),
        ("{% set c = messages[0].content %}{% for p in c %}{{ p.text }}{% endfor %}", True),
        ("{% macro m(content) %}{% for p in content %}{{ p.text }}{% endfor %}{% endmacro %}{{ m(messages[0].content) }}", True),
        ("{{ messages[0].content }}{% for m in messages %}{% endfor %}", False),
    ],
)  # fmt: skip
def test_what_the_template_wants_is_seen_from_its_loops(source: str, wants: bool):
    chat = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert ChatTemplate({"default": source}).render(chat) == ("ab" if wants else "a\nb")


def test_continuing_a_message_of_parts():
    template = ChatTemplate({"default": TEMPLATES["parts"]})
    chat: list[dict[str, Any]] = [
        USER,
        {"role": "assistant", "content": [{"type": "text", "text": "So far"}]},
    ]
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    assert template.render(chat, **options).endswith("model\nSo far")
    assert template.render(chat, **options) == theirs(TEMPLATES["parts"], chat, options)


def test_developer_is_system_unless_the_template_knows_it():
    chat = [{"role": "developer", "content": "rules"}, USER]
    assert "<|im_start|>system\nrules" in ChatTemplate({"default": TEMPLATES["chatml"]}).render(chat)
    knows = "{% for m in messages if m.role == 'developer' %}D:{{ m.content }}{% endfor %}"
    assert ChatTemplate({"default": knows}).render(chat) == "D:rules"


def test_roles_of_the_templates_own():
    assert "ipython" in ChatTemplate({"default": TEMPLATES["headers"]}, SPECIAL).render(
        [USER, {"role": "ipython", "content": "42"}]
    )


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "at least one message"),
        ({}, "at least one message"),
        ("hello", "at least one message"),
        (["hello"], r"messages\[0\] must be an object"),
        ([{"content": "x"}], r"messages\[0\] has no role"),
        ([{"role": 3, "content": "x"}], "has no role"),
        ([USER, {"role": "wizard", "content": "x"}], r"messages\[1\] has the unknown role 'wizard'; known are system"),
        ([{"role": "user"}], "has no content"),
        ([{"role": "user", "content": None}], "has no content"),
        ([{"role": "user", "content": 3}], "neither text nor a list"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], r"content\[0\] of type 'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\] without text"),
        ([{"role": "user", "content": [7]}], "of type 'None'"),
        ([{"role": "user", "content": [{"type": ["text"]}]}], "takes text only"),
        ([{"role": "assistant", "tool_calls": "x"}], "tool_calls"),
        ([{"role": "assistant", "tool_calls": ["x"]}], "tool call that is not an object"),
        ([{"role": "user", "content": "half \ud800"}], "surrogate"),
    ],
)  # fmt: skip
def test_wrong_messages_are_named(messages: Any, says: str):
    template = ChatTemplate({"default": TEMPLATES["chatml"]})
    with pytest.raises(InvalidRequest, match=says) as caught:
        template.render(messages)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"continue_final_message": True}, "continue_final_message"),  # and add_generation_prompt
        ({"kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"tools": ["x"]}, "tools"),
        ({"tools": "x"}, "tools"),
        ({"documents": [3]}, "documents"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], param: str):
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate({"default": TEMPLATES["chatml"]}).render([USER], **options)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("source", "chat"),
    [
        ("{{ messages[0].role }}", [USER]),  # never reads content
        ("{{ messages[0].content | upper }}", [USER, ANSWER]),  # shows another message only
        ("{{ messages[0].content }}", [{"role": "assistant", "tool_calls": [CALL]}]),
        ("{% for p in messages[0].content %}{{ p.text }}{% endfor %}", [{"role": "user", "content": []}]),
    ],
)
def test_what_cannot_be_continued(source: str, chat: list[dict[str, Any]]):
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate({"default": source}).render(
            chat, add_generation_prompt=False, continue_final_message=True
        )
    assert caught.value.param == "continue_final_message"


def test_the_tool_template_is_taken_with_tools():
    template = ChatTemplate(
        {"default": "plain", "tool_use": "{{ tools | length }} tools", "rag": "{% broken"}
    )
    assert template.render([USER]) == "plain"
    assert template.render([USER], tools=[TOOL]) == "1 tools"


def test_of_a_tokenizer():
    tokenizer = Tokenizer(trained.backend("byte-level"), {"eos_token": "E"}, {"default": "{{ eos_token }}"})
    assert ChatTemplate.of(tokenizer).render([USER]) == "E"
    assert ChatTemplate.of(tokenizer, "own {{ eos_token }}").render([USER]) == "own E"


@pytest.mark.parametrize(
    "templates", [{}, {"tool_use": "x"}, {"default": "{% if %}"}, {"default": "{{ x | nofilter }}"}]
)
def test_bad_templates_fail_at_start(templates: dict[str, str]):
    with pytest.raises(ConfigError, match="chat template"):
        ChatTemplate(templates)


POISON = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loop over a text": "{% for i in range(999) %}{% for c in 'x' * 9999 %}{% endfor %}{% endfor %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "call block": "{% macro f() %}{{ caller() }}{% endmacro %}"
    "{% macro g(n) %}{% if n %}{% call f() %}{{ g(n - 1) }}{{ g(n - 1) }}{% endcall %}{% endif %}{% endmacro %}{{ g(99) }}",
    "repetition": "{{ 'a' * 10**10 }}",
    "turned round": "{{ 10**10 * 'a' }}",
    "a list": "{{ ([1] * 10**9) | length }}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "big base": "{{ (2 ** 60) ** 60 }}",
    "width": "{{ '%09999999999d' % 3 }}",
    "star width": "{{ '%*d' % (10**9, 3) }}",
    "format filter": "{{ '%9999999999s' | format('a') }}",
    "format method": "{{ '{:9999999999}'.format(1) }}",
    "format map": "{{ '{a:9999999999}'.format_map({'a': 1}) }}",
    "format width from a value": "{{ '{a:{w}}'.format_map({'a': 1, 'w': 10**9}) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "center": "{{ 'a' | center(10**10) }}",
    "indent": "{{ ('a\n' * 99999) | indent(99999) }}",
    "replace": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "replace method": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "join": "{{ range(99999) | list | join('b' * 99999) }}",
    "doubling": "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "adding": "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "output": "{% set s = 'a' * 10**7 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    "lipsum": "{{ lipsum(n=10**6) }}",
    "escape": "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "escape by format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "escape by attr": "{{ (messages | attr('__class__')).mro() }}",
    "namespace": "{{ namespace(__class__=1) }}",
    "namespace item": "{% set n = namespace() %}{% set n.__x = 1 %}",
    "mutation": "{{ messages.append(1) }}",
    "wrong type": "{{ 1 + messages[0].content }}",
    "division": "{{ 1 // 0 }}",
    "undefined": "{{ nothing.here }}",
    "import": "{% import 'os' as os %}",
}


@pytest.mark.parametrize("name", POISON)
def test_poison_is_refused_in_time(name: str):
    begin = time.thread_time()  # effort, not patience: the machine may be busy
    template = ChatTemplate({"default": POISON[name]})
    with pytest.raises(InvalidRequest) as caught:
        template.render([USER])
    assert caught.value.param == "messages"
    assert time.thread_time() - begin < 5.0


def test_what_templates_may_do():
    source = (
        "{{ '%s-%03d' % ('a', 7) }} {{ 'ab' * 3 }} {{ 3 * 4 }} {{ 2 ** 10 }} {{ 7 % 3 }} {{ 'x' | center(5) }}|"
        "{{ {'b': 1, 'a': [1, 'é']} | tojson }} {{ {'a': 1} | tojson(indent=2) }} {{ dict(a=1).a }} "
        "{{ dict.fromkeys(['k']) | length }} {{ ['a', 'b'] | join('-') }} {{ '{:>3}'.format(1) }} {{ 'a' ~ 1 ~ none }}"
        "{% set n = namespace(x=1, self=2) %}{% set n.x = n.x + 1 %} {{ n.x }}{{ n.self }} {{ 'aXa'.replace('X', 'yy') }}"
        "{{ '{\"a\": 12345, \"b\": {\"c\": 98765}} %99999' | replace('a', 'b') | indent(2) }}"
    )
    assert ChatTemplate({"default": source}).render([USER]) == theirs(source, [USER], {})


def test_rendering_a_thousand_messages_is_within_the_budget():
    chat = [USER if i % 2 == 0 else ANSWER for i in range(3000)]
    for name in ("chatml", "tools_and_thinking", "headers"):
        assert len(ChatTemplate({"default": TEMPLATES[name]}, SPECIAL).render(chat)) > 3000
