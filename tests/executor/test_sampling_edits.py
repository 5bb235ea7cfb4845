"""What parameters do to logits, against `transformers`' processors and plain NumPy. The effect is seen through the
sampler's own choice of the greedy token and, where all logits matter, through its edits directly."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

from xllm.core.plan import NewSequence
from xllm.core.sampling import SamplingParams
from xllm.executor.sampling.batch import Batch
from xllm.executor.sampling.slots import OutputCounts, Slot, SlotTensors

VOCAB = 40
CPU = torch.device("cpu")


def sequence(ids: Sequence[int], prompt_len: int, stop_ids: Sequence[int] = (), **params: Any) -> NewSequence:
    return NewSequence(
        slot=0, request_id="r", token_ids=list(ids), prompt_len=prompt_len, params=SamplingParams(max_tokens=None, **params),
        seed=0, stop_ids=list(stop_ids), blocks=(),
    )  # fmt: skip


def edited(logits: torch.Tensor, sequences: Sequence[NewSequence]) -> torch.Tensor:
    """Row r is of sequence r, whose next token is wanted."""
    counts = OutputCounts(logits.shape[1], CPU)
    slots, length = [], max(len(s.token_ids) for s in sequences)
    tokens = torch.full((len(sequences), length + 3), 7)  # what stands behind a sequence must not matter
    for row, seq in enumerate(sequences):
        slot = Slot.of(seq, logits.shape[1])
        if slot.counted:
            slot.count_row = counts.take(torch.tensor(seq.token_ids[seq.prompt_len :], dtype=torch.int64))
        tokens[row, : len(seq.token_ids)] = torch.tensor(seq.token_ids)
        slots.append(slot)
    positions = [len(seq.token_ids) for seq in sequences]
    young = [slot.young(position) for slot, position in zip(slots, positions, strict=True)]
    batch = Batch(list(range(len(sequences))), slots, young, SlotTensors(len(slots), CPU))
    changed = logits.clone()
    batch.edit(changed, tokens, torch.tensor(positions), max(positions), counts.counts)
    return changed


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


ids = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)


@given(
    rows=st.lists(
        st.tuples(ids, st.integers(1, 12), st.sampled_from([0.5, 1.0, 1.3])), min_size=1, max_size=4
    )
)
def test_repetition_is_that_of_transformers(rows: list[tuple[list[int], int, float]]):
    logits = random_logits(len(rows))
    found = edited(logits, [sequence(i, min(n, len(i)), repetition_penalty=p) for i, n, p in rows])
    for row, (i, _, p) in enumerate(rows):
        expected = RepetitionPenaltyLogitsProcessor(p)(torch.tensor([i]), logits[row : row + 1].clone())
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-6, atol=0)


@given(
    rows=st.lists(
        st.tuples(ids, st.integers(1, 12), st.sampled_from([-1.0, 0.0, 0.5]), st.sampled_from([0.0, 0.25, 2.0])),
        min_size=1, max_size=4,
    )
)  # fmt: skip
def test_presence_and_frequency_count_the_output_only(rows: list[tuple[list[int], int, float, float]]):
    logits = random_logits(len(rows), 1)
    found = edited(
        logits,
        [
            sequence(i, min(n, len(i)), presence_penalty=p, frequency_penalty=f, repetition_penalty=1.2)
            for i, n, p, f in rows
        ],
    )
    for row, (i, n, p, f) in enumerate(rows):
        counts = np.bincount(np.array(i[min(n, len(i)) :], dtype=np.int64), minlength=VOCAB)
        expected = logits[row].double().numpy()
        named = np.isin(np.arange(VOCAB), i)
        expected = np.where(named, np.where(expected > 0, expected / 1.2, expected * 1.2), expected)
        expected = expected - f * counts - p * (counts > 0)
        np.testing.assert_allclose(found[row].numpy(), expected, rtol=1e-5, atol=1e-5)


few = st.integers(0, 4)


@given(
    rows=st.lists(
        st.tuples(
            st.lists(few, min_size=1, max_size=10), st.lists(st.lists(few, min_size=1, max_size=4), max_size=5)
        ),
        min_size=1, max_size=4,
    )
)  # fmt: skip
def test_bad_words_are_those_of_transformers(rows: list[tuple[list[int], list[list[int]]]]):
    logits = random_logits(len(rows), 2)
    found = edited(logits, [sequence(i, 1, bad_words_token_ids=words or None) for i, words in rows])
    for row, (i, words) in enumerate(rows):
        expected = logits[row : row + 1].clone()
        if words:
            expected = NoBadWordsLogitsProcessor(words)(torch.tensor([i]), expected)
        assert torch.equal(found[row : row + 1], expected)


def test_biases_add_and_bars_win():
    logits = random_logits(2, 3)
    found = edited(
        logits,
        [
            sequence([1], 1, logit_bias={3: 100.0, 5: -7.5}, bad_words_token_ids=[[5], [1, 5], [2, 3]]),
            sequence([1], 1, logit_bias={3: -1.0}),
        ],
    )
    assert found[0, 3] == logits[0, 3] + 100
    assert found[0, 5] == -torch.inf
    assert found[1, 3] == logits[1, 3] - 1
    others = [i for i in range(VOCAB) if i not in (3, 5)]
    assert torch.equal(found[:, others], logits[:, others])


def test_only_allowed_tokens_are_left():
    logits = random_logits(3, 4)
    found = edited(
        logits,
        [
            sequence([1], 1, allowed_token_ids=[2, 9], logit_bias={9: 1.0}),
            sequence([1], 1),
            sequence([1], 1, allowed_token_ids=[0]),
        ],
    )
    assert found[0].isfinite().nonzero().flatten().tolist() == [2, 9]
    assert found[0, 9] == logits[0, 9] + 1
    assert torch.equal(found[1], logits[1])
    assert found[2].isfinite().nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize(("out", "barred"), [(0, True), (2, True), (3, False), (4, False)])
def test_ends_are_barred_until_min_tokens_are_out(out: int, barred: bool):
    logits = random_logits(1, 5)
    found = edited(logits, [sequence([1] * (4 + out), 4, stop_ids=[6, 8], min_tokens=3)])
    assert found[0].isfinite().logical_not().nonzero().flatten().tolist() == ([6, 8] if barred else [])


def test_tokens_outside_the_vocabulary_have_no_effect():
    logits = random_logits(1, 6)
    seq = sequence(
        [1], 1, stop_ids=[VOCAB], min_tokens=1, logit_bias={VOCAB: 5.0, -1: 3.0, 2: 1.0},
        bad_words_token_ids=[[VOCAB + 5], [], [VOCAB, 3]],
    )  # fmt: skip
    found = edited(logits, [seq])
    assert found[0, 2] == logits[0, 2] + 1
    assert (found != logits).sum() == 1


def test_everything_at_once_is_in_the_order_of_vllm():
    """allowed, then bars and biases, then repetition, frequency and presence of what is left."""
    logits = random_logits(1, 7)
    seq = sequence(
        [4, 5, 5, 6], 1, stop_ids=[9], min_tokens=9, allowed_token_ids=[4, 5, 6, 9], logit_bias={5: 2.0, 4: -1.0},
        bad_words_token_ids=[[5, 6, 6]], repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25,
    )  # fmt: skip
    found = edited(logits, [seq])[0]

    def penalised(value: float, count: int) -> float:
        return (value / 1.5 if value > 0 else value * 1.5) - 0.25 * count - 0.5 * (count > 0)

    assert float(found[4]) == pytest.approx(penalised(float(logits[0, 4]) - 1, 0), rel=1e-5)
    assert float(found[5]) == pytest.approx(penalised(float(logits[0, 5]) + 2, 2), rel=1e-5)
    assert found[6] == -torch.inf and found[9] == -torch.inf
    assert found.isfinite().sum() == 2


def test_count_rows_are_taken_given_and_cleared():
    counts = OutputCounts(VOCAB, CPU)
    rows = [counts.take(torch.tensor([i, i])) for i in range(6)]
    assert len(set(rows)) == 6
    assert [int(counts.counts[row, i]) for i, row in enumerate(rows)] == [2] * 6
    counts.give(rows[2])
    again = counts.take(torch.tensor([], dtype=torch.int64))
    assert again == rows[2] and counts.counts[again].sum() == 0
