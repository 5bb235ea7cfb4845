"""What parity does not reach of the row-wise operators for a card: wide rows, no rows, and other KV caches."""

import pytest
import torch

pytest.importorskip("triton")

from xllm.ops import norm as norm_reference
from xllm.ops import rotary as rotary_reference
from xllm.ops.cuda.activation import silu_and_mul
from xllm.ops.cuda.norm import add_rms_norm, rms_norm
from xllm.ops.cuda.rotary import rope_and_cache
from xllm.ops.table import is_available

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not is_available("cuda"), reason="neither a card nor Triton's interpreter here"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton's interpreter takes tensors on the host


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE)


@pytest.mark.parametrize("columns", [1, 1025, 4096, 5000, 12289])
def test_wide_rows(columns: int) -> None:
    x, weight = normal(3, columns), normal(columns)
    exact = norm_reference.rms_norm(x.double(), weight.double(), 1e-6)
    assert (rms_norm(x, weight, 1e-6) - exact).abs().max() <= 3e-6 * exact.abs().max()
    across = normal(columns, 3).T  # rows that are not contiguous
    exact = norm_reference.rms_norm(across.double(), weight.double(), 1e-6)
    assert (rms_norm(across, weight, 1e-6) - exact).abs().max() <= 3e-6 * exact.abs().max()


def test_no_rows() -> None:
    empty = normal(0, 64)
    assert rms_norm(empty, normal(64), 1e-6).shape == (0, 64)
    assert add_rms_norm(empty, empty.clone(), normal(64), 1e-6).shape == (0, 64)
    assert silu_and_mul(empty).shape == (0, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("head_dim", "rotated"), [(128, 128), (96, 96), (80, 32), (64, 2)])
def test_caches_of_other_dtypes(
    head_dim: int, rotated: int, kv_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """Also in a cache whose blocks do not lie close together."""
    tokens, q_heads, kv_heads, block_size = 5, 6, 3, 16
    cache = torch.zeros(9, 2, 2, block_size, kv_heads, head_dim, device=DEVICE).to(kv_dtype)[::2]
    qkv = normal(tokens, (q_heads + 2 * kv_heads) * head_dim).to(dtype)
    q_norm, k_norm = normal(2, head_dim).to(dtype)
    positions = torch.randint(100, (tokens,), device=DEVICE)
    slots = torch.randperm(cache.shape[0] * block_size, device=DEVICE)[:tokens]
    cos_sin = normal(100, rotated)
    exact_cache = torch.zeros(cache.shape, dtype=torch.float64, device=DEVICE)
    exact = rotary_reference.rope_and_cache(
        qkv.double(), positions, cos_sin, q_norm.double(), k_norm.double(), 1e-6, exact_cache, 1, slots
    )
    given = rope_and_cache(qkv, positions, cos_sin, q_norm, k_norm, 1e-6, cache, 1, slots)
    assert (given.double() - exact).abs().max() <= step(dtype) * exact.abs().max()
    # each number to the precision of the cache, relative to itself, and in float8 to its smallest step
    off = (cache.double() - exact_cache).abs()
    assert (off <= step(kv_dtype) * exact_cache.abs() + 2.0**-10).all()


def step(dtype: torch.dtype) -> float:
    """The most that rounding takes from a number, relative, and a little for the arithmetic before it."""
    return {torch.float32: 3e-6, torch.bfloat16: 1.01 * 2.0**-8, torch.float8_e4m3fn: 1.01 * 2.0**-4}[dtype]
