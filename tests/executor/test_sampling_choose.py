"""Choosing a token, against brute force in exact integers, and against the filters of `transformers`."""

import random

import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tests.executor import exact
from xllm.executor.sampling import choose
from xllm.executor.sampling.choose import SCALE, draw, draw_top_p
from xllm.executor.sampling.random import start_of, uniforms

EDGES = [0.0, 1.0 - 2.0**-53, 0.5, 2.0**-53]


def rows_of(rng: np.random.Generator, count: int, vocab: int) -> torch.Tensor:
    """Logits of every kind: flat, peaked, full of ties, coarse, with barred tokens, huge and tiny."""
    made = []
    for _ in range(count):
        kind = rng.integers(7)
        row = rng.normal(size=vocab) * rng.choice([0.01, 1.0, 5.0, 30.0])
        if kind == 0:
            row = np.round(row)  # many ties
        elif kind == 1:
            row = np.zeros(vocab)  # nothing but ties
        elif kind == 2:
            row[rng.random(vocab) < 0.7] = -np.inf
            row[rng.integers(vocab)] = 0.0
        elif kind == 3:
            row = torch.tensor(row).bfloat16().double().numpy()
        elif kind == 4:
            row = np.where(np.arange(vocab) == rng.integers(vocab), 50.0, row)
        elif kind == 5:
            row = row * 1e30
        made.append(row)
    return torch.tensor(np.array(made), dtype=torch.float32)


def parameters(rng: np.random.Generator, count: int) -> dict[str, torch.Tensor]:
    return {
        "inv_temperature": torch.tensor(rng.choice([0.01, 0.5, 1.0, 1.3, 100.0], count), dtype=torch.float32),
        "min_p": torch.tensor(rng.choice([0.0, 0.01, 0.2, 1.0], count), dtype=torch.float32),
        "top_p": torch.tensor(rng.choice([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0], count)),
    }


def weights(logits: torch.Tensor, inv_temperature: torch.Tensor, min_p: torch.Tensor | None) -> torch.Tensor:
    return choose.weights(logits, logits.amax(-1), inv_temperature, min_p)


def draw_top_k(
    logits: torch.Tensor,
    inv_temperature: torch.Tensor,
    min_p: torch.Tensor,
    k: torch.Tensor,
    top_p: torch.Tensor,
    u: torch.Tensor,
    largest_k: int,
) -> torch.Tensor:
    return choose.draw_top_k(logits, logits.amax(-1), inv_temperature, min_p, k, top_p, u, largest_k)


def starts_of(seeds: torch.Tensor) -> torch.Tensor:
    return torch.tensor([start_of(seed) for seed in seeds.tolist()])


def ints(weights: torch.Tensor) -> list[list[int]]:
    return [[int(weight) for weight in row] for row in weights.tolist()]


@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 129, 300])
def test_weights_are_probabilities_in_whole_numbers(vocab: int):
    rng = np.random.default_rng(vocab)
    logits, p = rows_of(rng, 40, vocab), parameters(rng, 40)
    found = weights(logits, p["inv_temperature"], torch.zeros(40)).double()
    scaled = (logits - logits.amax(-1, keepdim=True)).double() * p["inv_temperature"].double()[:, None]
    assert (found.amax(-1) == SCALE).all()
    assert (found == found.floor()).all()
    torch.testing.assert_close(found / SCALE, scaled.exp(), rtol=2e-5, atol=2.0**-33)
    with_min_p = weights(logits, p["inv_temperature"], p["min_p"])
    assert (with_min_p == torch.where(found >= p["min_p"][:, None] * SCALE, found, 0)).all()


@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 129, 300, 1000])
def test_draw_is_the_inverse_of_the_running_sum(vocab: int):
    rng = np.random.default_rng(vocab)
    for _ in range(5):
        logits, p = rows_of(rng, 60, vocab), parameters(rng, 60)
        weighted = weights(logits, p["inv_temperature"], p["min_p"])
        u = torch.tensor([*EDGES, *rng.random(60 - len(EDGES))])
        expected = [exact.inverse(row, at) for row, at in zip(ints(weighted), u.tolist(), strict=True)]
        assert draw(weighted, u)[0].tolist() == expected


@pytest.mark.parametrize("vocab", [1, 2, 128, 129, 300])
def test_top_p_is_the_integers_rejection(vocab: int):
    rng = np.random.default_rng(vocab)
    for _ in range(8):
        logits, p = rows_of(rng, 50, vocab), parameters(rng, 50)
        weighted = weights(logits, p["inv_temperature"], p["min_p"])
        rows = ints(weighted)
        seeds, positions = (
            torch.tensor(rng.integers(-(2**63), 2**63, 50)),
            torch.tensor(rng.integers(0, 10**6, 50)),
        )
        found = draw_top_p(weighted, p["top_p"], starts_of(seeds), positions).tolist()
        for row, top_p, seed, position, token in zip(
            rows, p["top_p"].tolist(), seeds.tolist(), positions.tolist(), found, strict=True
        ):
            assert token == exact.top_p(row, top_p, seed, position)
            assert exact.kept_by_top_p(row, top_p)[token] > 0


@pytest.mark.parametrize("vocab", [2, 128, 129, 300, 2000])
def test_top_k_is_the_inverse_among_what_the_filters_leave(vocab: int):
    rng = np.random.default_rng(vocab)
    for _ in range(6 if vocab < 1000 else 2):
        logits, p = rows_of(rng, 40, vocab), parameters(rng, 40)
        k = torch.tensor(rng.choice([1, 2, 5, 50, 64, 100, vocab - 1], 40)).clamp(max=vocab - 1)
        u = torch.tensor([*EDGES, *rng.random(40 - len(EDGES))])
        arguments = (logits, p["inv_temperature"], p["min_p"], k, p["top_p"], u)
        found = draw_top_k(*arguments, largest_k=int(k.max()))
        whole = weights(logits, p["inv_temperature"], p["min_p"])
        for i, row in enumerate(ints(whole)):
            kept = exact.kept_by_top_k(logits[i].tolist(), row, int(k[i]))
            kept = exact.kept_by_top_p(kept, float(p["top_p"][i]))
            assert int(found[i]) == exact.inverse(kept, float(u[i])), i
        for largest_k in (int(k.max()) + 1, 2 * vocab):  # looks at more candidates, finds the same
            assert torch.equal(draw_top_k(*arguments, largest_k=largest_k), found)


@pytest.mark.slow
def test_twenty_thousand_rows_of_every_kind():
    """Every way, over rows and parameters of every kind, token for token."""
    rng = np.random.default_rng(1)
    for round in range(100):
        vocab = int(rng.integers(2, 400))
        logits, p = rows_of(rng, 200, vocab), parameters(rng, 200)
        k = torch.tensor(rng.integers(1, vocab, 200))
        seeds, positions = torch.tensor(rng.integers(-(2**63), 2**63, 200)), torch.arange(200) + round
        u = uniforms(starts_of(seeds), positions)
        weighted = weights(logits, p["inv_temperature"], p["min_p"])
        rows = ints(weighted)
        plain, _ = draw(weighted, u)
        by_k = draw_top_k(logits, p["inv_temperature"], p["min_p"], k, p["top_p"], u, int(k.max()))
        by_p = draw_top_p(weighted, p["top_p"], starts_of(seeds), positions)
        for i, row in enumerate(rows):
            top_p = float(p["top_p"][i])
            assert int(plain[i]) == exact.inverse(row, float(u[i]))
            assert int(by_p[i]) == exact.top_p(row, top_p, int(seeds[i]), int(positions[i]))
            kept = exact.kept_by_top_p(exact.kept_by_top_k(logits[i].tolist(), row, int(k[i])), top_p)
            assert int(by_k[i]) == exact.inverse(kept, float(u[i]))


def test_a_whole_vocabulary_at_full_precision():
    """Where sums come near 2**53: a flat distribution of 2**19 tokens, and one of real size."""
    for vocab in (2**19, 151_936):
        logits = torch.zeros(2, vocab)
        logits[1] = torch.randn(vocab, generator=torch.Generator().manual_seed(1))
        weighted = weights(logits, torch.ones(2), torch.zeros(2))
        running = np.cumsum(weighted.numpy().astype(np.int64), axis=1)
        for u in (*EDGES, 0.123456789, 0.987654321):
            found = draw(weighted, torch.full((2,), u, dtype=torch.float64))[0].tolist()
            for row in (0, 1):
                target = min(int(u * float(running[row, -1])), int(running[row, -1]) - 1)
                assert found[row] == int(np.searchsorted(running[row], target, side="right"))


@pytest.mark.parametrize("seed", range(5))
def test_single_filters_keep_what_transformers_keeps(seed: int):
    """On rows without ties, the sets of tokens that can be drawn at all."""
    logits = torch.randn(30, 200, generator=torch.Generator().manual_seed(seed)) * 3
    ids = torch.zeros(30, 1, dtype=torch.int64)
    ones, zeros = torch.ones(30), torch.zeros(30)
    plain = weights(logits, ones, zeros)
    for p in (0.05, 0.5, 0.9, 0.99):
        ours = torch.tensor([exact.kept_by_top_p(row, p) for row in ints(plain)]) > 0
        theirs = TopPLogitsWarper(p)(ids, logits).isfinite()
        assert (ours != theirs).sum() <= 1  # a border may fall between float32 and exact sums
        min_p = weights(logits, ones, torch.full((30,), p)) > 0
        assert torch.equal(min_p, MinPLogitsWarper(p)(ids, logits).isfinite())
    for k in (1, 5, 50):
        ours = (
            torch.tensor(
                [exact.kept_by_top_k(a, b, k) for a, b in zip(logits.tolist(), ints(plain), strict=True)]
            )
            > 0
        )
        assert torch.equal(ours, TopKLogitsWarper(k)(ids, logits).isfinite())


def frequencies(way: str, logits: torch.Tensor, count: int, **p: float) -> tuple[list[int], list[float]]:
    """How often each token is drawn at `count` positions, and how often it should be."""
    rows = logits.expand(count, -1)
    ones = torch.ones(count)
    starts, positions = starts_of(torch.tensor([12345])).expand(count), torch.arange(count)
    inv, min_p = ones / p.get("temperature", 1.0), ones * p.get("min_p", 0.0)
    top_p, k = p.get("top_p", 1.0), int(p.get("top_k", 0))
    if way == "plain":
        tokens, _ = draw(weights(rows, inv, min_p), uniforms(starts, positions))
    elif way == "top_p":
        tokens = draw_top_p(weights(rows, inv, min_p), ones.double() * top_p, starts, positions)
    else:
        u = uniforms(starts, positions)
        tokens = draw_top_k(rows, inv, min_p, torch.full((count,), k), ones.double() * top_p, u, largest_k=k)
    scaled = (logits[0].double() / p.get("temperature", 1.0)).softmax(-1)
    scaled = torch.where(scaled >= p.get("min_p", 0.0) * scaled.max(), scaled, 0)
    if k:
        scaled = torch.where(scaled >= scaled.topk(k).values[-1], scaled, 0)
    scaled /= scaled.sum()
    order = scaled.argsort(descending=True)
    before = scaled[order].cumsum(0) - scaled[order]
    scaled[order[before >= top_p]] = 0
    return torch.bincount(tokens, minlength=logits.shape[1]).tolist(), (scaled / scaled.sum()).tolist()


@pytest.mark.parametrize(
    ("way", "p"),
    [
        ("plain", {}),
        ("plain", {"temperature": 0.7, "min_p": 0.05}),
        ("top_p", {"top_p": 0.9}),
        ("top_p", {"top_p": 0.3, "temperature": 2.0}),
        ("top_p", {"top_p": 0.05, "temperature": 5.0, "min_p": 0.1}),
        ("top_k", {"top_k": 5}),
        ("top_k", {"top_k": 40, "top_p": 0.8, "temperature": 1.5, "min_p": 0.02}),
    ],
)
def test_frequencies_are_the_probabilities(way: str, p: dict[str, float]):
    logits = torch.randn(1, 150, generator=torch.Generator().manual_seed(3)) * 2
    counts, probabilities = frequencies(way, logits, 40_000, **p)
    assert all(count == 0 for count, q in zip(counts, probabilities, strict=True) if q == 0)
    assert exact.chi_square(counts, probabilities) < 5


def test_rows_are_drawn_alike_in_any_company():
    """Bit for bit, at a real vocabulary, whatever the number of rows and threads."""
    rng = np.random.default_rng(0)
    vocab, rows = 32_003, 9
    logits = torch.tensor(rng.normal(size=(rows, vocab)) * 3, dtype=torch.float32)
    p = parameters(rng, rows)
    seeds, positions = starts_of(torch.arange(rows)), torch.arange(rows) + 100
    k = torch.tensor([1, 5, 50, 64, 65, 600, 1000, 20_000, 3])
    picks = list(range(rows))
    random.Random(1).shuffle(picks)
    for group in ([0], [3, 1], picks, picks[:4]):
        g = torch.tensor(group)
        w = weights(logits[g], p["inv_temperature"][g], p["min_p"][g])
        assert torch.equal(w, weights(logits, p["inv_temperature"], p["min_p"])[g])
        u = uniforms(seeds, positions)
        assert torch.equal(draw(w, u[g])[0], draw(weights(logits, p["inv_temperature"], p["min_p"]), u)[0][g])
        everyone = draw_top_p(weights(logits, p["inv_temperature"], p["min_p"]), p["top_p"], seeds, positions)
        assert torch.equal(draw_top_p(w, p["top_p"][g], seeds[g], positions[g]), everyone[g])
        everyone = draw_top_k(
            logits, p["inv_temperature"], p["min_p"], k, p["top_p"], u, largest_k=int(k.max())
        )
        some = draw_top_k(
            logits[g],
            p["inv_temperature"][g],
            p["min_p"][g],
            k[g],
            p["top_p"][g],
            u[g],
            largest_k=int(k[g].max()),
        )
        assert torch.equal(some, everyone[g])


def test_exp_does_not_depend_on_where_a_number_stands():
    """What the bitwise tests above rest on, for vector and left-over lanes alike."""
    values = -torch.rand(5000) * 30
    whole = values.exp()
    for start in (1, 3, 8, 31):
        for size in (1, 7, 16, 100, 4097):
            assert torch.equal(values[start : start + size].clone().exp(), whole[start : start + size])
