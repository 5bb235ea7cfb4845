"""What users see of a request: streamed deltas and the whole, stop strings, log-probabilities, ends and faults."""

import itertools
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.text import trained
from xllm.core.errors import InvalidRequest
from xllm.core.output import CompletionOutput, Finish, Logprob, RequestOutput, SequenceOutput
from xllm.core.plan import TokenLogprobs
from xllm.core.sampling import SamplingParams
from xllm.engine.outputs import Collector, OutputProcessor, collect
from xllm.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(trained.backend("byte-level"))
LLAMA = Tokenizer(trained.backend("metaspace"))
END = TOKENIZER.encode("<|im_end|>")[0]
PROMPT = TOKENIZER.encode("The prompt")


def make(tokenizer: Tokenizer | None = TOKENIZER) -> OutputProcessor:
    return OutputProcessor(tokenizer, clock=itertools.count(100).__next__)


def add(outputs: OutputProcessor, id: str = "r", **params: Any) -> list[tuple[str, SamplingParams]]:
    return outputs.add(id, "The prompt", PROMPT, SamplingParams(**{"max_tokens": 64, **params}), arrival=1.0)


def news(child: str, ids: Sequence[int] = (), finish: Finish | None = None, **fields: Any) -> SequenceOutput:
    return SequenceOutput(request_id=child, token_ids=list(ids), finish=finish, **fields)


def one_by_one(child: str, ids: Sequence[int], finish: Finish, **fields: Any) -> list[SequenceOutput]:
    steps = [news(child, [id]) for id in ids[:-1]]
    return [*steps, news(child, ids[-1:], finish, **fields)]


def run(outputs: OutputProcessor, steps: Iterable[SequenceOutput]) -> tuple[list[RequestOutput], list[str]]:
    """One `process` call per step."""
    deltas, aborts = [], []
    for step in steps:
        more, ended = outputs.process([step])
        deltas += more
        aborts += ended
    return deltas, aborts


def completion(text: str, **params: Any) -> CompletionOutput:
    """The only completion of a request whose engine side puts out `text` to the end."""
    outputs = make()
    add(outputs, **params)
    return collect(run(outputs, one_by_one("r/0", TOKENIZER.encode(text), Finish.LENGTH))[0]).outputs[0]


# ---- streaming and the whole


texts = st.text("ab \n好😀é\u0301", max_size=30)
stop_lists = st.lists(st.text("ab 好", min_size=1, max_size=4), max_size=3)


@given(
    texts=st.lists(texts, min_size=1, max_size=3), stop=stop_lists, include=st.booleans(), min_tokens=st.integers(0, 5),
    cuts=st.lists(st.integers(0, 40), max_size=8), batches=st.lists(st.integers(0, 60), max_size=20),
    finish=st.sampled_from([Finish.STOP, Finish.LENGTH, Finish.ABORT]), order=st.randoms(use_true_random=False),
)  # fmt: skip
def test_streaming_is_not_streaming_over_every_chunking(
    texts: list[str], stop: list[str], include: bool, min_tokens: int, cuts: list[int], batches: list[int],
    finish: Finish, order: Any,
):  # fmt: skip
    params: dict[str, Any] = {
        "n": len(texts), "stop": stop, "include_stop_str_in_output": include, "min_tokens": min_tokens, "logprobs": 0,
    }  # fmt: skip
    ids = [[*TOKENIZER.encode(text), END] for text in texts]

    def steps_of(index: int, cuts: list[int]) -> list[SequenceOutput]:
        borders = sorted({0, *(c for c in cuts if c < len(ids[index])), len(ids[index])})
        made = []
        for a, b in itertools.pairwise(borders):
            part = ids[index][a:b]
            last = finish if b == len(ids[index]) else None
            scores = [TokenLogprobs([id], [-0.5], 1) for id in part]
            made.append(news(f"r/{index}", part, last, logprobs=scores))
        return made

    def result(steps: list[SequenceOutput], borders: list[int]) -> tuple[RequestOutput, list[RequestOutput]]:
        outputs = make()
        add(outputs, **params)
        deltas: list[RequestOutput] = []
        for a, b in itertools.pairwise(sorted({0, *(c for c in borders if c < len(steps)), len(steps)})):
            deltas += outputs.process(steps[a:b])[0]
        assert len(outputs) == 0
        return collect(deltas), deltas

    token_by_token = [step for index in range(len(texts)) for step in steps_of(index, list(range(99)))]
    whole, _ = result(token_by_token, list(range(999)))
    queues = [steps_of(index, cuts) for index in range(len(texts))]
    shuffled = [
        queues[i].pop(0)
        for i in order.sample([i for i, q in enumerate(queues) for _ in q], sum(map(len, queues)))
    ]
    streamed, deltas = result(shuffled, batches)
    assert streamed.outputs == whole.outputs
    assert [c.index for c in whole.outputs] == list(range(len(texts)))
    assert sum(d.finished for d in deltas) == 1 and deltas[-1].finished
    for index, given_text in enumerate(texts):
        ends = [c for d in deltas for c in d.outputs if c.index == index and c.finished]
        assert len(ends) == 1
        assert whole.outputs[index].text == "".join(
            c.text for d in deltas for c in d.outputs if c.index == index
        )
        assert_stops_rightly(whole.outputs[index], given_text, ids[index], stop, include, min_tokens, finish)


def assert_stops_rightly(
    got: CompletionOutput,
    text: str,
    ids: list[int],
    stop: list[str],
    include: bool,
    min_tokens: int,
    finish: Finish,
) -> None:
    """By brute force: decode every beginning of the output, and look for the first that completes a stop string."""
    shows_end = finish is not Finish.STOP or include
    armed_from = len(TOKENIZER.decode(ids[:min_tokens]).removesuffix("\ufffd")) if min_tokens else 0
    whole = TOKENIZER.decode(ids if shows_end else ids[:-1])
    for end in range(armed_from + 1, len(whole) + 1):
        found = [s for s in stop if whole[:end].endswith(s)]
        if found:
            matched = max(found, key=len)
            assert (got.finish_reason, got.stop_reason) == ("stop", matched)
            assert got.text == (whole[:end] if include else whole[: end - len(matched)])
            count = next(n for n in range(len(ids) + 1) if len(visible(ids[:n])) >= end)
            assert got.token_ids == ids[:count]
            break
    else:
        assert (got.finish_reason, got.stop_reason) == (finish.value, None)
        assert (got.text, got.token_ids) == (whole, ids)
    assert got.logprobs is not None and len(got.logprobs) == len(got.token_ids)
    assert got.cumulative_logprob == pytest.approx(-0.5 * len(got.token_ids))


def visible(ids: list[int]) -> str:
    """Whole characters only."""
    data = b"".join(TOKENIZER.token_bytes(id) for id in ids if id not in TOKENIZER.special_ids)
    return data.decode("utf-8", "ignore")


def test_a_delta_holds_only_what_is_new():
    outputs = make()
    add(outputs, n=2, temperature=1.0)
    a, b = TOKENIZER.encode("a")[0], TOKENIZER.encode("b")[0]
    [delta], _ = outputs.process([news("r/0", [a])])
    assert [(c.index, c.text, c.token_ids) for c in delta.outputs] == [(0, "a", [a])]
    assert (delta.finished, delta.prompt, delta.prompt_token_ids) == (False, "The prompt", PROMPT)
    [delta], _ = outputs.process([news("r/1", [b]), news("r/0", [b]), news("r/1", [a, a], Finish.LENGTH)])
    assert [(c.index, c.text, c.finish_reason) for c in delta.outputs] == [
        (1, "baa", "length"),
        (0, "b", None),
    ]
    assert not delta.finished
    [delta], _ = outputs.process([news("r/0", [END], Finish.STOP)])
    assert [(c.text, c.token_ids, c.finish_reason) for c in delta.outputs] == [("", [END], "stop")]
    assert delta.finished


def test_requests_of_one_step_have_a_delta_each():
    outputs = make()
    add(outputs, "r")
    add(outputs, "s")
    deltas, _ = outputs.process(
        [news("s/0", PROMPT), news("r/0", PROMPT), news("unknown/0", PROMPT), news("r/0")]
    )
    assert [d.request_id for d in deltas] == ["s", "r"]


def test_news_without_tokens_wait():
    outputs = make()
    add(outputs)
    assert outputs.process([news("r/0", num_cached_tokens=3)]) == ([], [])
    [delta], _ = outputs.process([news("r/0", PROMPT)])
    assert delta.num_cached_tokens == 3


# ---- ends


def test_stop_string_cuts_text_and_tokens_and_aborts():
    outputs = make()
    add(outputs, stop=["ox"])
    ids = TOKENIZER.encode("fox y")
    deltas, aborts = run(outputs, [news("r/0", [id]) for id in ids])
    got = collect(deltas).outputs[0]
    assert (got.text, got.finish_reason, got.stop_reason) == ("f", "stop", "ox")
    assert TOKENIZER.decode(got.token_ids) == "fox"
    assert aborts == ["r/0"]
    assert outputs.process([news("r/0", ids, Finish.ABORT)]) == ([], [])  # the engine's echo


def test_a_stop_string_in_the_last_step_needs_no_abort():
    outputs = make()
    add(outputs, stop=["fo"])
    deltas, aborts = outputs.process([news("r/0", TOKENIZER.encode("fox y"), Finish.LENGTH)])
    assert (deltas[0].outputs[0].stop_reason, aborts) == ("fo", [])
    assert deltas[0].finished


@pytest.mark.parametrize(("include", "text"), [(False, "a fox"), (True, "a fox and")])
def test_include_stop_string(include: bool, text: str):
    got = completion("a fox and more", stop=[" and"], include_stop_str_in_output=include)
    assert (got.text, got.stop_reason) == (text, " and")


def test_min_tokens_delay_stop_strings():
    ids = TOKENIZER.encode("a a a a")
    got = completion("a a a a", stop=["a"], min_tokens=len(ids) - 1)
    assert (got.text, got.stop_reason) == ("a a a ", "a")
    assert completion("a a a a", stop=["a"], min_tokens=len(ids)).finish_reason == "length"


def test_text_held_for_a_stop_string_comes_with_the_end():
    got = completion("one tw", stop=["two"])
    assert (got.text, got.finish_reason) == ("one tw", "length")


@pytest.mark.parametrize(
    ("params", "reason", "text"),
    [
        ({}, None, "hi"),
        ({"include_stop_str_in_output": True}, None, "hi"),  # special tokens are skipped all the same
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, None, "hi<|im_end|>"),
        ({"skip_special_tokens": False}, None, "hi"),
        ({"stop_token_ids": [END]}, END, "hi"),
    ],
)
def test_end_of_sequence_is_a_token_without_text(params: dict[str, Any], reason: int | None, text: str):
    outputs = make()
    add(outputs, **params)
    steps = one_by_one("r/0", [*TOKENIZER.encode("hi"), END], Finish.STOP, stop_reason=reason)
    got = collect(run(outputs, steps)[0]).outputs[0]
    assert (got.text, got.finish_reason, got.stop_reason) == (text, "stop", reason)
    assert got.token_ids[-1] == END


@pytest.mark.parametrize(("include", "text"), [(False, "hi "), (True, "hi dog")])
def test_an_ordinary_token_that_stops(include: bool, text: str):
    outputs = make()
    ids = TOKENIZER.encode("hi ")
    last = TOKENIZER.encode("dog")
    add(outputs, stop_token_ids=last, include_stop_str_in_output=include)
    deltas, _ = outputs.process([news("r/0", [*ids, *last], Finish.STOP, stop_reason=last[-1])])
    whole = TOKENIZER.decode([*ids, *last[:-1]]) if not include else text
    assert deltas[0].outputs[0].text == whole
    assert deltas[0].outputs[0].token_ids == [*ids, *last]


def test_a_character_cut_off_by_the_length_shows_as_one_replacement():
    ids = TOKENIZER.encode("a😀")
    outputs = make()
    add(outputs)
    deltas, _ = run(outputs, one_by_one("r/0", ids[:-1], Finish.LENGTH))
    assert collect(deltas).outputs[0].text == "a\ufffd"
    assert all("\ufffd" not in c.text for d in deltas[:-1] for c in d.outputs)


def test_the_text_goes_on_from_the_prompt():
    outputs = make(LLAMA)
    outputs.add("r", None, LLAMA.encode("over"), SamplingParams(), 0.0)
    deltas, _ = outputs.process([news("r/0", LLAMA.encode("the dog", False))])
    assert deltas[0].outputs[0].text == " the dog"
    assert deltas[0].prompt is None


def test_without_text():
    for tokenizer, detokenize in ((None, True), (TOKENIZER, False)):
        outputs = make(tokenizer)
        add(outputs, logprobs=1, detokenize=detokenize)
        scores = [TokenLogprobs([5, 6], [-1.0, -0.5], 2)]
        [delta], _ = outputs.process([news("r/0", [5], Finish.LENGTH, logprobs=scores)])
        assert (delta.outputs[0].text, delta.outputs[0].token_ids) == ("", [5])
        assert delta.outputs[0].logprobs is not None
        name = delta.outputs[0].logprobs[0][5].decoded_token
        assert name == (None if tokenizer is None else TOKENIZER.token_text(5))


# ---- children


def test_children_for_the_engine():
    children = add(make(), n=3, seed=7, temperature=0.5, prompt_logprobs=2, stop=["x"])
    assert [id for id, _ in children] == ["r/0", "r/1", "r/2"]
    params = [p for _, p in children]
    assert [p.n for p in params] == [1, 1, 1]
    assert params[0].seed == 7
    seeds = [p.seed for p in params]
    assert len(set(seeds)) == 3 and all(s is not None and 0 <= s < 2**64 for s in seeds)
    assert [p.prompt_logprobs for p in params] == [2, None, None]
    assert {p.temperature for p in params} == {0.5}
    assert [p.seed for _, p in add(make(), n=3, seed=7)] == seeds  # a pure function of the seed
    neighbours = [p.seed for _, p in add(make(), n=3, seed=8)]
    assert not set(seeds) & set(neighbours)
    assert [p.seed for _, p in add(make(), n=2)] == [None, None]


def test_bad_words_become_tokens_with_and_without_a_space():
    [(_, params)] = add(make(), bad_words=["dog", " fox"], bad_words_token_ids=[[1, 2]])
    assert params.bad_words is None
    assert params.bad_words_token_ids == [
        [1, 2], *(TOKENIZER.encode(word) for word in ("dog", " dog", "fox", " fox")),
    ]  # fmt: skip
    [(_, params)] = add(make(LLAMA), bad_words=["dog"])
    assert params.bad_words_token_ids is not None
    assert params.bad_words_token_ids[0] == LLAMA.encode("dog", False)
    [(_, params)] = add(make(), bad_words=["  "])
    assert params.bad_words_token_ids is not None
    assert TOKENIZER.encode("  ") in params.bad_words_token_ids
    [(_, params)] = add(make())
    assert params.bad_words_token_ids is None


@pytest.mark.parametrize(
    ("tokenizer", "params", "field"),
    [
        (None, {"stop": ["x"]}, "stop"),
        (TOKENIZER, {"stop": ["x"], "detokenize": False}, "stop"),
        (TOKENIZER, {"stop": ["x" * 100_000]}, "stop"),
        (None, {"bad_words": ["x"]}, "bad_words"),
        (TOKENIZER, {"bad_words": ["\ud800"]}, "bad_words"),
    ],
)
def test_what_cannot_be_is_refused_and_not_registered(
    tokenizer: Tokenizer | None, params: dict[str, Any], field: str
):
    outputs = make(tokenizer)
    with pytest.raises(InvalidRequest) as caught:
        add(outputs, n=2, **params)
    assert caught.value.param == field
    assert len(outputs) == 0 and outputs.child_ids() == []
    add(outputs)


def test_an_id_in_use_is_a_mistake_of_ours():
    outputs = make()
    add(outputs)
    with pytest.raises(ValueError, match="in use"):
        add(outputs)


# ---- log-probabilities


def test_logprobs_are_named_and_ranked():
    outputs = make()
    add(outputs, logprobs=2)
    a, b, c = (TOKENIZER.encode(letter)[0] for letter in "abc")
    half = TOKENIZER.encode("😀")[0]
    scores = [
        TokenLogprobs([a, b, c], [-3.0, -0.1, -2.0], 7),
        TokenLogprobs([b, b, half], [-0.2, -0.2, -1.5], 1),
    ]
    [delta], _ = outputs.process([news("r/0", [a, b], logprobs=scores)])
    got = delta.outputs[0]
    assert got.logprobs == [
        {a: Logprob(-3.0, 7, "a"), b: Logprob(-0.1, 1, "b"), c: Logprob(-2.0, 2, "c")},
        {b: Logprob(-0.2, 1, "b"), half: Logprob(-1.5, 2, "\ufffd")},
    ]
    assert got.cumulative_logprob == pytest.approx(-3.2)
    [delta], _ = outputs.process([news("r/0", [a], logprobs=scores[:1])])
    assert delta.outputs[0].cumulative_logprob == pytest.approx(-6.2)
    assert completion("x").cumulative_logprob is None
    assert completion("x").logprobs is None


def test_prompt_logprobs_come_once_with_the_first_token():
    outputs = make()
    add(outputs, n=2, prompt_logprobs=0)
    entries = [TokenLogprobs([id], [-1.0], 3) for id in PROMPT[1:]]
    assert outputs.process([news("r/0", prompt_logprobs=entries[:2])]) == ([], [])
    [early], _ = outputs.process([news("r/1", PROMPT[:1])])
    assert early.prompt_logprobs is None
    [delta], _ = outputs.process([news("r/0", PROMPT[:1], prompt_logprobs=entries[2:])])
    assert delta.prompt_logprobs == [
        None, *({id: Logprob(-1.0, 3, TOKENIZER.token_text(id))} for id in PROMPT[1:])
    ]  # fmt: skip
    [later], _ = outputs.process([news("r/0", PROMPT[:1])])
    assert later.prompt_logprobs is None
    assert collect([early, delta, later]).prompt_logprobs == delta.prompt_logprobs


# ---- ends from elsewhere, faults


def test_metrics():
    outputs = make()
    add(outputs, n=2)
    first = news("r/0", PROMPT[:1], queued_s=0.5, prefill_s=0.25, num_cached_tokens=4)
    [delta], _ = outputs.process([first, news("r/1", PROMPT[:1], queued_s=9.0, num_cached_tokens=99)])
    metrics = delta.metrics
    assert (metrics.arrival, metrics.first_token, metrics.finished) == (1.0, 100, None)
    assert (metrics.queued_s, metrics.prefill_s, delta.num_cached_tokens) == (0.5, 0.25, 4)
    done = [
        news("r/0", PROMPT, Finish.LENGTH, num_preemptions=2),
        news("r/1", PROMPT, Finish.LENGTH, num_preemptions=1),
    ]
    [last], _ = outputs.process(done)
    assert (last.metrics.finished, last.metrics.num_preemptions) == (101, 3)
    assert metrics.finished is None  # earlier deltas stay as they were
    assert collect([delta, last]).num_cached_tokens == 4


def test_an_abort_forgets_without_a_word():
    outputs = make()
    add(outputs, n=2)
    assert outputs.abort("r") == ["r/0", "r/1"]
    assert outputs.process([news("r/0", PROMPT, Finish.ABORT)]) == ([], [])
    assert (outputs.abort("r"), len(outputs), outputs.child_ids()) == ([], 0, [])


def test_a_cancel_ends_with_what_there_is():
    outputs = make()
    add(outputs, n=2, stop=["two"])
    outputs.process([news("r/0", TOKENIZER.encode("one tw")), news("r/1", PROMPT, Finish.LENGTH)])
    [delta], children = outputs.cancel("r")
    assert children == ["r/0"]
    assert [(c.index, c.text, c.finish_reason) for c in delta.outputs] == [(0, "tw", "abort")]
    assert delta.finished and delta.error is None
    assert outputs.cancel("r") == ([], [])


def test_the_engine_is_gone():
    outputs = make()
    add(outputs, "r", n=2)
    add(outputs, "s")
    assert outputs.child_ids() == ["r/0", "r/1", "s/0"]
    deltas = outputs.fail_all("gone")
    assert [(d.request_id, d.finished, d.error) for d in deltas] == [("r", True, "gone"), ("s", True, "gone")]
    assert [c.finish_reason for d in deltas for c in d.outputs] == ["error"] * 3
    assert outputs.fail_all("again") == []


def test_one_failed_completion_ends_its_request():
    outputs = make()
    add(outputs, n=3)
    [delta], aborts = outputs.process(
        [news("r/1", PROMPT[:1]), news("r/1", (), Finish.ERROR, error="no finite logits")]
    )
    assert [(c.index, c.finish_reason) for c in delta.outputs] == [(1, "error"), (0, "error"), (2, "error")]
    assert (delta.finished, delta.error, aborts) == (True, "no finite logits", ["r/0", "r/2"])
    assert outputs.process([news("r/0", PROMPT)]) == ([], [])


def test_a_refused_submission_has_a_reason():
    outputs = make()
    add(outputs)
    [delta], aborts = outputs.process([news("r/0", (), Finish.ERROR)])
    assert delta.finished and delta.error and aborts == []


@pytest.mark.parametrize("finish", [None, Finish.LENGTH])
def test_an_exception_ends_its_request_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, finish: Finish | None
):
    outputs = make()
    add(outputs, "r", n=2)
    add(outputs, "s")
    poisoned, secret = PROMPT[0], "text of the " + "user"
    honest = TOKENIZER.pieces.later

    def later(id: int) -> bytes:
        if id == poisoned:
            raise RuntimeError(secret)
        return honest(id)

    monkeypatch.setattr(TOKENIZER.pieces, "later", later)
    with caplog.at_level(logging.ERROR):
        deltas, aborts = outputs.process(
            [news("r/0", [poisoned], finish), news("s/0", [PROMPT[1]]), news("r/1", [PROMPT[1]])]
        )
    assert [(d.request_id, d.finished, d.error is None) for d in deltas] == [
        ("r", True, False),
        ("s", False, True),
    ]
    assert [c.finish_reason for c in deltas[0].outputs] == ["error", "error"]
    assert sorted(aborts) == (["r/0", "r/1"] if finish is None else ["r/1"])
    assert "RuntimeError" in caplog.text and secret not in caplog.text
    assert outputs.child_ids() == ["s/0"]


def test_an_exception_while_ending_still_ends(monkeypatch: pytest.MonkeyPatch):
    outputs = make()
    add(outputs)
    child = outputs._owners["r/0"].children["r/0"]
    monkeypatch.setattr(child, "end", lambda finish: 1 / 0)
    [delta] = outputs.fail_all("gone")
    assert delta.finished and delta.outputs[0].finish_reason == "error"


def test_a_collector_shares_nothing_with_the_deltas():
    outputs = make()
    add(outputs, logprobs=0)
    scores = [TokenLogprobs([PROMPT[0]], [-1.0], 1)]
    deltas = [outputs.process([news("r/0", PROMPT[:1], logprobs=scores)])[0][0] for _ in range(3)]
    collector = Collector()
    with pytest.raises(ValueError, match="nothing"):
        _ = collector.result
    for delta in deltas:
        collector.add(delta)
    assert all(
        len(c.token_ids) == 1 and c.logprobs and len(c.logprobs) == 1 for d in deltas for c in d.outputs
    )
    assert collector.result.outputs[0].token_ids == PROMPT[:1] * 3
