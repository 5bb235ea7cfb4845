"""A request that another engine began: this one goes on with the same tokens, log-probabilities and end.

Whole runs are cut at every token, and what came up to there is given to a fresh engine of each backend.
"""

import random
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import checkpoints
from tests.engine.bare import Heard, open_engine
from tests.engine.scripted import VOCAB, ends_of, expected, make_core, run_until_idle, submit
from xllm.core.output import Finish, SequenceOutput
from xllm.core.sampling import SamplingParams
from xllm.core.seeds import SeedSource
from xllm.wire.messages import Submit

LENGTH = 20
SEEDED = {"temperature": 1.0, "seed": 11}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": SEEDED,
    "drawn seed": {"temperature": 1.2},
    "top p": {**SEEDED, "top_p": 0.7},
    "top k": {**SEEDED, "top_k": 8, "top_p": 0.9},
    "min p": {**SEEDED, "min_p": 0.05, "logprobs": 0},
    "repetition": {"temperature": 0.0, "repetition_penalty": 1.5, "logprobs": 1},
    "counts": {**SEEDED, "presence_penalty": 1.0, "frequency_penalty": 0.8, "logprobs": 2},
    "bias": {"temperature": 0.0, "logit_bias": {17: 9.0, 44: -30.0}, "logprobs": 2},
    "allowed": {**SEEDED, "allowed_token_ids": list(range(20, 60))},
    "bad words": {"temperature": 0.0, "bad_words_token_ids": [[30], [31, 32], [45, 46, 47]]},
    "scores": {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 2},
    "young": {**SEEDED, "ignore_eos": False, "min_tokens": 8, "allowed_token_ids": [2, 30, 31, 32, 33]},
    "stop id": {**SEEDED, "stop_token_ids": [30], "min_tokens": 3, "allowed_token_ids": [30, 31, 32, 33, 34]},
    "to the limit of the model": {"temperature": 0.0, "max_tokens": None},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.save_qwen3(tmp_path_factory.mktemp("qwen3"))


def requests() -> list[Submit]:
    rng, seeds = random.Random(5), SeedSource(0)
    return [
        Submit(
            request_id=name, prompt_token_ids=[rng.randrange(3, checkpoints.VOCAB) for _ in range(rng.randrange(2, 36))],
            params=SamplingParams(**{"max_tokens": LENGTH, "ignore_eos": True, **params}), seed=seeds.draw() if "seed" not in params else None,
        )
        for name, params in CASES.items()
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(model) -> dict[str, Heard]:
    """Each of the requests, never interrupted."""
    with open_engine(model, "cpu") as engine:
        return engine.run(requests())


def resumed(request: Submit, heard: Heard, cut: int) -> Submit:
    return msgspec.structs.replace(
        request, request_id=f"{request.request_id} from {cut}", output_token_ids=heard.tokens[:cut]
    )


def check(found: Heard, exact: Heard, cut: int, tolerance: float = 0.0) -> None:
    assert found.tokens == exact.tokens[cut:]
    assert found.end == exact.end
    assert [(one.token_ids, one.rank) for one in found.logprobs] == [
        (one.token_ids, one.rank) for one in exact.logprobs[cut:]
    ]
    for ours, theirs in zip(found.logprobs, exact.logprobs[cut:], strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, rel=0, abs=tolerance)
    scored = [one.token_ids for one in exact.prompt_logprobs]
    assert [one.token_ids for one in found.prompt_logprobs] == ([] if cut else scored)


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "nocache"])
@pytest.mark.parametrize(
    "backend",
    ["cpu", "graphs", "eager", *(pytest.param(f"cuda-{how}", marks=pytest.mark.gpu) for how in ("graphs", "eager"))],
)  # fmt: skip
def test_the_rest_is_what_it_would_have_been(model, whole, backend, cache):
    cuts = [(one, k) for one in requests() for k in range(len(whole[one.request_id].tokens) + 1)]
    random.Random(1).shuffle(cuts)
    with open_engine(model, backend, enable_prefix_caching=cache) as engine:
        found = engine.run([resumed(one, whole[one.request_id], k) for one, k in cuts])
    for heard, (one, k) in zip(found.values(), cuts, strict=True):
        check(heard, whole[one.request_id], k, tolerance=0.0 if backend == "cpu" else 1e-4)


def test_the_cases_end_in_every_way(whole):
    assert {heard.end for heard in whole.values()} == {
        (Finish.LENGTH, None), (Finish.STOP, None), (Finish.STOP, 30),
    }  # fmt: skip
    assert len(whole["young"].tokens) > 8
    assert len(whole["stop id"].tokens) > 3


def test_what_had_ended_ends_at_once(model, whole):
    """Nothing is computed, whichever way it had ended."""
    ended = [resumed(one, whole[one.request_id], len(whole[one.request_id].tokens)) for one in requests()]
    with open_engine(model, "cpu") as engine:
        for again, one in zip(ended, requests(), strict=True):
            found = engine.run([again])[again.request_id]
            assert (found.tokens, found.end) == ([], whole[one.request_id].end)
        stats = engine.client.pulse()[0].stats
    assert stats is not None and stats.prompt_tokens == stats.generation_tokens == 0


def test_pressure_on_the_way_changes_nothing(model, whole):
    """Gone on with elsewhere, and preempted there."""
    again = [resumed(one, whole[one.request_id], 5) for one in requests()]
    tokens = 2 * 64
    with open_engine(
        model, "cpu", kv_cache_memory_bytes=tokens * 2 * 2 * 2 * 16 * 4, enable_prefix_caching=False
    ) as engine:
        found = engine.run(again)
        stats = engine.client.pulse()[0].stats
    assert stats is not None and stats.preemptions > 0
    for one, later in zip(requests(), again, strict=True):
        check(found[later.request_id], whole[one.request_id], 5)


# what cannot be gone on with

ids = st.one_of(
    st.integers(0, VOCAB - 1), st.integers(-(2**63), 2**64 - 1), st.sampled_from([-1, VOCAB, 2**32])
)


@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), max_size=140),
    output=st.one_of(st.lists(ids, max_size=5), st.lists(st.integers(0, VOCAB - 1), max_size=140)),
    max_tokens=st.one_of(st.none(), st.integers(1, 140)),
    min_tokens=st.integers(0, 3),
    scored=st.sampled_from([0, 0, 0, 1, 5, -1, 10**6]),
    ignore_eos=st.booleans(),
)
def test_whatever_is_given_there_is_one_end_and_others_do_not_notice(
    prompt, output, max_tokens, min_tokens, scored, ignore_eos
):
    core, front = make_core()
    params = SamplingParams(
        max_tokens=max_tokens, min_tokens=min(min_tokens, max_tokens or 3), temperature=0.0, ignore_eos=ignore_eos
    )  # fmt: skip
    front.send(submit("canary", [1, 2, 3], max_tokens=9))
    front.send(
        Submit(
            request_id="odd", prompt_token_ids=prompt, params=params, output_token_ids=output,
            num_prompt_logprobs=scored,
        )
    )  # fmt: skip
    outputs = run_until_idle(core, front)
    core.scheduler.audit()
    core.executor.close()
    ends = ends_of(outputs)
    assert ends["canary"] == [Finish.LENGTH]
    assert tokens_of(outputs, "canary") == expected([1, 2, 3], 9)
    (finish,) = ends["odd"]
    room = min(128 - len(prompt), max_tokens or 128)
    sound = 0 < len(prompt) < 128 and 0 <= scored < len(prompt)
    sound = sound and len(output) <= room and all(0 <= token < VOCAB for token in output)
    assert (finish is not Finish.ERROR) == sound
    if sound and finish is Finish.LENGTH:
        assert tokens_of(outputs, "odd") == expected(prompt + output, room - len(output))
    last = next(out for out in outputs if out.request_id == "odd" and out.finish)
    assert bool(last.error) == (not sound)


def tokens_of(outputs: Sequence[SequenceOutput], id: str) -> list[int]:
    return [token for out in outputs if out.request_id == id for token in out.token_ids]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"output_token_ids": [5, VOCAB]}, f"token id {VOCAB} is not in the vocabulary of {VOCAB}"),
        ({"output_token_ids": [-3, 5]}, "token id -3 is not in the vocabulary"),
        ({"output_token_ids": [5] * 17}, "17 tokens of output are given; after a prompt of 3 tokens"),
        ({"waited_s": float("nan")}, "finite"),
        ({"waited_s": -1.0}, "not negative"),
        ({"num_prompt_logprobs": 3}, "3 prompt logprobs cannot have come of a prompt of 3 tokens"),
    ],
)
def test_the_refusal_says_why(changes, sentence):
    core, front = make_core()
    front.send(msgspec.structs.replace(submit("r", [1, 2, 3], max_tokens=16), **changes))
    (only,) = run_until_idle(core, front)
    core.executor.close()
    assert only.finish is Finish.ERROR
    assert sentence in (only.error or "")
