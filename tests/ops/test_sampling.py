"""The sampling operator: the reference against brute force, fast versions against both."""

import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.executor import exact
from tests.ops.choices import acceptable
from xllm.ops.sampling import SlotNumbers
from xllm.ops.table import SAMPLE, is_available, resolve

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param(device, marks=[pytest.mark.gpu] if device == "cuda" else [], id=device) for device in SAMPLE
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
Sample = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(params=DEVICES)
def sample(request: pytest.FixtureRequest) -> Sample:
    """The device's operator, for tensors on the CPU."""
    device: str = request.param
    if not is_available(device):
        pytest.skip(f"the fast operators of {device} cannot run on this machine")
    operator: Sample = resolve(SAMPLE[device])
    if device != "cuda" or INTERPRETED:
        return operator

    def on_the_card(
        logits: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        numbers: SlotNumbers,
        feed: torch.Tensor | None = None,
        advance: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        moved = SlotNumbers(*(getattr(numbers, name).cuda() for name in SlotNumbers.__slots__))
        fed = None if feed is None else feed.cuda()
        at = positions.cuda()
        token_ids, usable = operator(logits.cuda(), slots.cuda(), at, moved, fed, advance)
        if feed is not None and fed is not None:
            feed.copy_(fed)
        positions.copy_(at)
        return token_ids.cpu(), usable.cpu()

    return on_the_card


def rows_of(rng: np.random.Generator, count: int, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits of every kind: flat, peaked, full of ties, coarse, with barred tokens, huge and tiny."""
    made = []
    for i in range(count):
        row = rng.normal(size=vocab) * rng.choice([0.01, 1.0, 3.0, 10.0])
        kind = i % 7
        if kind == 0:
            row = np.round(row)  # many ties
        elif kind == 1:
            row = np.where(rng.random(vocab) < 0.5, 0.0, -0.0)  # nothing but ties
        elif kind == 2:
            row[rng.random(vocab) < 0.7] = -np.inf
            row[rng.integers(vocab)] = 0.0
        elif kind == 3:
            row = np.where(np.arange(vocab) == rng.integers(vocab), row + 30.0, row)
        elif kind == 4:
            row = row * 1e30
        elif kind == 5:
            row = row - 200 * np.arange(vocab) / vocab  # likely tokens in few chunks
        made.append(row)
    return torch.tensor(np.array(made), dtype=torch.float32).to(dtype)


def numbers_of(rng: np.random.Generator, count: int, vocab: int) -> SlotNumbers:
    some_k = rng.integers(1, vocab + 1, count)
    top_k = np.where(rng.random(count) < 0.5, rng.choice([1, 2, 20, 50, 600, 10 * vocab], count), some_k)
    return SlotNumbers(
        starts=torch.tensor(rng.integers(-(2**63), 2**63, count)),
        inv_temperature=torch.tensor(
            rng.choice([0.0, 0.5, 1.0, 1 / 0.6, 100.0], count, p=[0.1, 0.2, 0.3, 0.3, 0.1]),
            dtype=torch.float32,
        ),
        min_p=torch.tensor(rng.choice([0.0, 0.0, 0.001, 0.2, 1.0], count), dtype=torch.float32),
        top_p=torch.tensor(np.where(rng.random(count) < 0.4, 1.0, rng.uniform(0.01, 1.0, count))),
        top_k=torch.tensor(np.where(rng.random(count) < 0.5, 0, top_k)),
    )


def numbers(count: int, **given: Any) -> SlotNumbers:
    """`count` slots alike, but for their seeds."""
    return SlotNumbers(
        starts=torch.arange(count) * 7919 - 5,
        inv_temperature=torch.full((count,), given.get("inv_temperature", 1.0)),
        min_p=torch.full((count,), given.get("min_p", 0.0)),
        top_p=torch.full((count,), given.get("top_p", 1.0), dtype=torch.float64),
        top_k=torch.full((count,), given.get("top_k", 0)),
    )


def check(
    sample: Sample, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, given: SlotNumbers
) -> int:
    """Every token is the reference's or, within rounding, as right; -> how many rows leave a choice at all."""
    token_ids, usable = sample(logits, slots, positions, given)
    reference, _ = resolve(SAMPLE["reference"])(logits, slots, positions, given)
    assert usable.all()
    unsure = 0
    for row, slot in enumerate(slots.tolist()):
        token, expected = int(token_ids[row]), int(reference[row])
        allowed = acceptable(logits[row], given, slot, int(positions[row]))
        unsure += len(allowed) > 1
        assert expected in allowed, row
        assert token == expected or token in allowed, (row, token, expected)
    return unsure


@DTYPES
@pytest.mark.parametrize(
    ("vocab", "count"), [(1, 14), (2, 28), (255, 70), (256, 70), (1000, 70), (5003, 42), (151_936, 14)]
)
def test_tokens_are_those_of_brute_force(sample: Sample, dtype: torch.dtype, vocab: int, count: int) -> None:
    rng = np.random.default_rng(vocab)
    logits, given = rows_of(rng, count, vocab, dtype), numbers_of(rng, count, vocab)
    slots, positions = torch.tensor(rng.permutation(count)), torch.tensor(rng.integers(0, 2**20, count))
    unsure = check(sample, logits, slots, positions, given)
    # with the largest vocabulary a token of a flat row is no larger than what is close
    assert unsure <= count // 20 or vocab == 151_936


@DTYPES
@pytest.mark.parametrize(
    "kind", [{"top_k": 900}, {"top_k": 700, "top_p": 0.6}, {"top_k": 600, "min_p": 0.05}], ids=str
)
def test_more_candidates_than_fit(sample: Sample, dtype: torch.dtype, kind: dict[str, Any]) -> None:
    """Flat rows, where every small error of a threshold shifts most tokens; the last are ties alone."""
    logits = torch.randn(40, 1000, generator=torch.Generator().manual_seed(4)).to(dtype)
    logits[35:] = 1.0
    assert check(sample, logits, torch.arange(40), torch.arange(40), numbers(40, **kind)) <= 2


@DTYPES
def test_rows_without_a_distribution_are_marked(sample: Sample, dtype: torch.dtype) -> None:
    kinds: list[dict[str, Any]] = [{"inv_temperature": 0.0}, {}, {"top_p": 0.9, "min_p": 0.1}, {"top_k": 5}]
    for kind in kinds:
        logits = torch.randn(6, 700, generator=torch.Generator().manual_seed(1)).to(dtype)
        logits[1] = -torch.inf
        logits[2, 300] = torch.nan
        logits[3, 699] = torch.inf
        logits[4, 1:] = -torch.inf
        token_ids, usable = sample(logits, torch.arange(6), torch.arange(6), numbers(6, **kind))
        assert usable.tolist() == [True, False, False, False, True, True]
        assert token_ids[1:5].tolist() == [0] * 4


def test_greedy_is_the_first_of_the_best(sample: Sample) -> None:
    logits = torch.zeros(3, 1000)
    logits[0, [700, 40, 999]] = 1.0
    logits[1, [999, 600]] = 2.0
    token_ids, _ = sample(
        logits, torch.arange(3), torch.zeros(3, dtype=torch.int64), numbers(3, inv_temperature=0.0)
    )
    assert token_ids.tolist() == [40, 600, 0]


def test_a_row_does_not_depend_on_its_company(sample: Sample) -> None:
    rng = np.random.default_rng(3)
    logits, given = rows_of(rng, 21, 1500, torch.float32), numbers_of(rng, 30, 1500)
    slots, positions = torch.tensor(rng.permutation(30)[:21]), torch.tensor(rng.integers(0, 100, 21))
    together, _ = sample(logits, slots, positions, given)
    for rows in ([0], [5, 2], [20, 19, 18, 3]):
        alone, _ = sample(logits[rows], slots[rows], positions[rows], given)
        assert torch.equal(alone, together[rows])


def test_tokens_are_fed_back_and_the_logits_kept(sample: Sample) -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(2))
    kept = logits.clone()
    feed = torch.full((8, 10), -1)
    slots, positions = torch.tensor([7, 0, 3, 4, 1]), torch.tensor([9, 0, 5, 5, 2])
    token_ids, _ = sample(logits, slots, positions, numbers(8), feed)
    assert torch.equal(feed[slots, positions], token_ids)
    assert (feed >= 0).sum() == 5
    assert torch.equal(logits, kept)


def test_positions_are_counted_up_where_asked(sample: Sample) -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(2))
    slots, given = torch.arange(5), numbers(5, inv_temperature=1.0)
    expected, _ = sample(logits, slots, torch.tensor([8, 1, 3, 6, 2]), given)
    feed, positions = torch.full((5, 10), -1), torch.tensor([7, 0, 2, 5, 1])
    token_ids, _ = sample(logits, slots, positions, given, feed, True)
    assert torch.equal(token_ids, expected)
    assert positions.tolist() == [8, 1, 3, 6, 2]
    assert torch.equal(feed[slots, positions], token_ids)
    assert (feed >= 0).sum() == 5


def test_rows_may_stand_apart(sample: Sample) -> None:
    """As a slice of wider logits has them."""
    logits = torch.randn(4, 640, generator=torch.Generator().manual_seed(2))
    given, slots, positions = numbers(4, top_k=7), torch.arange(4), torch.arange(4)
    expected, _ = sample(logits[:, :500].contiguous(), slots, positions, given)
    assert torch.equal(sample(logits[:, :500], slots, positions, given)[0], expected)


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"inv_temperature": 1.4, "min_p": 0.05},
        {"top_p": 0.7},
        {"inv_temperature": 0.3, "top_p": 0.1},
        {"inv_temperature": 1.0, "top_k": 20, "top_p": 0.95},
        {"inv_temperature": 0.7, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
    ],
    ids=str,
)
def test_frequencies_are_the_probabilities(sample: Sample, kind: dict[str, Any]) -> None:
    count = 200 if INTERPRETED else 5000
    logits = torch.randn(1, 600, generator=torch.Generator().manual_seed(3)) * 2
    slots = torch.zeros(count, dtype=torch.int64)
    token_ids, _ = sample(logits.expand(count, -1), slots, torch.arange(count), numbers(1, **kind))
    p = (logits[0].double() * kind.get("inv_temperature", 1.0)).softmax(-1)
    p = torch.where(p >= kind.get("min_p", 0.0) * p.max(), p, 0)
    if k := kind.get("top_k"):
        p = torch.where(p >= p.topk(k).values[-1], p, 0)
    order = p.argsort(descending=True)
    before = p[order].cumsum(0) - p[order]
    p[order[before >= kind.get("top_p", 1.0) * p.sum()]] = 0
    counts = torch.bincount(token_ids, minlength=600)
    assert counts[p == 0].sum() == 0
    assert exact.chi_square(counts.tolist(), (p / p.sum()).tolist()) < 5


@pytest.mark.gpu
def test_engines_that_sample_from_threads_of_their_own_do_not_meet() -> None:
    """Its two kernels share memory: those of one thread came between those of another, and both got other tokens."""
    if not is_available("cuda") or INTERPRETED:
        pytest.skip("the fast operators of cuda cannot run on this machine")
    operator: Sample = resolve(SAMPLE["cuda"])
    wrong: list[int] = []

    def engine(token: int) -> None:
        given = SlotNumbers(
            *(getattr(numbers(4, inv_temperature=0.0), name).cuda() for name in SlotNumbers.__slots__)
        )
        logits = torch.zeros(4, 2000, device="cuda")
        logits[:, token] = 1.0
        slots, positions = torch.arange(4).cuda(), torch.zeros(4, dtype=torch.int64).cuda()
        found = [operator(logits, slots, positions, given)[0] for _ in range(2000)]
        wrong.append(int((torch.stack(found) != token).sum()))

    threads = [threading.Thread(target=engine, args=(token,)) for token in (5, 700, 1300, 1999)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0, 0, 0, 0]
