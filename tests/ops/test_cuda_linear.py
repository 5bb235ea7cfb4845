"""What parity does not reach of the products for a card: long rows, split columns, odd addresses, overlap in graphs."""

import pytest
import torch

pytest.importorskip("triton")

from xllm.ops import few as reference
from xllm.ops.cuda import few, launch
from xllm.ops.cuda.linear import linear
from xllm.ops.cuda.skinny import workspace
from xllm.ops.table import is_available

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not is_available("cuda"), reason="Triton can run on this machine neither with nor without a card"
    ),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton's interpreter takes tensors on the host
LIMITS = {torch.float32: 3e-6, torch.bfloat16: 2.0**-8}  # of the largest exact number


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def check(given: torch.Tensor, exact: torch.Tensor) -> None:
    assert given.shape == exact.shape
    error = (given.double() - exact).abs().max() / exact.abs().max()
    assert error <= LIMITS[given.dtype]


@DTYPES
@pytest.mark.parametrize("tokens", [1, 2, 7, 13])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(70, 3072), (9, 4096), (33, 3001), (5, 9000), (40, 2048), (1, 1025), (100, 1024)],
)
def test_long_rows(rows: int, columns: int, tokens: int, dtype: torch.dtype) -> None:
    """Several tiles to a row, with and without a ragged last one; columns split and the sums of the splits met."""
    x, weight, bias = (normal(*shape, dtype=dtype) for shape in ((tokens, columns), (rows, columns), (rows,)))
    for given in (None, bias):
        exact = torch.nn.functional.linear(
            x.double(), weight.double(), None if given is None else bias.double()
        )
        check(linear(x, weight, given), exact)
    assert not workspace(x.device)[1].any()  # counters are left as they were found


@DTYPES
@pytest.mark.parametrize("tokens", [1, 3, 8, 9])
@pytest.mark.parametrize("columns", [1024, 4096, 2300])
def test_half_layers_with_long_rows(columns: int, tokens: int, dtype: torch.dtype) -> None:
    """9 tokens are more than one kernel takes."""
    close = LIMITS[dtype] * (1 if tokens < 9 else 4)  # there rows are rounded on their way
    rows = 22
    x, gain = normal(tokens, columns, dtype=dtype), normal(columns, dtype=dtype)
    weight, bias = normal(rows, columns, dtype=dtype) / columns**0.5, normal(rows, dtype=dtype)
    x8, gain8, weight8, bias8 = (tensor.double() for tensor in (x, gain, weight, bias))
    for given, exact in (
        (
            few.norm_linear(x, gain, 1e-6, weight, bias),
            reference.norm_linear(x8, gain8, 1e-6, weight8, bias8),
        ),
        (
            few.norm_gate_up(x, gain, 1e-6, weight, bias),
            reference.norm_gate_up(x8, gain8, 1e-6, weight8, bias8),
        ),
    ):
        assert given.shape == exact.shape
        assert (given.double() - exact).abs().max() <= close * exact.abs().max()


def test_the_same_bits_every_time() -> None:
    """Whoever of the splits comes last adds up in the same order."""
    x, weight = normal(16, 3072, dtype=torch.bfloat16), normal(64, 3072, dtype=torch.bfloat16)
    first = linear(x, weight, None)
    assert all(torch.equal(linear(x, weight, None), first) for _ in range(3))


@DTYPES
def test_odd_addresses_and_empty_steps(dtype: torch.dtype) -> None:
    """Tensors that begin between 16-byte boundaries, after aligned ones of the same shape; no tokens at all."""
    numbers = normal(70 * 128 + 1, dtype=dtype)
    rows = normal(5 * 128 + 3, dtype=dtype)
    for offset in (0, 1):
        weight = numbers[offset : offset + 70 * 128].view(70, 128)
        for tokens in (1, 5):
            x = rows[3 * offset : 3 * offset + tokens * 128].view(tokens, 128)
            check(linear(x, weight, None), x.double() @ weight.double().T)
    assert linear(x[:0], weight, None).shape == (0, 70)


def test_what_no_kernel_takes_goes_to_pytorch() -> None:
    x, weight = normal(3, 64, dtype=torch.float32), normal(64, 50, dtype=torch.bfloat16)
    check(linear(x, weight.T, None), x.double() @ weight.double())
    across = normal(64, 4, dtype=torch.float32).T
    check(linear(across[:1], weight.T.contiguous(), None), across[:1].double() @ weight.double())


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a card")
@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_overlapping_kernels_change_nothing(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of half-layers and plain products back to back, in a graph and out of it: the bits of a run in which
    each kernel waits for the end of the one before it."""
    width, inner, layers = 1024, 3072, 8
    weights = [
        [
            normal(*shape, dtype=torch.bfloat16) / shape[1] ** 0.5
            for shape in ((2048, width), (width, 2048), (2 * inner, width), (width, inner), (width, width))
        ]
        for _ in range(layers)
    ]
    gain, start = normal(width, dtype=torch.bfloat16), normal(tokens, width, dtype=torch.bfloat16)

    def run() -> torch.Tensor:
        residual = start.clone()
        for qkv, o, gate_up, down, extra in weights:
            few.linear_add(few.norm_linear(residual, gain, 1e-6, qkv, None), o, None, residual)
            few.linear_add(few.norm_gate_up(residual, gain, 1e-6, gate_up, None), down, None, residual)
            residual += linear(residual, extra, None)  # a kernel of PyTorch's between ours
        return residual

    with monkeypatch.context() as patched:
        patched.setattr(launch, "has_pdl", lambda: False)
        expected = run()
    assert torch.equal(run(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = run()
    for _ in range(50):
        given.zero_()
        graph.replay()
        assert torch.equal(given, expected)
