import pytest
import torch

from xllm.executor.sleep import Sleeper


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def test_weights_come_back_and_the_cache_as_zeros(device):
    shared = torch.randn(100, device=device)
    weights = [torch.randn(7, 5, device=device).bfloat16(), shared[:50], shared[50:]]
    before = [weight.clone() for weight in weights]
    cache = torch.ones(1000, device=device)
    sleeper = Sleeper(weights, [cache])
    given = sleeper.sleep()
    assert sleeper.asleep
    assert given == 7 * 5 * 2 + 100 * 4 + 1000 * 4
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in (*weights, cache))
    sleeper.wake()
    assert not sleeper.asleep
    assert all(torch.equal(weight, was) for weight, was in zip(weights, before, strict=True))
    assert cache.tolist() == [0.0] * 1000


def test_it_sleeps_on_where_the_memory_is_gone(monkeypatch):
    weight, cache = torch.arange(5.0), torch.ones(9)
    sleeper = Sleeper([weight], [cache])
    sleeper.sleep()
    sizes, sleeper._sizes = sleeper._sizes, [20, 1 << 60]
    with pytest.raises(RuntimeError):
        sleeper.wake()
    assert sleeper.asleep
    assert weight.untyped_storage().nbytes() == cache.untyped_storage().nbytes() == 0
    sleeper._sizes = sizes
    sleeper.wake()
    assert weight.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
