"""Products of 17 to 128 tokens on a card: exact enough at the shapes they are for, and nowhere else taken."""

import pytest
import torch

pytest.importorskip("triton")

from xllm.ops.cuda import linear as products
from xllm.ops.cuda import narrow, tiling
from xllm.ops.cuda.linear import linear
from xllm.ops.cuda.skinny import workspace
from xllm.ops.table import is_available

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not is_available("cuda"), reason="Triton can run on this machine neither with nor without a card"
    ),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton's interpreter takes tensors on the host
LIMIT = 2.0**-8 if DEVICE == "cuda" else 2.0**-7  # of the largest number; the interpreter rounds towards zero
# the interpreter is slow
COUNTS = (31, 50, 100) if DEVICE == "cpu" else (17, 31, 32, 33, 50, 64, 65, 100, 128)
TAKEN = [
    (rows, columns, tokens)
    for rows, columns in ((4096, 1024), (1024, 2048), (1024, 3072), (4096, 4096), (4096, 12288))
    for tokens in COUNTS
    if tiling.narrow(rows, columns, tokens) is not None
]
EACH_KIND = [(4096, 1024, 50), (1024, 2048, 31), (1024, 3072, 100), (4096, 4096, 17), (4096, 12288, 63)]


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(torch.bfloat16)


def check(given: torch.Tensor, exact: torch.Tensor) -> None:
    assert given.shape == exact.shape and given.dtype == torch.bfloat16
    error = (given.double() - exact).abs().max() / exact.abs().max()
    assert error <= LIMIT


def forbid(monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError(f"{name} is not for this")

    monkeypatch.setattr(module, name, refuse)


@pytest.mark.parametrize(("rows", "columns", "tokens"), TAKEN)
def test_products_are_exact_enough(
    rows: int, columns: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, products, "_by_cublas")
    x, weight, bias = normal(tokens, columns), normal(rows, columns), normal(rows) * columns**0.5
    exact = x.double() @ weight.double().T
    check(linear(x, weight, None), exact)
    check(linear(x, weight, bias), exact + bias.double())
    assert not workspace(x.device)[1].any()  # counters are left as they were found


@pytest.mark.parametrize(("rows", "columns", "tokens"), EACH_KIND)
@torch.inference_mode()  # as the engine runs, whose workspace may not be written outside of it
def test_the_same_bits_every_time_whatever_lies_beyond(rows: int, columns: int, tokens: int) -> None:
    """x is the front of a buffer whose other rows are not numbers; sums of splits meet in the same order."""
    buffer = torch.full((128 + tokens, columns), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    x, weight = normal(tokens, columns), normal(rows, columns)
    buffer[:tokens] = x
    workspace(x.device)[0].fill_(torch.nan)  # what nobody has written
    first = linear(buffer[:tokens], weight, None)
    check(first, x.double() @ weight.double().T)
    for _ in range(1 if DEVICE == "cpu" else 20):
        assert torch.equal(linear(buffer[:tokens], weight, None), first)
    assert not workspace(x.device)[1].any()


def test_everything_else_is_not_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few and too many tokens, other shapes, dtypes and addresses, rows that do not follow each other."""
    forbid(monkeypatch, narrow, "narrow")
    numbers, x = normal(1024 * 2048 + 1), normal(129, 2048)
    weight = numbers[1:].view(1024, 2048)
    for tokens, cut in ((50, weight), (16, weight), (65, numbers[:-1].view(1024, 2048)), (20, weight[:1000])):
        check(linear(x[:tokens], cut, None), x[:tokens].double() @ cut.double().T)
    weight = numbers[:-1].view(1024, 2048)
    odd = normal(50 * 2048 + 1)[1:].view(50, 2048)
    across, apart = normal(2048, 50).T, normal(50, 4096)[:, :2048]
    for given in (odd, across, apart, x):
        check(linear(given, weight, None), given.double() @ weight.double().T)
    turned = normal(2048, 1024).T
    check(linear(x[:50], turned, None), x[:50].double() @ turned.double().T)
    in_float32 = linear(x[:50].float(), weight, None)
    assert in_float32.dtype == torch.float32
    check(in_float32.bfloat16(), x[:50].double() @ weight.double().T)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a card")
@pytest.mark.parametrize("tokens", [20, 64, 100])
def test_overlapping_products_change_nothing(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products back to back and with kernels of PyTorch's between them, in a graph and out of it: the bits of a run in
    which each kernel waits for the end of the one before it."""
    weights = [
        [
            normal(*shape) / shape[1] ** 0.5
            for shape in ((4096, 1024), (4096, 4096), (1024, 4096), (1024, 3072))
        ]
        for _ in range(4)
    ]
    start = normal(tokens, 1024)

    def run() -> torch.Tensor:
        y = start
        for wide, square, tall, last in weights:
            x = linear(linear(linear(y, wide, None), square, None), tall, None)
            y = y + linear(torch.cat([x, y, x], 1), last, None)
        return y

    with monkeypatch.context() as patched:
        patched.setattr(narrow, "uses_pdl", lambda: False)
        expected = run()
    assert torch.equal(run(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = run()
    for _ in range(50):
        given.zero_()
        graph.replay()
        assert torch.equal(given, expected)
    assert not workspace(start.device)[1].any()
