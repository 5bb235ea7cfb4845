"""How weights and attention are cut for a card: what was measured stays chosen, and no shape gets a cut that cannot work."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.cases import paged, tiled
from xllm.ops.cuda import attention_plan, tiling
from xllm.ops.table import is_available

SHAPES = st.integers(1, 200_000), st.integers(1, 40_000)
SHARED_MEMORY = 227 * 1024  # of a program, on Hopper


@pytest.mark.parametrize(
    ("rows", "columns", "gated", "rows_tile_warps_ahead"),
    [
        (4096, 1024, False, (8, 1024, 4, 1)),  # Qwen3-0.6B: query, key and value
        (1024, 2048, False, (8, 2048, 4, 1)),  # attention's output
        (3072, 1024, True, (4, 512, 2, 1)),  # gate and up
        (1024, 3072, False, (8, 1024, 4, 3)),  # down
        (151936, 1024, False, (8, 512, 4, 2)),  # vocabulary
        (6144, 4096, False, (4, 1024, 4, 3)),  # Qwen3-8B, likewise
        (4096, 4096, False, (8, 1024, 4, 1)),
        (12288, 4096, True, (8, 1024, 4, 0)),
        (4096, 12288, False, (4, 1024, 2, 3)),
        (151936, 4096, False, (8, 1024, 4, 3)),
    ],
)
def test_one_token_keeps_what_was_measured(
    rows: int, columns: int, gated: bool, rows_tile_warps_ahead: tuple[int, int, int, int]
) -> None:
    cut = tiling.gemv(1, rows, columns, gated)
    assert (cut.rows, cut.tile, cut.warps, cut.ahead) == rows_tile_warps_ahead
    assert cut.fold == 1 and cut.unrolled * cut.tile == columns


@pytest.mark.parametrize(
    ("rows", "columns", "rows_tile_splits_stages"),
    [
        (4096, 1024, (32, 256, 1, 3)),
        (1024, 2048, (32, 128, 4, 4)),
        (1024, 3072, (32, 128, 4, 4)),
        (6144, 1024, (64, 128, 1, 4)),
        (4096, 4096, (32, 128, 2, 4)),
        (4096, 12288, (32, 128, 2, 4)),
        (24576, 4096, (64, 128, 1, 4)),
        (151936, 4096, (64, 128, 1, 4)),
    ],
)
def test_skinny_products_keep_what_was_measured(
    rows: int, columns: int, rows_tile_splits_stages: tuple[int, int, int, int]
) -> None:
    cut = tiling.skinny(rows, columns, False)
    assert (cut.rows, cut.tile, cut.splits, cut.stages) == rows_tile_splits_stages


@pytest.mark.parametrize(
    ("rows", "columns", "tokens_rows_splits"),  # for 17 to 32 tokens, for 33 to 64, for 65 to 128
    [
        (4096, 1024, (None, (32, 64, 1), (64, 64, 1))),
        (1024, 2048, ((32, 32, 4), (32, 64, 4), None)),
        (1024, 3072, ((32, 32, 4), (32, 64, 4), (64, 64, 4))),
        (4096, 4096, ((32, 64, 2), None, None)),
        (4096, 12288, ((32, 64, 2), (64, 64, 2), None)),
        (6144, 1024, (None, None, None)),
        (151936, 1024, (None, None, None)),
        (6144, 4096, (None, None, None)),
        (24576, 4096, (None, None, None)),
        (151936, 4096, (None, None, None)),
    ],
)
def test_narrow_products_keep_what_was_measured(
    rows: int, columns: int, tokens_rows_splits: tuple[tuple[int, int, int] | None, ...]
) -> None:
    for least, most, expected in zip((17, 33, 65), (32, 64, 128), tokens_rows_splits, strict=True):
        for tokens in range(least, most + 1):
            cut = tiling.narrow(rows, columns, tokens)
            assert (cut and (cut.tokens, cut.rows, cut.splits)) == expected
            assert cut is None or (cut.tile, cut.stages, cut.warps, cut.ahead) == (128, 6, 4, 512)
    assert tiling.narrow(rows, columns, 16) is tiling.narrow(rows, columns, 129) is None


@given(
    st.integers(1, 200),
    st.sampled_from([32, 64, 128]).flatmap(lambda unit: st.integers(1, 150).map(lambda n: n * unit))
    | SHAPES[0],
    st.integers(1, 120).map(lambda n: n * 128) | SHAPES[1],
)
def test_a_narrow_product_is_one_wave_of_whole_tiles(tokens: int, rows: int, columns: int) -> None:
    cut = tiling.narrow(rows, columns, tokens)
    if cut is None:
        return
    assert rows % cut.rows == 0 and columns % (cut.splits * cut.tile) == 0  # the kernel has no masks for them
    assert cut.ahead % 64 == 0 and cut.ahead <= columns // cut.splits
    token_tiles = tiling.programs_for(tokens, cut.tokens)
    assert rows // cut.rows * cut.splits * token_tiles == tiling.MULTIPROCESSORS
    assert cut.stages * (cut.rows + cut.tokens) * cut.tile * 2 + 1024 < SHARED_MEMORY
    if cut.splits > 1:  # the workspace of skinny products holds the sums
        room = tiling.SPLIT_PROGRAMS * tiling.SPLIT_ROWS * tiling.SKINNY_TOKENS
        assert tiling.MULTIPROCESSORS * cut.rows * cut.tokens <= room
        assert rows // cut.rows * token_tiles <= tiling.SPLIT_PROGRAMS


@given(st.integers(1, 8), *SHAPES, st.booleans())
def test_a_gemv_never_reads_ahead_of_the_row(tokens: int, rows: int, columns: int, gated: bool) -> None:
    cut = tiling.gemv(tokens, rows, columns, gated)
    tiles = tiling.programs_for(columns, cut.tile)
    assert 0 <= cut.ahead <= cut.unrolled <= tiles
    assert cut.tile == tiling.padded(cut.tile) and cut.tile % cut.fold == 0
    if tokens == 1:
        assert cut.unrolled == tiles


@given(*SHAPES, st.booleans())
def test_every_split_has_a_tile_and_the_workspace_room(rows: int, columns: int, exact: bool) -> None:
    cut = tiling.skinny(rows, columns, exact)
    tiles = tiling.programs_for(columns, cut.tile)
    assert (cut.splits - 1) * tiling.programs_for(tiles, cut.splits) < tiles
    numbers = (cut.rows + tiling.SKINNY_TOKENS) * cut.tile * (4 if exact else 2)
    assert (cut.stages + 1) * numbers < SHARED_MEMORY  # a tile more than stages: the one loaded ahead
    if cut.splits > 1:
        assert tiling.programs_for(rows, cut.rows) * cut.splits <= tiling.SPLIT_PROGRAMS
        assert cut.rows <= tiling.SPLIT_ROWS


@given(st.integers(1, 100_000), st.integers(1, 5000))
def test_programs_and_padding(count: int, each: int) -> None:
    programs = tiling.programs_for(count, each)
    assert (programs - 1) * each < count <= programs * each
    assert tiling.padded(count) // 2 < count <= tiling.padded(count)


def test_few_sequences_go_by_small_tiles() -> None:
    for group, head_dim in ((2, 128), (4, 128), (16, 64)):
        few, many = (
            attention_plan.decode_tiling(group, head_dim, torch.bfloat16, sequences) for sequences in (16, 17)
        )
        assert (few.keys, few.warps, few.stages) == (32, 2, 4)
        assert (many.keys, many.warps, many.stages) == (64, 4, 3)
    for group, head_dim, dtype in (
        (2, 128, torch.float32),
        (2, 256, torch.bfloat16),
        (17, 128, torch.bfloat16),  # two warps have no registers for more query heads
    ):
        few, many = (attention_plan.decode_tiling(group, head_dim, dtype, sequences) for sequences in (1, 17))
        assert few == many


@pytest.mark.parametrize(
    ("q_heads", "tokens", "rows"),
    [
        (16, 512, 64),  # Qwen3-0.6B: 64 programs of 128 rows would be
        (16, 1024, 64),
        (16, 2048, 128),
        (16, 64 * 128, 128),
        (32, 512, 64),  # 8B
        (32, 1024, 128),
        (32, 8 * 1024, 128),
    ],
)
def test_short_prompts_go_by_fewer_rows(q_heads: int, tokens: int, rows: int) -> None:
    share = -(-tokens * q_heads // 132)
    assert attention_plan.prefill_tiling(128, torch.bfloat16, share).rows == rows


@pytest.mark.gpu
@pytest.mark.skipif(
    not is_available("cuda"), reason="Triton can run on this machine neither with nor without a card"
)
def test_attention_cut_otherwise_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for few sequences and short prompts, then as for many and long ones."""
    from xllm.ops.cuda import decode_attention, prefill_attention

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        cache, inputs = paged(
            [1, 1, 130, 40], [1, 700, 300, 40], block_size=64, heads=2, head_dim=128, dtype=torch.bfloat16
        )
        q = torch.randn(172, 8, 128).to(torch.bfloat16)
        given = [torch.zeros(172, 8 * 128, dtype=torch.bfloat16) for _ in range(2)]
        inputs = tiled(inputs, attention_plan.QUERY_TILE)
    for out in given:
        decode_attention.decode_attention(q, cache, 1, inputs, 0.1, None, out)
        prefill_attention.prefill_attention(q, cache, 1, inputs, 0.1, None, out)
        monkeypatch.setattr(attention_plan, "FEW_SEQUENCES", 0)
        monkeypatch.setattr(prefill_attention, "multiprocessors", lambda device: 1)
    few, many = (out.float() for out in given)
    assert not few.isnan().any() and few.abs().amax(1).all()  # no row is left out
    assert (few - many).abs().max() <= 2.0**-7 * few.abs().max()
