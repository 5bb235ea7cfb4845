"""The sampler as the executor uses it: slots, batches, seeds, log-probabilities and rows that cannot be sampled."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from xllm.core.plan import NewSequence
from xllm.core.sampling import SamplingParams
from xllm.executor.sampling import Sampled, Sampler

VOCAB = 1000
LENGTH = 64
MIX: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.3, "logit_bias": {5: 3.0}},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9, "logprobs": 0},
    {"temperature": 1.5, "top_k": 20},
    {"temperature": 1.5, "top_k": 400, "top_p": 0.8, "logprobs": 5},
    {"temperature": 0.9, "min_p": 0.1, "presence_penalty": 0.5},
    {"temperature": 1.1, "frequency_penalty": 1.0, "top_p": 0.5},
    {"temperature": 1.1, "allowed_token_ids": list(range(0, 1000, 7)), "logprobs": 3},
    {"temperature": 1.0, "bad_words_token_ids": [[3], [1, 2]], "min_tokens": 30},
    {"temperature": 1e-9},
]


class Rig:
    """A sampler with its token buffer, and a "model" whose logits depend on a sequence's own tokens only."""

    def __init__(self, max_num_seqs: int = 16, vocab: int = VOCAB):
        self.vocab = vocab
        self.tokens = torch.zeros(max_num_seqs, LENGTH, dtype=torch.int64)
        self.sampler = Sampler(max_num_seqs=max_num_seqs, vocab_size=vocab, tokens=self.tokens)
        self.lengths: dict[int, int] = {}

    def admit(
        self,
        slot: int,
        ids: Sequence[int],
        prompt_len: int | None = None,
        seed: int = 0,
        stop_ids: Sequence[int] = (9,),
        **params: Any,
    ) -> None:
        self.tokens[slot] = 0
        self.tokens[slot, : len(ids)] = torch.tensor(ids)
        self.lengths[slot] = len(ids)
        self.sampler.admit(
            NewSequence(
                slot=slot, request_id=str(slot), token_ids=list(ids), prompt_len=prompt_len or len(ids),
                params=SamplingParams(max_tokens=None, **params), seed=seed, stop_ids=list(stop_ids), blocks=(),
            )
        )  # fmt: skip

    def logits(self, slot: int) -> torch.Tensor:
        own = self.tokens[slot, : self.lengths[slot]].tolist()
        return torch.randn(self.vocab, generator=torch.Generator().manual_seed(hash(tuple(own)) % 2**31)) * 3

    def step(self, slots: Sequence[int]) -> Sampled:
        """Sample the next token of these slots and feed it back."""
        logits = torch.stack([self.logits(slot) for slot in slots])
        positions = [self.lengths[slot] for slot in slots]
        kept = logits.clone()
        sampled = self.sampler.sample(logits, slots, positions)
        assert torch.equal(logits, kept)
        for slot, position, token in zip(slots, positions, sampled.token_ids.tolist(), strict=True):
            self.tokens[slot, position] = token
            self.lengths[slot] += 1
        return sampled

    def generated(self, slot: int, prompt_len: int) -> list[int]:
        return self.tokens[slot, prompt_len : self.lengths[slot]].tolist()


def prompt(i: int) -> list[int]:
    return [i + 1, 2 * i + 3, 1]


def alone(i: int, steps: int) -> tuple[list[int], list[Any]]:
    """Tokens and log-probabilities of the i-th request of `MIX` with nothing beside it."""
    rig = Rig()
    rig.admit(i, prompt(i), seed=i * 7919, **MIX[i])
    logprobs = [rig.step([i]).host_logprobs().get(0) for _ in range(steps)]
    return rig.generated(i, 3), logprobs


def test_rows_are_sampled_alike_in_any_company():
    """Bit for bit: together, in any order, joining late, leaving early, log-probabilities too."""
    expected = [alone(i, 20) for i in range(len(MIX))]
    rig, order = Rig(), random.Random(5)
    left = dict.fromkeys(range(len(MIX)), 20)
    waiting = list(left)
    running: list[int] = []
    logprobs: dict[int, list[Any]] = {i: [] for i in left}
    while waiting or running:
        while waiting and order.random() < 0.5:
            i = waiting.pop(order.randrange(len(waiting)))
            rig.admit(i, prompt(i), seed=i * 7919, **MIX[i])
            running.append(i)
        chosen = [i for i in running if order.random() < 0.8]
        order.shuffle(chosen)
        if not chosen:
            continue
        found = rig.step(chosen).host_logprobs()
        for row, i in enumerate(chosen):
            logprobs[i].append(found.get(row))
            left[i] -= 1
        running = [i for i in running if left[i]]
    for i in left:
        assert (rig.generated(i, 3), logprobs[i]) == expected[i], MIX[i]


@pytest.mark.parametrize("i", range(len(MIX)))
def test_resuming_after_a_preemption_changes_nothing(i: int):
    expected, _ = alone(i, 20)
    rig = Rig()
    rig.admit(3, prompt(i), seed=i * 7919, **MIX[i])
    for _ in range(8):
        rig.step([3])
    so_far = rig.generated(3, 3)
    rig.admit(3, [5], seed=1, presence_penalty=1.0)  # somebody else has the slot meanwhile
    rig.step([3])
    rig.admit(11, prompt(i) + so_far, prompt_len=3, seed=i * 7919, **MIX[i])
    for _ in range(12):
        rig.step([11])
    assert rig.generated(11, 3) == expected


def test_seeds():
    def tokens(seed: int) -> list[int]:
        rig = Rig()
        rig.admit(0, [1, 2], seed=seed)
        for _ in range(16):
            rig.step([0])
        return rig.generated(0, 2)

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert tokens(2**64 - 1) == tokens(-1)


def test_greedy_is_the_first_of_the_best():
    rig = Rig()
    rig.admit(0, [1], temperature=0.0)
    logits = torch.zeros(1, VOCAB)
    logits[0, [700, 40, 999]] = 1.0
    assert rig.sampler.sample(logits, [0], [1]).token_ids.tolist() == [40]


def test_tiny_temperatures_take_the_best():
    rig = Rig()
    for slot, temperature in enumerate((5e-324, 1e-45, 1e-9)):
        rig.admit(slot, [1], temperature=temperature)
    logits = torch.randn(3, VOCAB)
    sampled = rig.sampler.sample(logits, [0, 1, 2], [1, 1, 1])
    assert torch.equal(sampled.token_ids, logits.argmax(-1)) and sampled.errors == {}


def test_a_top_k_of_everything_is_no_filter():
    rig = Rig()
    for slot, k in enumerate((0, -1, VOCAB, 10**9)):
        rig.admit(slot, [1], seed=4, top_k=k)
    logits = torch.randn(1, VOCAB).expand(4, -1)
    assert len(set(rig.sampler.sample(logits, [0, 1, 2, 3], [1] * 4).token_ids.tolist())) == 1


def test_min_tokens_hold_the_end_back():
    rig = Rig()
    rig.admit(0, [1, 2], temperature=0.0, min_tokens=3, stop_ids=[9, 11])
    logits = torch.zeros(1, VOCAB)
    logits[0, 9], logits[0, 11], logits[0, 30] = 9.0, 8.0, 7.0
    found = [int(rig.sampler.sample(logits, [0], [position]).token_ids) for position in range(2, 7)]
    assert found == [30, 30, 30, 9, 9]


def test_penalties_see_what_was_just_put_out():
    rig = Rig()
    rig.admit(0, [1], temperature=0.0, frequency_penalty=1.0)
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 6] = 2.5, 1.0
    found = []
    for position in range(1, 6):
        token = int(rig.sampler.sample(logits, [0], [position]).token_ids)
        rig.tokens[0, position] = token
        found.append(token)
    assert found == [5, 5, 6, 5, 0]  # 5 has 2.5, 1.5, 0.5 and -0.5 in turn, 6 has 1 and 0


# ---- rows that cannot be sampled


@pytest.mark.parametrize("params", MIX)
def test_unusable_rows_fail_alone(params: dict[str, Any]):
    rig = Rig()
    for slot in range(6):
        rig.admit(slot, [1, 2], seed=3, **params)
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(1))
    expected = rig.sampler.sample(logits, list(range(6)), [2] * 6)
    for slot in range(6):
        rig.admit(slot, [1, 2], seed=3, **params)
    broken = logits.clone()
    broken[1] = -torch.inf
    broken[2, 700] = torch.nan
    broken[4, 700] = torch.inf  # 700 is a multiple of 7: allowed where only those are
    sampled = rig.sampler.sample(broken, list(range(6)), [2] * 6)
    assert set(sampled.errors) == {1, 2, 4}
    assert all("not finite" in why for why in sampled.errors.values())
    for row in (0, 3, 5):
        assert int(sampled.token_ids[row]) == int(expected.token_ids[row])
        assert sampled.host_logprobs().get(row) == expected.host_logprobs().get(row)
    assert not set(sampled.host_logprobs()) & {1, 2, 4}
    assert all(0 <= token < VOCAB for token in sampled.token_ids.tolist())


def test_parameters_that_leave_nothing_fail_alone():
    rig = Rig()
    rig.admit(0, [1], temperature=1.0, allowed_token_ids=[5], bad_words_token_ids=[[5]])
    rig.admit(1, [1], temperature=1.0, allowed_token_ids=[VOCAB + 5])
    rig.admit(2, [1], temperature=1.0)
    sampled = rig.sampler.sample(torch.randn(3, VOCAB), [0, 1, 2], [1, 1, 1])
    assert set(sampled.errors) == {0, 1}


def test_barred_tokens_do_not_hide_a_broken_row():
    rig = Rig()
    rig.admit(0, [1], temperature=0.0, bad_words_token_ids=[[7]])
    logits = torch.randn(1, VOCAB)
    logits[0, 7] = torch.inf  # minus infinity more is not a number
    assert set(rig.sampler.sample(logits, [0], [1]).errors) == {0}


# ---- log-probabilities


@pytest.mark.parametrize("k", [0, 1, 5, VOCAB, 2 * VOCAB])
def test_logprobs_are_of_the_raw_distribution(k: int):
    rig = Rig()
    rig.admit(0, [1], temperature=3.0, top_k=50, logit_bias={3: 50.0}, logprobs=min(k, 1000))
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(k)) * 4
    sampled = rig.sampler.sample(logits, [0], [1])
    [entry] = sampled.host_logprobs().values()
    expected = logits[0].double().log_softmax(-1)
    token = int(sampled.token_ids)
    assert entry.token_ids[0] == token
    assert entry.logprobs == pytest.approx(expected[torch.tensor(entry.token_ids)].tolist(), abs=1e-5)
    assert entry.rank == int((expected > expected[token]).sum()) + 1
    assert list(entry.token_ids[1:]) == expected.topk(min(k, VOCAB)).indices.tolist()


def test_equally_likely_tokens_come_in_the_order_of_their_ids():
    rig = Rig()
    rig.admit(0, [1], temperature=0.0, logprobs=4)
    logits = torch.zeros(1, VOCAB)
    logits[0, [900, 20, 300]] = 2.0
    logits[0, 500] = 3.0
    [entry] = rig.sampler.sample(logits, [0], [1]).host_logprobs().values()
    assert (list(entry.token_ids), entry.rank) == ([500, 500, 20, 300, 900], 1)


def test_prompt_logprobs():
    rig = Rig()
    logits = torch.randn(7, VOCAB) * 3
    targets = torch.tensor([5, 0, 999, 5, 17, 3, 2], dtype=torch.int32)
    entries = rig.sampler.prompt_logprobs(logits, targets, 2)
    expected = logits.double().log_softmax(-1)
    for row, entry in enumerate(entries):
        target = int(targets[row])
        assert list(entry.token_ids) == [target, *expected[row].topk(2).indices.tolist()]
        assert entry.logprobs[0] == pytest.approx(float(expected[row, target]), abs=1e-5)
        assert entry.rank == int((expected[row] > expected[row, target]).sum()) + 1
    assert rig.sampler.prompt_logprobs(logits[:0], targets[:0], 2) == []


def test_host_values_are_plain_python():
    rig = Rig()
    rig.admit(0, [1], logprobs=1)
    [entry] = rig.step([0]).host_logprobs().values()
    assert {type(i) for i in entry.token_ids} == {int} and {type(p) for p in entry.logprobs} == {float}


def test_too_large_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="exact"):
        Sampler(max_num_seqs=1, vocab_size=2**19 + 1, tokens=torch.zeros(1, 4, dtype=torch.int64))


def test_works_in_inference_mode_with_32_bit_tokens():
    tokens = torch.zeros(2, 8, dtype=torch.int32)
    with torch.inference_mode():
        sampler = Sampler(max_num_seqs=2, vocab_size=50, tokens=tokens)
        params = SamplingParams(
            presence_penalty=1.0, repetition_penalty=1.2, bad_words_token_ids=[[0, 3]], logprobs=1
        )
        for slot in (0, 1):
            sampler.admit(
                NewSequence(
                    slot=slot,
                    request_id="r",
                    token_ids=[0, 0],
                    prompt_len=2,
                    params=params,
                    seed=1,
                    stop_ids=(),
                    blocks=(),
                )
            )
        sampled = sampler.sample(torch.randn(2, 50), [1, 0], [2, 2])
    assert sampled.errors == {} and len(sampled.host_logprobs()) == 2
