import gc

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import checkpoints
from xllm import LLM, BeamSearchParams, SamplingParams
from xllm.core.errors import ConfigError, InvalidRequest
from xllm.engine.llm import _progress

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.save_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def llm(model):
    with LLM(str(model), dtype="float32", block_size=8, threads=1) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(model):
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def test_results_come_in_input_order_with_their_prompts(llm):
    prompts = ["the cat", {"prompt": "and the hat"}, {"prompt_token_ids": [4, 5, 6]}, [7, 8]]
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (9, 3, 5, 1)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [len(out.outputs[0].token_ids) for out in outputs] == [9, 3, 5, 1]
    assert [out.prompt for out in outputs] == ["the cat", "and the hat", None, None]
    assert outputs[2].prompt_token_ids == [4, 5, 6]
    for out in outputs:
        assert out.finished
        assert out.outputs[0].text == llm.tokenizer.decode(out.outputs[0].token_ids)
        assert out.metrics.first_token >= out.metrics.arrival


def test_one_prompt_is_a_batch_of_one(llm):
    assert (
        llm.generate("the cat", GREEDY, use_tqdm=False)[0].outputs
        == llm.generate(["the cat"], GREEDY, use_tqdm=False)[0].outputs
    )


def test_chat_goes_through_the_template(llm):
    messages = [{"role": "user", "content": "read the text"}]
    (out,) = llm.chat(messages, GREEDY, use_tqdm=False)
    assert out.prompt == "<|im_start|>user\nread the text<|im_end|>\n<|im_start|>assistant\n"
    assert llm.generate([out.prompt_token_ids], GREEDY, use_tqdm=False)[0].outputs == out.outputs
    assert len(llm.chat([messages, messages], GREEDY, use_tqdm=False)) == 2


def test_chat_answers_may_fill_the_context(llm):
    (out,) = llm.chat([{"role": "user", "content": "the cat"}], use_tqdm=False)
    assert len(out.outputs[0].token_ids) > 16 or out.outputs[0].finish_reason == "stop"
    assert out.outputs[0].finish_reason in ("stop", "length")


def test_n_gives_different_completions_and_seeds_repeat_them(llm):
    params = SamplingParams(n=4, temperature=1.0, seed=5, max_tokens=10, ignore_eos=True)
    first, again = (llm.generate("the cat", params, use_tqdm=False)[0] for _ in range(2))
    assert [c.index for c in first.outputs] == [0, 1, 2, 3]
    assert len({tuple(c.token_ids) for c in first.outputs}) == 4
    assert [c.token_ids for c in first.outputs] == [c.token_ids for c in again.outputs]


def test_a_seeded_request_does_not_see_its_neighbours(llm):
    params = SamplingParams(temperature=1.2, seed=3, max_tokens=20, ignore_eos=True, top_p=0.95)
    alone = llm.generate("one two", params, use_tqdm=False)[0].outputs[0].token_ids
    company = [SamplingParams(temperature=1.0, max_tokens=i + 1, top_k=i) for i in range(15)]
    crowd = llm.generate(["the hat"] * 15 + ["one two"], [*company, params], use_tqdm=False)[-1]
    assert crowd.outputs[0].token_ids == alone


def test_logprobs_are_those_of_transformers(llm, reference):
    prompt = llm.tokenizer.encode("the cat and the hat")
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    (out,) = llm.generate([prompt], params, use_tqdm=False)
    tokens = prompt + out.outputs[0].token_ids
    with torch.inference_mode():
        expected = torch.log_softmax(reference(torch.tensor([tokens])).logits[0].float(), -1)
    for i, entry in enumerate(out.outputs[0].logprobs):
        row = expected[len(prompt) + i - 1]
        assert {id: e.logprob for id, e in entry.items()} == pytest.approx(
            {id: row[id].item() for id in entry}, abs=1e-4
        )
        assert set(row.topk(3).indices.tolist()) <= set(entry)
    assert out.prompt_logprobs[0] is None
    assert len(out.prompt_logprobs) == len(prompt)
    for i, entry in enumerate(out.prompt_logprobs[1:], start=1):
        assert entry[prompt[i]].logprob == pytest.approx(expected[i - 1][prompt[i]].item(), abs=1e-4)
    assert out.outputs[0].cumulative_logprob == pytest.approx(
        sum(expected[len(prompt) + i - 1][t].item() for i, t in enumerate(out.outputs[0].token_ids)), abs=1e-3
    )


def test_a_stop_string_across_tokens_cuts_text_and_tokens(llm):
    (free,) = llm.generate(
        "the cat", SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True), use_tqdm=False
    )
    text = free.outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    (out,) = llm.generate(
        "the cat", SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, stop=stop), use_tqdm=False
    )
    assert out.outputs[0].text == text[: text.index(stop)]
    assert (out.outputs[0].finish_reason, out.outputs[0].stop_reason) == ("stop", stop)
    assert len(out.outputs[0].token_ids) < 30


@pytest.mark.parametrize(("width", "penalty"), [(1, 1.0), (3, 1.0), (4, 0.0), (5, 1.4)])
def test_beam_search_is_that_of_transformers(llm, reference, width, penalty):
    prompts = [llm.tokenizer.encode(text) for text in ("the cat", "one two three")]
    found = llm.beam_search(
        prompts, BeamSearchParams(beam_width=width, max_tokens=12, length_penalty=penalty)
    )
    for prompt, output in zip(prompts, found, strict=True):
        with torch.inference_mode():
            theirs = reference.generate(
                torch.tensor([prompt]), num_beams=width, num_return_sequences=width, max_new_tokens=12, do_sample=False,
                length_penalty=penalty, early_stopping=False, eos_token_id=2, pad_token_id=0,
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            )  # fmt: skip
        expected = [[t for t in row.tolist()[len(prompt) :] if t != 0] for row in theirs]
        assert [beam.token_ids[len(prompt) :] for beam in output.sequences] == expected


def test_shared_prefixes_are_found(llm):
    llm.reset_prefix_cache()
    prompt = list(range(3, 50))
    llm.generate([prompt], GREEDY, use_tqdm=False)
    assert llm.generate([prompt], GREEDY, use_tqdm=False)[0].num_cached_tokens == 40


@pytest.mark.parametrize(
    ("prompt", "params"),
    [
        ([[]], GREEDY),
        ([9999], GREEDY),
        ("x", SamplingParams(allowed_token_ids=[9999])),
        ("x", SamplingParams(max_tokens=100000)),
        ("x", [GREEDY, GREEDY]),
    ],
)
def test_what_is_wrong_is_refused_before_anything_runs(llm, prompt, params):
    with pytest.raises(InvalidRequest):
        llm.generate(prompt, params, use_tqdm=False)


def test_the_requests_of_one_call_reach_the_engine_at_once(llm, monkeypatch):
    """They came one by one: which of them shared steps, and who was preempted, hung on how fast a process read."""
    sent = []
    send = llm._client.send

    def record(message):
        sent.append(message)
        send(message)

    monkeypatch.setattr(llm._client, "send", record)
    llm.generate(
        ["a", "b"], [SamplingParams(max_tokens=2), SamplingParams(max_tokens=2, n=2)], use_tqdm=False
    )
    (message,) = sent
    assert [len(one.prompt_token_ids) > 0 for one in message.requests] == [True] * 3


def test_a_bar_shows_requests_and_tokens(llm, monkeypatch, capsys):
    counted = []
    count = _progress.count

    def record(bar, news, *, finished):
        count(bar, news, finished=finished)
        counted.append(bar._tokens)

    monkeypatch.setattr(_progress, "count", record)
    several = SamplingParams(n=2, temperature=1.0, max_tokens=3, ignore_eos=True)
    llm.generate(["a", "b"], [GREEDY, several], use_tqdm=True)
    shown = capsys.readouterr().err
    assert "Processed prompts" in shown and "2/2" in shown and "tok/s" in shown
    assert counted[-1] == 8 + 2 * 3


def test_a_call_lets_the_collector_walk_its_own_news_only(llm, monkeypatch):
    receive, frozen = llm._client.receive, []

    def counted(timeout_s):
        frozen.append(gc.get_freeze_count())
        return receive(timeout_s)

    monkeypatch.setattr(llm._client, "receive", counted)
    llm.generate("x", GREEDY, use_tqdm=False)
    assert min(frozen) > 1000
    assert gc.get_freeze_count() == 0, "what the caller holds is his again"


def test_no_prompts_no_results(llm):
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_an_unknown_option_is_refused(model):
    with pytest.raises(TypeError, match="no_such_option"):
        LLM(str(model), no_such_option=1)


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError):
        LLM(str(tmp_path))


def test_broken_overrides_are_refused(model):
    with pytest.raises(ConfigError, match="not JSON"):
        LLM(str(model), hf_overrides="{")
    with pytest.raises(ConfigError, match="object"):
        LLM(str(model), hf_overrides="[]")


def test_dummy_weights_come_from_the_config_alone(model, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    tokens = []
    for seed in (1, 1, 2):
        with LLM(str(tmp_path), load_format="dummy", seed=seed, threads=1) as llm:
            tokens.append(llm.generate("the cat", GREEDY, use_tqdm=False)[0].outputs[0].token_ids)
    assert tokens[0] == tokens[1]


def test_without_a_tokenizer_ids_go_in_and_out(model, llm):
    greedy = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    with LLM(str(model), skip_tokenizer_init=True, threads=1, dtype="float32") as bare:
        (out,) = bare.generate({"prompt_token_ids": [5, 6, 7]}, greedy, use_tqdm=False)
        assert out.outputs[0].text == ""
        (same,) = llm.generate({"prompt_token_ids": [5, 6, 7]}, greedy, use_tqdm=False)
        assert out.outputs[0].token_ids == same.outputs[0].token_ids
        for refused in (
            lambda: bare.generate("text", use_tqdm=False),
            lambda: bare.chat([{"role": "user", "content": "x"}], use_tqdm=False),
            lambda: bare.beam_search([[5]], BeamSearchParams(beam_width=2, max_tokens=2)),
        ):
            with pytest.raises(
                InvalidRequest, match="needs a tokenizer, and this engine was started without"
            ):
                refused()
