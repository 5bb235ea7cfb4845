"""/v1/completions: every shape of prompt, every extension, what is refused."""

import pytest

from tests.server.fake_engine import REPLY
from tests.server.sse import events


def ask(http, **body):
    return http.post("/v1/completions", json={"prompt": "Hi", "temperature": 0, "max_tokens": 4, **body})


def texts(response):
    assert response.status_code == 200, response.text
    return [choice["text"] for choice in response.json()["choices"]]


@pytest.mark.parametrize(
    ("prompt", "count", "tokens"),
    [("Hi", 1, 2), ([75, 108], 1, 2), (["Hi", "Hello"], 2, 7), ([[75], [108, 109]], 2, 3)],
)
def test_the_four_shapes_of_a_prompt(http, prompt, count, tokens):
    answer = ask(http, prompt=prompt).json()
    assert [c["index"] for c in answer["choices"]] == list(range(count))
    assert answer["usage"]["prompt_tokens"] == tokens
    assert answer["usage"]["completion_tokens"] == 4 * count


def test_several_prompts_times_n(http):
    answer = ask(http, prompt=["a", "b"], n=2, temperature=1, seed=3, echo=True).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert [c["text"][0] for c in answer["choices"]] == ["a", "a", "b", "b"]
    assert answer["usage"]["prompt_tokens"] == 2  # a prompt counts once, whatever n


def test_echo_of_token_ids_and_of_a_cut_prompt(http):
    ids = http.post("/tokenize", json={"prompt": "abcd"}).json()["tokens"]
    assert texts(ask(http, prompt=ids, echo=True)) == ["abcdGr\u00fc"]
    assert texts(ask(http, prompt="abcd", echo=True, truncate_prompt_tokens=2)) == ["cdGr\u00fc"]


def test_scoring_a_prompt_without_generating(http):
    answer = ask(http, prompt="abc", echo=True, logprobs=1, max_tokens=0).json()
    choice = answer["choices"][0]
    assert choice["text"] == "abc"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.25, -0.25]
    assert answer["usage"]["completion_tokens"] == 0


def test_logprobs_zero_has_no_alternatives(http):
    logprobs = ask(http, logprobs=0).json()["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [-0.25] * 4
    assert logprobs["top_logprobs"] is None


def test_prompt_logprobs(http):
    choice = ask(http, prompt="abc", prompt_logprobs=2).json()["choices"][0]
    first, second, _ = choice["prompt_logprobs"]
    assert first is None
    assert len(second) == 2
    assert all(set(entry) == {"logprob", "rank", "decoded_token"} for entry in second.values())


def test_return_token_ids(http):
    choice = ask(http, return_token_ids=True).json()["choices"][0]
    assert len(choice["token_ids"]) == 4
    assert len(choice["prompt_token_ids"]) == 2
    plain = ask(http).json()["choices"][0]
    assert "token_ids" not in plain


def test_the_default_length_gives_way_to_the_context(http):
    answer = http.post("/v1/completions", json={"prompt": "x" * 506, "temperature": 0})
    assert answer.json()["usage"]["completion_tokens"] == 6


def test_extensions_reach_the_engine(http, live):
    given = {
        "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": -0.5,
        "stop_token_ids": [9], "ignore_eos": True, "min_tokens": 2, "skip_special_tokens": False, "seed": 11,
        "logit_bias": {"7": 2.5}, "allowed_token_ids": [1, 2], "include_stop_str_in_output": True, "top_p": 0.5,
        "temperature": 0.7,
    }  # fmt: skip
    assert ask(http, **given, bad_words=["no"], cache_salt="tenant").status_code == 200
    (submit,) = live.fake.submitted
    for name, value in given.items():
        expected = {7: 2.5} if name == "logit_bias" else value
        assert getattr(submit.params, name) == expected, name
    assert submit.params.bad_words_token_ids
    assert submit.cache_salt == "tenant"


def test_nothing_given_means_the_defaults(http, live):
    assert (
        http.post("/v1/completions", json={"prompt": "Hi", "temperature": None, "n": None}).status_code == 200
    )
    params = live.fake.submitted[0].params
    assert (params.temperature, params.top_p, params.max_tokens, params.logprobs) == (1.0, 1.0, 16, None)


def test_harmless_fields_pass(http):
    harmless = {
        "user": "me", "metadata": {"a": 1}, "store": False, "service_tier": "auto", "suffix": None, "best_of": 1,
        "response_format": {"type": "text"}, "prompt_cache_key": "k", "safety_identifier": "s", "stream": False,
    }  # fmt: skip
    assert ask(http, **harmless).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"n": 2}, "n"),  # greedy copies
        ({"n": 10**30}, "n"),
        ({"n": 1000, "temperature": 1}, "n"),
        ({"prompt": ["a"] * 600, "n": 2, "temperature": 1}, "n"),
        ({"prompt": ["a"] * 1025}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, [2]]}, "prompt"),
        ({"prompt": [259]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**25]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "x" * 512}, "prompt"),
        ({"prompt": "x" * 100_000}, "prompt"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1000}, "max_tokens"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop_token_ids": [9999]}, "stop_token_ids"),
        ({"logit_bias": {"9999": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 1e308}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1e308}, "top_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 2**65}, "seed"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"store": True}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usge": True}}, "stream_options.include_usge"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 512}, "truncate_prompt_tokens"),
        ({"priority": 1}, "priority"),
        ({"deadline_s": 1.0}, "deadline_s"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
        ({"guided_json": {}}, "guided_json"),
        ({"frequency_penality": 1}, "frequency_penality"),
    ],
)  # fmt: skip
def test_refused(http, live, body, param):
    response = ask(http, **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 500
    assert live.fake.submitted == []


@pytest.mark.parametrize(("order", "field"), [("priority", "priority"), ("deadline", "deadline_s")])
def test_order_fields_pass_where_the_order_uses_them(tmp_path, order, field):
    from tests.server.live import serving

    with serving(tmp_path, order=order) as live:
        assert ask(live.http, **{field: 3}).status_code == 200
        assert getattr(live.fake.submitted[0], field) == 3
        assert ask(live.http, **{field: float(2**40) if field == "deadline_s" else 2**40}).status_code == 400


def test_streamed_echo_with_logprobs_equals_the_whole(http):
    body = {"prompt": ["ab", "cd"], "echo": True, "logprobs": 1, "max_tokens": 50}
    whole = ask(http, **body).json()["choices"]
    chunks = events(ask(http, **body, stream=True))
    for choice in whole:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            assert [x for c in mine for x in c["logprobs"][name]] == choice["logprobs"][name]
        assert mine[-1]["finish_reason"] == choice["finish_reason"] == "stop"


def test_streamed_token_ids_and_continuous_usage(http):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(ask(http, max_tokens=50, stream=True, return_token_ids=True, stream_options=options))
    ids = [id for chunk in chunks for c in chunk["choices"] for id in c["token_ids"]]
    assert (
        bytes(http.post("/detokenize", json={"tokens": ids[:-1]}).json()["prompt"], "utf-8").decode() == REPLY
    )
    assert chunks[0]["choices"][0]["prompt_token_ids"]
    assert "prompt_token_ids" not in chunks[1]["choices"][0]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == len(ids)
