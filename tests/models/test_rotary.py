import torch

from xllm.models.layers.rotary import RotaryTable, cos_sin_table, frequencies
from xllm.models.rope import Rope

PLAIN = Rope(type="default", theta=10000.0, dim=32, original_max=64)
CPU = torch.device("cpu")


def test_table_grows_without_touching_what_was_handed_out() -> None:
    table = RotaryTable(PLAIN)
    before = table.upto(10)
    kept = before.clone()
    after = table.upto(5000)
    assert after.shape[0] >= 5000
    assert torch.equal(before, kept)
    assert torch.equal(after[: len(before)], before)
    assert torch.equal(after, cos_sin_table(PLAIN, 0, len(after), CPU))
    assert table.upto(4000) is after


def test_dynamic_is_plain_within_the_trained_context_and_slower_beyond() -> None:
    dynamic = Rope(type="dynamic", theta=10000.0, dim=32, original_max=64, factor=4.0)
    ours, plain = cos_sin_table(dynamic, 0, 200, CPU), cos_sin_table(PLAIN, 0, 200, CPU)
    assert torch.allclose(ours[:64], plain[:64], atol=1e-5)
    assert not torch.allclose(ours[64:], plain[64:], atol=1e-2)


def test_yarn_keeps_fast_pairs_and_slows_slow_ones() -> None:
    yarn = Rope(type="yarn", theta=10000.0, dim=128, original_max=4096, factor=8.0)
    ratio = frequencies(Rope(type="default", theta=10000.0, dim=128, original_max=4096)) / frequencies(yarn)
    assert torch.allclose(ratio[:10], torch.ones(10))
    assert torch.allclose(ratio[-5:], torch.full((5,), 8.0))
    assert (ratio.diff() > -1e-4).all()
