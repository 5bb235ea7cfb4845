"""The unmodified `openai` client, sync, async and streaming, and its own exception types."""

from typing import Any

import openai
import pytest

from tests.server.fake_engine import REPLY
from tests.server.live import serving
from xllm.server.options import ServerOptions

MESSAGES: Any = [{"role": "user", "content": "Where are you?"}]


@pytest.fixture
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat(client):
    answer = client.chat.completions.create(model="fake", messages=MESSAGES, temperature=0)
    assert answer.choices[0].message.content == REPLY
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage.completion_tokens == len(REPLY.encode()) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_streaming_with_usage(client):
    stream = client.chat.completions.create(
        model="fake", messages=MESSAGES, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == REPLY
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(REPLY.encode()) + 1
    assert all(c.usage is None for c in chunks[:-1])


def test_completion_and_its_default_length(client):
    answer = client.completions.create(model="fake", prompt="Where?", temperature=0)
    assert answer.choices[0].text == REPLY.encode()[:16].decode(errors="replace")
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion"
    assert answer.usage.completion_tokens == 16


def test_completion_streaming(client):
    stream = client.completions.create(
        model="fake", prompt="Where?", temperature=0, max_tokens=100, stream=True
    )
    assert "".join(c.choices[0].text for c in stream) == REPLY


def test_a_message_that_came_back_may_be_sent_again(client):
    first = client.chat.completions.create(model="fake", messages=MESSAGES, temperature=0).choices[0].message
    again = [
        *MESSAGES,
        first.model_dump(),
        {"role": "user", "content": [{"type": "text", "text": "Really?"}]},
    ]
    assert (
        client.chat.completions.create(model="fake", messages=again, temperature=0).choices[0].message.content
        == REPLY
    )


def test_n_and_seed(client):
    def texts(seed):
        answer = client.chat.completions.create(model="fake", messages=MESSAGES, n=3, seed=seed, max_tokens=8)
        assert [c.index for c in answer.choices] == [0, 1, 2]
        return [c.message.content for c in answer.choices]

    assert texts(7) == texts(7)
    assert texts(7) != texts(8)
    assert len(set(texts(7))) == 3


def test_stop(client):
    answer = client.chat.completions.create(
        model="fake", messages=MESSAGES, temperature=0, stop=["京", "That"]
    )
    assert answer.choices[0].message.content == "Grüße aus 東"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].model_extra["stop_reason"] == "京"


def test_chat_logprobs(client):
    answer = client.chat.completions.create(
        model="fake", messages=MESSAGES, temperature=0, logprobs=True, top_logprobs=3, max_tokens=3
    )
    content = answer.choices[0].logprobs.content
    assert [entry.token for entry in content] == ["G", "r", "\ufffd"]
    assert content[2].bytes == [0xC3]
    assert [len(entry.top_logprobs) for entry in content] == [3, 3, 3]
    assert content[0].logprob == content[0].top_logprobs[0].logprob == -0.25
    assert content[0].top_logprobs[2].logprob == -9999.0  # JSON has no minus infinity


def test_completion_logprobs_with_echo(client):
    answer = client.completions.create(
        model="fake", prompt="Hi", temperature=0, logprobs=2, max_tokens=2, echo=True
    )
    choice = answer.choices[0]
    assert choice.text == "HiGr"
    assert choice.logprobs.tokens == ["H", "i", "G", "r"]
    assert choice.logprobs.token_logprobs == [None, -0.25, -0.25, -0.25]
    assert choice.logprobs.text_offset == [0, 1, 2, 3]
    assert choice.logprobs.top_logprobs[0] is None
    assert choice.logprobs.top_logprobs[2]["G"] == -0.25


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("fake", "model", "xllm")
    assert model.model_extra["max_model_len"] == 512
    assert client.models.retrieve("fake").id == "fake"


def test_bad_request_names_the_field(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="fake", messages=MESSAGES, temperature=-1)
    assert refused.value.param == "temperature"
    assert refused.value.type == "invalid_request_error"


def test_unknown_model(client):
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_too_long_a_prompt(client):
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512") as refused:
        client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "x" * 600}])
    assert refused.value.code == "context_length_exceeded"
    assert refused.value.param == "messages"


def test_an_error_in_the_middle_of_a_stream(client, live):
    live.fake.fail_after = 5
    stream = client.chat.completions.create(model="fake", messages=MESSAGES, temperature=0, stream=True)
    with pytest.raises(openai.APIError, match="a step failed"):
        list(stream)


def test_an_engine_error_without_streaming(client, live):
    live.fake.fail_after = 5
    with pytest.raises(openai.InternalServerError, match="a step failed") as failed:
        client.chat.completions.create(model="fake", messages=MESSAGES)
    assert failed.value.type == "engine_error"


def test_wrong_key(tmp_path):
    with serving(tmp_path, ServerOptions(api_key=("secret", "other"))) as live:
        with (
            openai.OpenAI(base_url=f"{live.url}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError) as refused,
        ):
            client.models.list()
        assert refused.value.code == "invalid_api_key"
        for key in ("secret", "other"):
            with openai.OpenAI(base_url=f"{live.url}/v1", api_key=key) as client:
                assert client.models.list().data


async def test_async(live):
    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
        answer = await client.chat.completions.create(model="fake", messages=MESSAGES, temperature=0)
        assert answer.choices[0].message.content == REPLY
        stream: Any = await client.chat.completions.create(
            model="fake", messages=MESSAGES, temperature=0, stream=True
        )
        assert "".join([c.choices[0].delta.content or "" async for c in stream]) == REPLY
