"""/v1/chat/completions: the conversation's forms, the limits, what is refused."""

import pytest

from tests.server.fake_engine import REPLY, byte_tokenizer
from tests.server.live import serving
from tests.server.sse import deltas, events
from xllm.server.options import ServerOptions

HELLO = [{"role": "user", "content": "Hello"}]


def ask(http, **body):
    return http.post("/v1/chat/completions", json={"messages": HELLO, "temperature": 0, **body})


def prompt_text(live):
    return byte_tokenizer().decode(live.fake.submitted[-1].prompt_token_ids, skip_special_tokens=False)


def test_messages_go_through_the_template(http, live):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three", "refusal": None, "tool_calls": None},
        {"role": "tool", "content": "4", "tool_call_id": "x"},
        {"role": "user", "content": "five", "name": "Ann"},
    ]
    assert ask(http, messages=messages).status_code == 200
    assert prompt_text(live) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne\ntwo<|im_end|>\n"
        "<|im_start|>assistant\nthree<|im_end|>\n<|im_start|>tool\n4<|im_end|>\n"
        "<|im_start|>user\nfive<|im_end|>\n<|im_start|>assistant\n"
    )


def test_continue_final_message(http, live):
    messages = [*HELLO, {"role": "assistant", "content": "Hi, I"}]
    assert ask(http, messages=messages, continue_final_message=True).status_code == 200
    assert prompt_text(live).endswith("assistant\nHi, I")
    assert ask(http, messages=messages, add_generation_prompt=False).status_code == 200
    assert prompt_text(live).endswith("Hi, I<|im_end|>\n")


def test_the_default_length_is_what_is_left_of_the_context(http, live):
    live.fake.reply = "x" * 2000
    usage = ask(http).json()["usage"]
    assert usage["total_tokens"] == 512
    assert live.fake.submitted[0].params.max_tokens is None


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_limit(http, name):
    answer = ask(http, **{name: 3}).json()
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


def test_cached_tokens_are_in_the_usage(http, live):
    live.fake.cached = 7
    assert ask(http).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 7


def test_streaming_roles_per_choice(http):
    chunks = events(ask(http, stream=True, n=2, temperature=1, seed=5, max_tokens=6))
    whole = ask(http, n=2, temperature=1, seed=5, max_tokens=6).json()
    for index in (0, 1):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in c["delta"] for c in mine[1:])
        assert "".join(deltas(chunks, index)) == whole["choices"][index]["message"]["content"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_streamed_logprobs_and_ids_equal_the_whole(http):
    body = {"logprobs": True, "top_logprobs": 2, "return_token_ids": True, "prompt_logprobs": None}
    whole = ask(http, **body).json()
    chunks = events(ask(http, **body, stream=True))
    choices = [c for chunk in chunks for c in chunk["choices"]]
    found = [entry for c in choices if c.get("logprobs") for entry in c["logprobs"]["content"]]
    assert found == whole["choices"][0]["logprobs"]["content"]
    assert [id for c in choices for id in c.get("token_ids", [])] == whole["choices"][0]["token_ids"]
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]


def test_tools_pass_where_they_are_not_to_be_called(http):
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert ask(http, tools=tools, tool_choice="none").status_code == 200
    assert ask(http, tools=[], tool_choice="auto", parallel_tool_calls=True).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
        ({"messages": None}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"functions": [{}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"verbosity": "low"}, "verbosity"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"echo": True}, "echo"),
    ],
)
def test_refused(http, live, body, param):
    response = ask(http, **body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert live.fake.submitted == []


def test_a_refusal_while_streaming_is_an_ordinary_error(http):
    response = ask(http, stream=True, messages=[{"role": "user", "content": "x" * 510}])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"
    assert ask(http, stream=True, temperature=9999).status_code == 400


def test_the_operators_template(tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}{{ extra }}")
    with serving(tmp_path, ServerOptions(chat_template=str(path))) as live:
        assert ask(live.http, chat_template_kwargs={"extra": "!"}).status_code == 200
        assert prompt_text(live) == "[Hello]!"


def test_a_requests_own_template_only_where_trusted(tmp_path):
    with serving(tmp_path, ServerOptions(trust_request_chat_template=True)) as live:
        assert ask(live.http, chat_template="<{{ messages[0]['content'] }}>").status_code == 200
        assert prompt_text(live) == "<Hello>"
        for poison in (
            "{% for i in range(10**9) %}x{% endfor %}",
            "{{ '" + "x" * 99 + "' * 10**9 }}",
            "{% if %}",
            "{{ 1/0 }}",
        ):
            assert ask(live.http, chat_template=poison).status_code == 400, poison


def test_a_model_without_a_template_cannot_chat(tmp_path):
    with serving(tmp_path, template=None) as live:
        response = ask(live.http)
        assert response.status_code == 400
        assert "no chat template" in response.json()["error"]["message"]
        assert live.http.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_the_models_sampling_defaults(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "max_new_tokens": 5}')
    with serving(tmp_path) as live:
        assert (
            live.http.post("/v1/chat/completions", json={"messages": HELLO}).json()["usage"][
                "completion_tokens"
            ]
            == 5
        )
        params = live.fake.submitted[-1].params
        assert (params.temperature, params.top_k, params.max_tokens) == (0.6, 20, 5)
        ask(live.http, max_tokens=7, temperature=0.5)
        assert (live.fake.submitted[-1].params.temperature, live.fake.submitted[-1].params.max_tokens) == (
            0.5,
            7,
        )
        long = [{"role": "user", "content": "x" * 470}]
        assert ask(live.http, messages=long).status_code == 200  # the default gives way to the context


def test_whole_reply(http):
    assert ask(http).json()["choices"][0]["message"] == {
        "content": REPLY,
        "role": "assistant",
        "refusal": None,
    }
